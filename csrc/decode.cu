// decode: out = x · weightᵀ + bias + active ⊙ (scale · (x · downᵀ) · up + lora_bias), M ≤ 16
//
//   x [M, K], weight [N, K], down = lora_a [R ≤ 64, K], up = lora_bᵀ [R, N], out [M, N]
//   `onepass` for a few rows. It reads weight once; that read takes nearly all of the time.
//
// Schedule: block (tile, s) computes 64 columns on slice s of K. Its eight warps take turns along
// the slice, 64 steps of K each. They read weight, x and down directly into tensor-core registers,
// in 16-byte pieces (the order of k inside a product is that of shrink.cu). The low-rank part is a
// sum over K too, so each slice adds scale · (its x · downᵀ) · up to its own float32 sum. The sums
// go to `part`. The block that arrives last at a tile's counter adds the slices in order, finishes
// the tile and sets the counter back to zero.
//
// Shared memory: sums of the warps [8][16][72] float 36 KiB, low [16][64] float 4 KiB.
#include "common.cuh"
#include "registry.h"

namespace alora {
namespace {

template <typename T>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  constexpr int kWarps = 8, kRows = 16, kN = 64, kPitch = 72, kTiles = kN / 8, kThreads = 256;
  constexpr int kOwn = kRows * kN / kThreads;  // elements of the tile that a thread finishes
  __shared__ __align__(16) float sums[kWarps * kRows * kPitch];
  __shared__ float low_sums[kRows * kN];
  __shared__ bool last;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int n0 = blockIdx.x * kN, begin = blockIdx.y * p.k_slice;
  const int end = min(p.k, begin + p.k_slice);
  const bool is_float = p.flags & kAdapterFloat, vector = p.flags & kVectorAdapter;
  const bool active = lane < p.m && p.row_adapter[min(lane, p.m - 1)] >= 0;
  const uint32_t rows_on = __ballot_sync(~0u, active);
  const bool low = rows_on != 0 && p.r > 0;

  float acc[kTiles][4] = {}, low_acc[kTiles][4] = {};
  const T *x = static_cast<const T*>(p.left), *weight = static_cast<const T*>(p.weight);
  const auto products = [&](float (&d)[4], const uint4(&a)[2], uint4 b) {
    const uint32_t even[4] = {a[0].x, a[1].x, a[0].y, a[1].y};
    const uint32_t odd[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
    multiply<T>(d, even, b.x, b.y);
    multiply<T>(d, odd, b.z, b.w);
  };
#pragma unroll 1
  for (int k0 = begin + warp * 64; k0 < end; k0 += kWarps * 64) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = k0 + half * 32 + 8 * t;
      const bool inside = k < end;
      uint4 a[2], b[kTiles];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i] = make_uint4(0, 0, 0, 0);
        if (inside && g + 8 * i < p.m) {
          a[i] = *reinterpret_cast<const uint4*>(x + (g + 8 * i) * p.left_m + k);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int n = n0 + j * 8 + g;
        b[j] = make_uint4(0, 0, 0, 0);
        if (inside && n < p.n) {
          b[j] = __ldcs(reinterpret_cast<const uint4*>(weight + n * p.weight_n + k));
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) products(acc[j], a, b[j]);
      if (!low) continue;
      uint4 v[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int r = j * 8 + g;
        v[j] = make_uint4(0, 0, 0, 0);
        if (j * 8 < p.r && inside && r < p.r) {
          const int64_t offset = r * p.down_r + k * p.down_k;
          v[j] = vector ? adapter_vector<T>(p.down, offset, is_float)
                        : gather_adapter<T>(p.down, offset, p.down_k, p.k - k, is_float);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j * 8 < p.r) products(low_acc[j], a, v[j]);
      }
    }
  }

  // A thread's own elements are column n of rows tid / 64 + 4 · i.
  const int own_n = tid % kN, n = n0 + own_n;
  const auto add_up = [&](const float (&d)[kTiles][4], float (&own)[kOwn]) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* at = sums + (warp * kRows + g + 8 * i) * kPitch + j * 8 + 2 * t;
        *reinterpret_cast<float2*>(at) = make_float2(d[j][2 * i], d[j][2 * i + 1]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        own[i] += sums[(w * kRows + tid / kN + 4 * i) * kPitch + own_n];
      }
    }
  };
  float own[kOwn];
  add_up(acc, own);
  if (low) {
    float own_low[kOwn];
    add_up(low_acc, own_low);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int m = tid / kN + 4 * i;
      low_sums[m * kN + own_n] = rows_on >> m & 1 ? own_low[i] * p.scale : 0.f;
    }
    __syncthreads();
    if (n < p.n) {
#pragma unroll 4
      for (int r = 0; r < p.r; ++r) {
        const float u = to_float(adapter_at<T>(p.up, r * p.up_r + n * p.up_n, is_float));
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int m = tid / kN + 4 * i;
          // Skips inactive rows, because `up` may be non-finite.
          if (rows_on >> m & 1) own[i] += low_sums[m * kN + r] * u;
        }
      }
    }
  }

  if (gridDim.y > 1) {
    const int64_t tile = kRows * kN, slice = gridDim.x * tile;
    float* mine = p.part + blockIdx.x * tile + tid;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) __stcg(mine + blockIdx.y * slice + i * kThreads, own[i]);
    __threadfence();
    __syncthreads();
    if (tid == 0) last = atomicAdd(p.arrived + blockIdx.x, 1) == static_cast<int>(gridDim.y) - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i] = 0.f;
    for (int s = 0; s < gridDim.y; ++s) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) own[i] += __ldcg(mine + s * slice + i * kThreads);
    }
    if (tid == 0) p.arrived[blockIdx.x] = 0;
  }
  if (n >= p.n) return;
  const float bias = p.bias == nullptr ? 0.f : to_float(static_cast<const T*>(p.bias)[n]);
  const float extra = p.lora_bias == nullptr
                          ? 0.f
                          : p.lora_bias_scale * to_float(adapter_at<T>(p.lora_bias, n, is_float));
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int m = tid / kN + 4 * i;
    if (m >= p.m) continue;
    const float v = own[i] + bias;
    static_cast<T*>(p.out)[m * p.out_m + n] = from_float<T>(rows_on >> m & 1 ? v + extra : v);
  }
}

}  // namespace
}  // namespace alora

ALORA_KERNEL(masked_lora_decode_bf16_kernel, alora::DecodeParams, 256, 1,
             alora::decode<alora::bf16>)
ALORA_KERNEL(masked_lora_decode_fp16_kernel, alora::DecodeParams, 256, 1,
             alora::decode<alora::fp16>)
