// shrink: out[row, 16·b + j] = scale_b · Σ_k keep ⊙ left[row, k] · right_b[j, k] over active rows
//
//   left [M, K], right_b [≤ 16, K] for each block b of sixteen columns, out [M, 16 · blocks]
//   xa from x and lora_a (one launch for a group that shares x), dya from dy and lora_bᵀ
//
// Schedule: 256 threads; eight warps own the same 16·kMI gathered rows and up to 64 columns, and
// take turns at K, 32 steps each. Nothing is staged: a lane reads the eight neighbouring k that
// are its share of two tensor-core products straight into registers. The order of k inside a
// product is free as long as both operands agree, so the logical steps 2t, 2t+1, 2t+8, 2t+9 of
// product j are the steps 8t+4j .. 8t+4j+3 in memory. At the end the warps' sums are added in
// order through shared memory [8][16·kMI][72] float. Columns past `valid` become zero.
#include "common.cuh"
#include "registry.h"

namespace alora {
namespace {

template <typename T, int kMI, bool kFast>
__device__ __forceinline__ void shrink(const ShrinkParams& p) {
  constexpr int kWarps = 8, kRows = 16 * kMI, kPitch = 72, kBlocks = 4;
  extern __shared__ __align__(16) float sums[];  // [kWarps][kRows][kPitch]
  const int count = *p.active_count, first = blockIdx.x * kRows;
  if (first >= count) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_block = blockIdx.y * kBlocks, blocks = min(kBlocks, p.blocks - first_block);
  const bool is_float = p.flags & kAdapterFloat, vector = p.flags & kVectorAdapter;
  const bool dropout = p.flags & kDropout;
  const int64_t seed = dropout ? *p.seed : 0;
  int rows[kMI][2];
#pragma unroll
  for (int i = 0; i < kMI * 2; ++i) {
    const int slot = first + i / 2 * 16 + i % 2 * 8 + g;
    rows[i / 2][i % 2] = slot < count ? p.active_rows[slot] : -1;
  }
  float acc[kMI][2 * kBlocks][4] = {};

#pragma unroll(kFast ? 2 : 1)
  for (int k0 = warp * 32; k0 < p.k; k0 += kWarps * 32) {
    const int k = k0 + 8 * t, left_over = p.k - k;
    uint4 a[kMI][2];
#pragma unroll
    for (int i = 0; i < kMI * 2; ++i) {
      const int row = rows[i / 2][i % 2];
      const T* at = static_cast<const T*>(p.left) + row * p.left_m + k * p.left_k;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (row >= 0 && left_over > 0) {
        v = kFast ? *reinterpret_cast<const uint4*>(at) : gather(at, p.left_k, left_over);
        if (dropout) v = drop(v, seed, p.threshold, k, row);
      }
      a[i / 2][i % 2] = v;
    }
#pragma unroll
    for (int n8 = 0; n8 < 2 * kBlocks; ++n8) {
      if (n8 / 2 >= blocks) continue;
      const ColumnBlock& block = p.columns[first_block + n8 / 2];
      const int r = n8 % 2 * 8 + g;
      uint4 b = make_uint4(0, 0, 0, 0);
      if (r < block.valid && left_over > 0) {
        const int64_t offset = r * p.right_r + k * p.right_k;
        b = vector ? adapter_vector<T>(block.right, offset, is_float)
                   : gather_adapter<T>(block.right, offset, p.right_k, left_over, is_float);
      }
#pragma unroll
      for (int mi = 0; mi < kMI; ++mi) {
        const uint4 top = a[mi][0], bottom = a[mi][1];
        const uint32_t even[4] = {top.x, bottom.x, top.y, bottom.y};
        const uint32_t odd[4] = {top.z, bottom.z, top.w, bottom.w};
        multiply<T>(acc[mi][n8], even, b.x, b.y);
        multiply<T>(acc[mi][n8], odd, b.z, b.w);
      }
    }
  }

#pragma unroll
  for (int n8 = 0; n8 < 2 * kBlocks; ++n8) {
    if (n8 / 2 >= blocks) continue;
#pragma unroll
    for (int i = 0; i < kMI * 2; ++i) {
      float* at = sums + (warp * kRows + i / 2 * 16 + i % 2 * 8 + g) * kPitch + n8 * 8 + 2 * t;
      *reinterpret_cast<float2*>(at) =
          make_float2(acc[i / 2][n8][i % 2 * 2], acc[i / 2][n8][i % 2 * 2 + 1]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * blocks * 8; i += blockDim.x) {
    const int local = i / (blocks * 8), pair = i % (blocks * 8), slot = first + local;
    if (slot >= count) continue;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part =
          *reinterpret_cast<const float2*>(sums + (w * kRows + local) * kPitch + 2 * pair);
      total.x += part.x;
      total.y += part.y;
    }
    const float scale = p.columns[first_block + pair / 8].scale;
    T* at = static_cast<T*>(p.out) + p.active_rows[slot] * p.out_m + first_block * 16 + 2 * pair;
    *reinterpret_cast<uint32_t*>(at) = pack<T>(total.x * scale, total.y * scale);
  }
}

}  // namespace
}  // namespace alora

#define ALORA_SHRINK(type)                                                                 \
  ALORA_KERNEL(masked_lora_shrink_##type##_vector_32_kernel, alora::ShrinkParams, 256, 1,  \
               alora::shrink<alora::type, 2, true>)                                        \
  ALORA_KERNEL(masked_lora_shrink_##type##_vector_16_kernel, alora::ShrinkParams, 256, 1,  \
               alora::shrink<alora::type, 1, true>)                                        \
  ALORA_KERNEL(masked_lora_shrink_##type##_strided_16_kernel, alora::ShrinkParams, 256, 1, \
               alora::shrink<alora::type, 1, false>)

ALORA_SHRINK(bf16)
ALORA_SHRINK(fp16)
