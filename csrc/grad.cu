// grad: part[s, p, r] = Σ keep ⊙ wide[row, p] · low[row, r] over the active rows of split s
// reduce: out[p, r] = scale · Σ_s part[s, p, r], in the order of s. For dya, row p of the parts
// goes to the p-th active row of out.
//
//   wide [M, P], low [M, R16], part [S, P, R16] float, out [P, R] by strides
//   dB from dy and xa (out = dB), dA from x and dya (out = dAᵀ)
//
// No atomics: the result does not depend on the order in which blocks run.
//
// Schedule of grad: 256 threads, eight warps as 4 × 2. Each computes 32 × 32 of a tile 128 (p) × 64
// (r). Rows of both operands are gathered into shared memory in their own order, and ldmatrix
// transposes them. cp.async fills a ring of four stages of 32 rows. wide goes through registers if
// its rows are not aligned, or with dropout. The row numbers are read one stage ahead.
//
// Shared memory: 4 × (wide [32][128] 8 KiB, low [32][64] 4 KiB).
#include "common.cuh"
#include "registry.h"

namespace alora {
namespace {

template <typename T>
__device__ __forceinline__ void grad(const GradParams& p) {
  constexpr int kStages = 4, kRows = 32, kP = 128, kR = 64, kThreads = 256;
  constexpr uint32_t kWideBytes = kRows * kP * 2, kStageBytes = kWideBytes + kRows * kR * 2;
  constexpr int kWideChunks = kRows * kP / 8 / kThreads;
  static_assert(kRows * kR / 8 == kThreads, "one chunk of low for each thread");
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t ring = shared_address(shared);
  const int first = blockIdx.z * p.split_rows;
  const int last = min(*p.active_count, first + p.split_rows);
  if (first >= last) return;  // reduce does not read this part
  const int tid = threadIdx.x, lane = tid % 32, warp_p = tid / 64, warp_r = tid / 32 % 2;
  const int p0 = blockIdx.x * kP, r0 = blockIdx.y * kR;
  const bool dropout = p.flags & kDropout, vector = !(p.flags & kStrided);
  const int64_t seed = dropout ? *p.seed : 0;
  const int steps = (last - first + kRows - 1) / kRows;

  int rows[kWideChunks], low_row;
  const auto find_rows = [&](int step) {
    const int begin = first + step * kRows;
#pragma unroll
    for (int i = 0; i < kWideChunks; ++i) {
      const int slot = begin + tid / 16 + i * (kThreads / 16);
      rows[i] = slot < last ? p.active_rows[slot] : -1;
    }
    const int slot = begin + tid / 8;
    low_row = slot < last ? p.active_rows[slot] : -1;
  };
  const auto load = [&](int step) {
    if (step < steps) {
      const uint32_t wide = ring + step % kStages * kStageBytes, low = wide + kWideBytes;
      const int column = p0 + tid % 16 * 8, r = r0 + tid % 8 * 8;
#pragma unroll
      for (int i = 0; i < kWideChunks; ++i) {
        const uint32_t to = wide + swizzle<256>(tid / 16 + i * (kThreads / 16), tid % 16);
        const bool valid = rows[i] >= 0 && column < p.p;
        const T* from =
            static_cast<const T*>(p.wide) + (valid ? rows[i] * p.wide_m + column * p.wide_p : 0);
        if (vector && !dropout) {
          copy_async(to, from, valid);
        } else {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (valid) {
            v = vector ? *reinterpret_cast<const uint4*>(from)
                       : gather(from, p.wide_p, p.p - column);
            if (dropout) v = drop(v, seed, p.threshold, column, rows[i]);
          }
          store_shared(to, v);
        }
      }
      const bool valid = low_row >= 0 && r < p.r16;
      copy_async(low + swizzle<128>(tid / 8, tid % 8),
                 static_cast<const T*>(p.low) + (valid ? low_row * p.low_m + r : 0), valid);
      find_rows(step + 1);
    }
    commit_copies();
  };

  float acc[2][4][4] = {};
  find_rows(0);
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) load(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    const uint32_t wide = ring + step % kStages * kStageBytes, low = wide + kWideBytes;
#pragma unroll
    for (int half = 0; half < kRows / 16; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        const int row = half * 16 + (lane & 7) + (lane >> 4) * 8;
        load_matrices_transposed(a[mi],
                                 wide + swizzle<256>(row, warp_p * 4 + mi * 2 + (lane >> 3 & 1)));
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int column = warp_r * 32 + pair * 16;
        if (r0 + column >= p.r16) continue;
        uint32_t b[4];
        load_matrices_transposed(
            b, low + swizzle<128>(half * 16 + (lane & 15), column / 8 + lane / 16));
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          multiply<T>(acc[mi][2 * pair], a[mi], b[0], b[1]);
          multiply<T>(acc[mi][2 * pair + 1], a[mi], b[2], b[3]);
        }
      }
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = p0 + warp_p * 32 + i / 2 * 16 + i % 2 * 8 + lane / 4;
#pragma unroll
    for (int ni = 0; ni < 4; ++ni) {
      const int r = r0 + warp_r * 32 + ni * 8 + lane % 4 * 2;
      if (row >= p.p || r >= p.r16) continue;
      float* at = p.part + (static_cast<int64_t>(blockIdx.z) * p.p + row) * p.r16 + r;
      *reinterpret_cast<float2*>(at) =
          make_float2(acc[i / 2][ni][i % 2 * 2], acc[i / 2][ni][i % 2 * 2 + 1]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void reduce(const ReduceParams& p) {
  allow_dependents();
  const int count = *p.active_count, rows = p.active_rows == nullptr ? p.p : count;
  const int splits = p.split_rows == 0 ? p.splits : (count + p.split_rows - 1) / p.split_rows;
  const int64_t total = static_cast<int64_t>(rows) * p.r, size = static_cast<int64_t>(p.p) * p.r16;
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < total; i += gridDim.x * 256ll) {
    // Neighbouring threads write neighbouring elements.
    const int row = static_cast<int>(p.out_p == 1 ? i % rows : i / p.r);
    const int r = static_cast<int>(p.out_p == 1 ? i / rows : i % p.r);
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) {
      sum += p.part[s * size + static_cast<int64_t>(row) * p.r16 + r];
    }
    sum *= p.scale;
    const int to = p.active_rows == nullptr ? row : p.active_rows[row];
    const int64_t at = to * p.out_p + r * p.out_r;
    if (p.flags & kFloatOut) {
      static_cast<float*>(p.out)[at] = sum;
    } else {
      static_cast<T*>(p.out)[at] = from_float<T>(sum);
    }
  }
}

}  // namespace
}  // namespace alora

#define ALORA_GRAD(type)                                                        \
  ALORA_KERNEL(masked_lora_grad_##type##_kernel, alora::GradParams, 256, 2,     \
               alora::grad<alora::type>)                                        \
  ALORA_KERNEL(masked_lora_reduce_##type##_kernel, alora::ReduceParams, 256, 2, \
               alora::reduce<alora::type>)

ALORA_GRAD(bf16)
ALORA_GRAD(fp16)
