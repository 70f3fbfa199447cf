// expand_add: out[row, n] += keep ⊙ (low · up)[row, n] + lora_bias_scale · lora_bias[n], rounded
// once, over active rows
//
//   low [M, R16], up [R, N] by strides, out [M, N] by strides
//   `delta`: forward with low = xa, up = lora_bᵀ; dx with low = dya, up = lora_a
//
// Schedule: 256 threads, eight warps as 2 × 4. Each warp computes 32 × 32 of a tile of 64 gathered
// rows × 128 columns. R is short, so its steps of 32 are not pipelined; several blocks on a
// multiprocessor hide the latency.
//
// Shared memory: low [64][32] 4 KiB, up [128][32] 8 KiB.
#include "common.cuh"
#include "registry.h"

namespace alora {
namespace {

constexpr int kRows = 64, kN = 128, kStep = 32, kThreads = 256;

// Loads steps r0 .. r0 + 31 of `up`, columns n0 .. n0 + 127: as [32][128] if N is its inner
// dimension, else as [128][32].
template <typename T>
__device__ __forceinline__ void load_up(const ExpandParams& p, uint32_t tile, int r0, int n0) {
  const bool is_float = p.flags & kAdapterFloat, along_n = p.up_n == 1;
  const auto at = [&](int k, int n) {
    return tile + (along_n ? swizzle<256>(k, n / 8) + n % 8 * 2 : swizzle64(n, k / 8) + k % 8 * 2);
  };
  if (p.flags & kVectorUp) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kN * kStep / 8; i += kThreads) {
      const int k = along_n ? i / 16 : i % 4 * 8, n = along_n ? i % 16 * 8 : i / 4;
      copy_adapter<T>(at(k, n), p.up, (r0 + k) * p.up_r + (n0 + n) * p.up_n,
                      r0 + k < p.r && n0 + n < p.n, is_float);
    }
    return;
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < kN * kStep; i += kThreads) {
    const int k = along_n ? i / kN : i % kStep, n = along_n ? i % kN : i / kStep;
    T v = from_float<T>(0.f);
    if (r0 + k < p.r && n0 + n < p.n) {
      v = adapter_at<T>(p.up, (r0 + k) * p.up_r + (n0 + n) * p.up_n, is_float);
    }
    store_shared_element(at(k, n), v);
  }
}

template <typename T>
__device__ __forceinline__ void expand_add(const ExpandParams& p) {
  __shared__ __align__(1024) uint8_t low_bytes[kRows * kStep * 2];
  __shared__ __align__(1024) uint8_t up_bytes[kN * kStep * 2];
  static_assert(kRows * kStep / 8 == kThreads, "one chunk of low for each thread");
  const uint32_t low = shared_address(low_bytes), up = shared_address(up_bytes);
  const int count = *p.active_count, first = blockIdx.x * kRows, n0 = blockIdx.y * kN;
  if (first >= count) return;
  const int tid = threadIdx.x, lane = tid % 32, warp_m = tid / 128, warp_n = tid / 32 % 4;
  const bool is_float = p.flags & kAdapterFloat, along_n = p.up_n == 1;
  const int low_row = first + tid / 4 < count ? p.active_rows[first + tid / 4] : -1;
  float acc[2][4][4] = {};
  for (int r0 = 0; r0 < p.r; r0 += kStep) {
    __syncthreads();
    const bool valid = low_row >= 0 && r0 + tid % 4 * 8 < (p.r + 15) / 16 * 16;
    copy_async(low + swizzle64(tid / 4, tid % 4),
               static_cast<const T*>(p.low) + (valid ? low_row * p.low_m + r0 + tid % 4 * 8 : 0),
               valid);
    load_up<T>(p, up, r0, n0);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < kStep / 16; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        const int row = warp_m * 32 + mi * 16 + lane % 16;
        load_matrices(a[mi], low + swizzle64(row, half * 2 + lane / 16));
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        const int n = warp_n * 32 + pair * 16;
        if (along_n) {
          load_matrices_transposed(b, up + swizzle<256>(half * 16 + lane % 16, n / 8 + lane / 16));
        } else {
          load_matrices(
              b, up + swizzle64(n + (lane & 7) + (lane >> 4) * 8, half * 2 + (lane >> 3 & 1)));
        }
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          multiply<T>(acc[mi][2 * pair], a[mi], b[0], b[1]);
          multiply<T>(acc[mi][2 * pair + 1], a[mi], b[2], b[3]);
        }
      }
    }
  }

  const int64_t seed = p.flags & kDropout ? *p.seed : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = first + warp_m * 32 + i / 2 * 16 + i % 2 * 8 + lane / 4;
    if (slot >= count) continue;
    const int row = p.active_rows[slot];
#pragma unroll
    for (int ni = 0; ni < 4; ++ni) {
      const int n = n0 + warp_n * 32 + ni * 8 + lane % 4 * 2;
      if (n >= p.n) continue;
      float v[2] = {acc[i / 2][ni][i % 2 * 2], acc[i / 2][ni][i % 2 * 2 + 1]};
      if (p.flags & kDropout) {
        const uint4 w = philox(seed, n / 4, row);
        v[0] = (lane & 1 ? w.z : w.x) >= p.threshold ? v[0] : 0.f;
        v[1] = (lane & 1 ? w.w : w.y) >= p.threshold ? v[1] : 0.f;
      }
      const bool second = n + 1 < p.n;
      if (p.lora_bias != nullptr) {
        v[0] += p.lora_bias_scale * to_float(adapter_at<T>(p.lora_bias, n, is_float));
        if (second) {
          v[1] += p.lora_bias_scale * to_float(adapter_at<T>(p.lora_bias, n + 1, is_float));
        }
      }
      T* at = static_cast<T*>(p.out) + row * p.out_m + n * p.out_n;
      if ((p.flags & kVectorOut) && second) {
        uint32_t both = *reinterpret_cast<const uint32_t*>(at);
        const T* old = reinterpret_cast<const T*>(&both);
        both = pack<T>(to_float(old[0]) + v[0], to_float(old[1]) + v[1]);
        *reinterpret_cast<uint32_t*>(at) = both;
      } else {
        at[0] = from_float<T>(to_float(at[0]) + v[0]);
        if (second) at[p.out_n] = from_float<T>(to_float(at[p.out_n]) + v[1]);
      }
    }
  }
}

}  // namespace
}  // namespace alora

ALORA_KERNEL(masked_lora_expand_add_bf16_kernel, alora::ExpandParams, 256, 2,
             alora::expand_add<alora::bf16>)
ALORA_KERNEL(masked_lora_expand_add_fp16_kernel, alora::ExpandParams, 256, 2,
             alora::expand_add<alora::fp16>)
