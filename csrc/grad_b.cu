// grad_b: computes dB and dya in one pass over the active rows of dy
//   part[g, n, r] = Σ dy[row, n] · low[row, r] over the rows of split g          (dB = Σ_g part)
//   low_part[h, slot, r] = Σ dy[row, n] · up[n, r] over the columns of slice h   (dya = scale ·
//   Σ_h)
//
//   dy [M, N] with rows of 16-byte pieces, low = xa [M, R16], up = lora_b [N, R], R16 ≤ 32
//   part [G, N, R16] float, low_part [H, slots, R16] float; reduce adds both in order
//
// Schedule: block (h, g) computes 512 columns and the rows of split g; each of its eight warps has
// 64 columns. cp.async fills a ring of three stages of 16 gathered rows; the row numbers are read
// one stage ahead. Each stage is read twice: transposed for dB, whose 512 × 32 sums stay in
// registers, and plain for dya, whose operand `up` stays in registers. Each warp writes its share
// of dya to shared memory in the layout of the tensor cores. After the next barrier of the ring the
// shares are added in the order of the warps. Two buffers for the shares make one barrier per stage
// enough.
//
// Shared memory: 3 × (dy [16][512] 16 KiB, low [16][32] 1 KiB), 2 × dya [8][16][32] float 16 KiB.
#include "common.cuh"
#include "registry.h"

namespace alora {
namespace {

template <typename T>
struct GradB {
  static constexpr int kStages = 3, kRows = 16, kN = 512, kR = 32, kThreads = 256, kWarps = 8;
  static constexpr int kOwn = kN / kWarps, kMT = kOwn / 16, kNT = kR / 8;
  static constexpr int kChunks = kRows * kN / 8 / kThreads;
  static constexpr uint32_t kDyBytes = kRows * kN * 2, kStageBytes = kDyBytes + kRows * kR * 2;
  static constexpr int kShare = kRows * kR / 2;  // pairs of one warp's share of dya
  static_assert(kShare == kThreads, "each thread adds up one pair of dya");

  const GradBParams& p;
  const uint32_t ring;
  float2* const shares;  // [2][kWarps][kShare]
  const int tid, lane, warp, n0, first, last, steps;
  int rows[kChunks], low_row;
  uint32_t up[kMT][kNT][2];  // the right operand of dya, in pieces of sixteen columns × eight ranks
  float acc[kMT][kNT][4] = {};

  __device__ GradB(const GradBParams& params, uint8_t* shared)
      : p(params),
        ring(shared_address(shared)),
        shares(reinterpret_cast<float2*>(shared + kStages * kStageBytes)),
        tid(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        n0(blockIdx.x * kN),
        first(blockIdx.y * params.split_rows),
        last(min(*params.active_count, first + params.split_rows)),
        steps((last - first + kRows - 1) / kRows) {}

  __device__ void load_up() {
    const bool is_float = p.flags & kAdapterFloat;
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) {
#pragma unroll
      for (int i = 0; i < kNT * 2; ++i) {
        const int n = n0 + warp * kOwn + mt * 16 + i % 2 * 8 + lane % 4 * 2;
        const int r = i / 2 * 8 + lane / 4;
        uint32_t pair = 0;
        if (r < p.r && n < p.n) {  // N is even
          const int64_t at = n * p.up_n + r * p.up_r;
          pair = bits(adapter_at<T>(p.up, at, is_float)) |
                 bits(adapter_at<T>(p.up, at + p.up_n, is_float)) << 16;
        }
        up[mt][i / 2][i % 2] = pair;
      }
    }
  }

  __device__ void find_rows(int step) {
    const int begin = first + step * kRows;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int slot = begin + tid / 64 + i * (kThreads / 64);
      rows[i] = slot < last ? p.active_rows[slot] : -1;
    }
    low_row = tid < kRows * 4 && begin + tid / 4 < last ? p.active_rows[begin + tid / 4] : -1;
  }

  __device__ void load(int step) {
    if (step < steps) {
      const uint32_t dy = ring + step % kStages * kStageBytes;
      const int n = n0 + tid % 64 * 8;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const bool valid = rows[i] >= 0 && n < p.n;
        copy_async(dy + swizzle<kN * 2>(tid / 64 + i * (kThreads / 64), tid % 64),
                   static_cast<const T*>(p.dy) + (valid ? rows[i] * p.dy_m + n : 0), valid);
      }
      if (tid < kRows * 4) {
        const bool valid = low_row >= 0 && tid % 4 * 8 < p.r16;
        copy_async(dy + kDyBytes + swizzle64(tid / 4, tid % 4),
                   static_cast<const T*>(p.low) + (valid ? low_row * p.low_m + tid % 4 * 8 : 0),
                   valid);
      }
      find_rows(step + 1);
    }
    commit_copies();
  }

  // The products of this warp in one stage: acc += dyᵀ · low, and its share of dy · up.
  __device__ void multiply_step(int step) {
    const uint32_t dy = ring + step % kStages * kStageBytes, low = dy + kDyBytes;
    const int chunk = warp * (kOwn / 8);
    uint32_t b[kNT / 2][4];
#pragma unroll
    for (int pair = 0; pair < kNT / 2; ++pair) {
      load_matrices_transposed(b[pair], low + swizzle64(lane & 15, pair * 2 + lane / 16));
    }
    float share[kNT][4] = {};
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) {
      uint32_t turned[4], plain[4];
      load_matrices_transposed(turned, dy + swizzle<kN * 2>((lane & 7) + (lane >> 4) * 8,
                                                            chunk + mt * 2 + (lane >> 3 & 1)));
      load_matrices(plain, dy + swizzle<kN * 2>(lane % 16, chunk + mt * 2 + lane / 16));
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
        if (nt * 8 >= p.r16) continue;
        multiply<T>(acc[mt][nt], turned, b[nt / 2][nt % 2 * 2], b[nt / 2][nt % 2 * 2 + 1]);
        multiply<T>(share[nt], plain, up[mt][nt][0], up[mt][nt][1]);
      }
    }
    float2* to = shares + (step % 2 * kWarps + warp) * kShare + lane;
#pragma unroll
    for (int i = 0; i < kNT * 2; ++i) {
      to[i * 32] = make_float2(share[i / 2][i % 2 * 2], share[i / 2][i % 2 * 2 + 1]);
    }
  }

  // Adds the warps' shares of a stage. All warps must have finished its products.
  __device__ void add_shares(int step) {
    const float2* from = shares + step % 2 * kWarps * kShare + tid;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum.x += from[w * kShare].x;
      sum.y += from[w * kShare].y;
    }
    const int slot = first + step * kRows + tid / 32 % 2 * 8 + lane / 4;
    const int r = tid / 64 * 8 + lane % 4 * 2;
    if (slot >= last || r >= p.r16) return;
    float* at = p.low_part + (static_cast<int64_t>(blockIdx.x) * p.slots + slot) * p.r16 + r;
    *reinterpret_cast<float2*>(at) = sum;
  }

  __device__ void run() {
    if (first >= last) return;  // reduce does not read this part
    find_rows(0);
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) load(step);
    load_up();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      if (step > 0) add_shares(step - 1);
      multiply_step(step);
    }
    wait_copies<0>();
    __syncthreads();
    add_shares(steps - 1);
#pragma unroll
    for (int i = 0; i < kMT * 2; ++i) {
      const int n = n0 + warp * kOwn + i / 2 * 16 + i % 2 * 8 + lane / 4;
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
        const int r = nt * 8 + lane % 4 * 2;
        if (n >= p.n || r >= p.r16) continue;
        float* at = p.part + (static_cast<int64_t>(blockIdx.y) * p.n + n) * p.r16 + r;
        *reinterpret_cast<float2*>(at) =
            make_float2(acc[i / 2][nt][i % 2 * 2], acc[i / 2][nt][i % 2 * 2 + 1]);
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ void grad_b(const GradBParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  GradB<T>(p, shared).run();
}

}  // namespace
}  // namespace alora

ALORA_KERNEL(masked_lora_grad_b_bf16_kernel, alora::GradBParams, 256, 1, alora::grad_b<alora::bf16>)
ALORA_KERNEL(masked_lora_grad_b_fp16_kernel, alora::GradBParams, 256, 1, alora::grad_b<alora::fp16>)
