// shrink: out[row, 16·b + j] = scale_b · Σ_k keep ⊙ left[row, k] · right_b[j, k] over active rows
//
//   left [M, K], right_b [≤ 16, K] for each block b of sixteen columns, out [M, 16 · blocks]
//   xa from x and lora_a (one launch for a group that shares x), dya from dy and lora_bᵀ
//
// Schedule: 256 threads. All eight warps have the same 16·kMI gathered rows and up to 64 columns,
// and take turns along K, 32 steps each. A lane reads eight neighbouring k directly into registers;
// they are its share of two tensor-core products. The order of k inside a product does not matter,
// as long as both operands have the same. So the logical steps 2t, 2t+1, 2t+8, 2t+9 of product j
// are the steps 8t+4j .. 8t+4j+3 in memory. At the end the warps' sums are added in order, through
// shared memory [8][16·kMI][72] float. Columns past `valid` become zero. The adapter operand is
// contiguous along k (lora_a) or along its columns (lora_bᵀ), and each layout is read in its own
// way.
#include "common.cuh"
#include "registry.h"

namespace alora {
namespace {

// How the adapter operand is read: eight neighbouring k at once, in x's dtype or float32; two
// neighbouring columns at once (then tile h of a block has the columns 2c + h); or one by one.
enum class Read { kVector, kVectorFloat, kPairs, kPairsFloat, kSingly };

// Reads eight steps of two columns. `even` and `odd` are the fragments of the block's two tiles.
template <typename T, bool kFloat>
__device__ __forceinline__ void read_pairs(const void* base, int64_t offset, int64_t stride,
                                           bool second, uint4& even, uint4& odd) {
  uint32_t v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t at = offset + i * stride;
    if constexpr (kFloat) {
      const float2 pair = *reinterpret_cast<const float2*>(static_cast<const float*>(base) + at);
      v[i] = pack<T>(pair.x, pair.y);
    } else {
      v[i] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(base) + at);
    }
  }
  const auto join = [&](int i, uint32_t bytes) { return __byte_perm(v[i], v[i + 1], bytes); };
  even = make_uint4(join(0, 0x5410), join(2, 0x5410), join(4, 0x5410), join(6, 0x5410));
  odd = make_uint4(join(0, 0x7632), join(2, 0x7632), join(4, 0x7632), join(6, 0x7632));
  if (!second) odd = make_uint4(0, 0, 0, 0);
}

template <typename T, int kMI, bool kFast>
struct Shrink {
  static constexpr int kWarps = 8, kRows = 16 * kMI, kPitch = 72, kBlocks = 4;

  const ShrinkParams& p;
  const int count, first, warp, g, t, first_block, blocks;
  float acc[kMI][2 * kBlocks][4] = {};

  __device__ explicit Shrink(const ShrinkParams& params)
      : p(params),
        count(*params.active_count),
        first(blockIdx.x * kRows),
        warp(threadIdx.x / 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        first_block(blockIdx.y * kBlocks),
        blocks(min(kBlocks, params.blocks - first_block)) {}

  template <Read kRead>
  __device__ void read_block(const ColumnBlock& block, int k, uint4 (&b)[2]) {
    constexpr bool kPairs = kRead == Read::kPairs || kRead == Read::kPairsFloat;
    b[0] = b[1] = make_uint4(0, 0, 0, 0);
    if constexpr (kPairs) {
      if (2 * g < block.valid) {
        read_pairs<T, kRead == Read::kPairsFloat>(block.right, k * p.right_k + 2 * g, p.right_k,
                                                  2 * g + 1 < block.valid, b[0], b[1]);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = h * 8 + g;
        if (r >= block.valid) continue;
        const int64_t offset = r * p.right_r + k * p.right_k;
        if constexpr (kRead == Read::kSingly) {
          b[h] =
              gather_adapter<T>(block.right, offset, p.right_k, p.k - k, p.flags & kAdapterFloat);
        } else {
          b[h] = adapter_vector<T>(block.right, offset, kRead == Read::kVectorFloat);
        }
      }
    }
  }

  // All loads of a step come before its products, so that their latencies overlap.
  template <Read kRead>
  __device__ void multiply_all() {
    const bool dropout = p.flags & kDropout;
    const int64_t seed = dropout ? *p.seed : 0;
    int rows[kMI][2];
#pragma unroll
    for (int i = 0; i < kMI * 2; ++i) {
      const int slot = first + i / 2 * 16 + i % 2 * 8 + g;
      rows[i / 2][i % 2] = slot < count ? p.active_rows[slot] : -1;
    }
#pragma unroll 1
    for (int k0 = warp * 32; k0 < p.k; k0 += kWarps * 32) {
      const int k = k0 + 8 * t, left_over = p.k - k;
      uint4 a[kMI][2], b[kBlocks][2];
#pragma unroll
      for (int i = 0; i < kMI * 2; ++i) {
        const int row = rows[i / 2][i % 2];
        const T* at = static_cast<const T*>(p.left) + row * p.left_m + k * p.left_k;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row >= 0 && left_over > 0) {
          v = kFast ? *reinterpret_cast<const uint4*>(at) : gather(at, p.left_k, left_over);
        }
        a[i / 2][i % 2] = v;
      }
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        b[i][0] = b[i][1] = make_uint4(0, 0, 0, 0);
        if (i < blocks && left_over > 0) read_block<kRead>(p.columns[first_block + i], k, b[i]);
      }
      if (dropout) {
#pragma unroll
        for (int i = 0; i < kMI * 2; ++i) {
          a[i / 2][i % 2] = drop(a[i / 2][i % 2], seed, p.threshold, k, rows[i / 2][i % 2]);
        }
      }
#pragma unroll
      for (int n8 = 0; n8 < 2 * kBlocks; ++n8) {
        if (n8 / 2 >= blocks) continue;
        const uint4 v = b[n8 / 2][n8 % 2];
#pragma unroll
        for (int mi = 0; mi < kMI; ++mi) {
          const uint4 top = a[mi][0], bottom = a[mi][1];
          const uint32_t even[4] = {top.x, bottom.x, top.y, bottom.y};
          const uint32_t odd[4] = {top.z, bottom.z, top.w, bottom.w};
          multiply<T>(acc[mi][n8], even, v.x, v.y);
          multiply<T>(acc[mi][n8], odd, v.z, v.w);
        }
      }
    }
  }

  __device__ void run(float* sums) {  // [kWarps][kRows][kPitch]
    allow_dependents();
    if (first >= count) return;
    const bool is_float = p.flags & kAdapterFloat, pairs = p.flags & kPairsAdapter;
    if (p.flags & kVectorAdapter) {
      is_float ? multiply_all<Read::kVectorFloat>() : multiply_all<Read::kVector>();
    } else if (pairs) {
      is_float ? multiply_all<Read::kPairsFloat>() : multiply_all<Read::kPairs>();
    } else {
      multiply_all<Read::kSingly>();
    }
#pragma unroll
    for (int n8 = 0; n8 < 2 * kBlocks; ++n8) {
      if (n8 / 2 >= blocks) continue;
#pragma unroll
      for (int i = 0; i < kMI * 2; ++i) {
        float* row = sums + (warp * kRows + i / 2 * 16 + i % 2 * 8 + g) * kPitch + n8 / 2 * 16;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = 2 * t + j;
          row[pairs ? 2 * column + n8 % 2 : n8 % 2 * 8 + column] = acc[i / 2][n8][i % 2 * 2 + j];
        }
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
};

template <typename T, int kMI, bool kFast>
__device__ __forceinline__ void shrink(const ShrinkParams& p) {
  extern __shared__ __align__(16) float sums[];
  Shrink<T, kMI, kFast>(p).run(sums);
}

}  // namespace
}  // namespace alora

#define ALORA_SHRINK(type)                                                                 \
  ALORA_KERNEL(masked_lora_shrink_##type##_vector_32_kernel, alora::ShrinkParams, 256, 1,  \
               alora::shrink<alora::type, 2, true>)                                        \
  ALORA_KERNEL(masked_lora_shrink_##type##_vector_16_kernel, alora::ShrinkParams, 256, 2,  \
               alora::shrink<alora::type, 1, true>)                                        \
  ALORA_KERNEL(masked_lora_shrink_##type##_strided_16_kernel, alora::ShrinkParams, 256, 2, \
               alora::shrink<alora::type, 1, false>)

ALORA_SHRINK(bf16)
ALORA_SHRINK(fp16)
