// gemm: out = left · right + bias + active ⊙ (keep ⊙ (low · up) + lora_bias_scale · lora_bias)
//
//   left [M, K], right [K, N], low [M, R], up [R, N], down [R, K], out [M, N]
//   forward: left = x, right = weightᵀ, up = lora_bᵀ, down = lora_a
//   dx:      left = dy, right = weight, up = lora_a, down = lora_bᵀ
//
// tail:    shrink has written `low` (xa or dya). The ring of the main loop carries the R steps of
//          low and up first, into the same accumulators. Then dropout's mask, which depends on the
//          row and on out's column, is applied to the accumulators. The K steps follow.
// onepass: the main loop also multiplies left by downᵀ, sixteen columns for each of the four warps
//          in a row of warps. Afterwards low = scale · left · downᵀ is rounded and selected by row.
//          It is written into the left tiles of the first stages, and multiplied by up like any
//          other step.
//
// Schedule: 256 threads, eight warps as 2 × 4; each computes 16·kMI × 32 of the tile 32·kMI × 128.
// cp.async fills a ring of four stages of 32 steps, three stages ahead. Tiles without an active row
// skip all R steps. Blocks take the tiles in groups of eight row tiles, so that L2 is reused.
//
// Shared memory: gemm_operands.cuh; the ring is reused as the out tile [32·kMI][128].
#pragma once

#include "gemm_operands.cuh"

namespace alora {

template <typename T, int kMI>
struct Gemm : GemmOperands<T, kMI> {
  using Operands = GemmOperands<T, kMI>;
  using Operands::kBlockK, Operands::kBlockM, Operands::kBlockN, Operands::kLeftBytes;
  using Operands::kStageBytes, Operands::kStages, Operands::kThreads;
  using Operands::lane, Operands::m0, Operands::n0, Operands::p, Operands::ring, Operands::tid;
  using Operands::stage_at, Operands::down_tile, Operands::has, Operands::is_active;
  static constexpr int kWarpsN = 4, kNI = 4;
  static_assert(Operands::kMaxOnePassR == 16 * kWarpsN, "sixteen columns of low for each warp");

  const int warp_m, warp_n;
  float acc[kMI][kNI][4] = {};
  float low_acc[kMI][2][4] = {};

  __device__ Gemm(const GemmParams& params, uint8_t* shared)
      : Operands(params, shared),
        warp_m(threadIdx.x / 32 / kWarpsN),
        warp_n(threadIdx.x / 32 % kWarpsN) {}

  // acc += left tile · right tile of one stage; with kLow, also low_acc += left tile · down tileᵀ.
  // The addresses use two properties of the swizzle. It is the same sixteen rows further on (along
  // N: sixteen steps). And the other half of the 32 steps (along N: of a warp's columns) is two
  // chunks away, which is a plain xor of the address.
  template <Layout kLayout, bool kLow>
  __device__ void multiply_stage(uint32_t stage) {
    constexpr bool kAlongN = kLayout == Layout::kKN;
    // The row and the chunk that this lane addresses in a K-contiguous operand.
    const int row = (lane & 7) + (lane >> 4) * 8, chunk = lane >> 3 & 1;
    const uint32_t left = swizzle64(warp_m * kMI * 16 + lane % 16, lane / 16);
    const uint32_t right = kAlongN ? swizzle<256>(lane & 15, warp_n * 4 + lane / 16)
                                   : swizzle64(warp_n * 32 + row, chunk);
#pragma unroll
    for (int half = 0; half < kBlockK / 16; ++half) {
      uint32_t a[kMI][4];
#pragma unroll
      for (int mi = 0; mi < kMI; ++mi) {
        load_matrices(a[mi], stage + (left ^ half * 32) + mi * 1024);
      }
#pragma unroll
      for (int pair = 0; pair < kNI / 2; ++pair) {
        uint32_t b[4];
        if constexpr (kAlongN) {
          load_matrices_transposed(b, stage + (right ^ pair * 32) + kLeftBytes + half * 4096);
        } else {
          load_matrices(b, stage + (right ^ half * 32) + kLeftBytes + pair * 1024);
        }
#pragma unroll
        for (int mi = 0; mi < kMI; ++mi) {
          multiply<T>(acc[mi][2 * pair], a[mi], b[0], b[1]);
          multiply<T>(acc[mi][2 * pair + 1], a[mi], b[2], b[3]);
        }
      }
      if constexpr (kLow) {
        if (warp_n * 16 < p.r) {
          uint32_t b[4];
          load_matrices(b, down_tile(stage) + swizzle64(warp_n * 16 + row, half * 2 + chunk));
#pragma unroll
          for (int mi = 0; mi < kMI; ++mi) {
            multiply<T>(low_acc[mi][0], a[mi], b[0], b[1]);
            multiply<T>(low_acc[mi][1], a[mi], b[2], b[3]);
          }
        }
      }
    }
  }

  // Sets acc to zero where dropout drops (row, column of out). A rolled loop collects two bits for
  // each pair first: unrolled, the loop would have two thousand instructions.
  __device__ void drop_low_product() {
    const int64_t seed = *p.seed;
    uint32_t keep[2] = {};
#pragma unroll 1
    for (int i = 0; i < kMI * kNI * 2; ++i) {
      const int row = (warp_m * kMI + i / (kNI * 2)) * 16 + i % 2 * 8 + lane / 4;
      const int column = n0 + warp_n * 32 + i / 2 % kNI * 8 + lane % 4 * 2;
      const uint4 w = philox(seed, column / 4, m0 + row);
      const uint32_t first = lane & 1 ? w.z : w.x, second = lane & 1 ? w.w : w.y;
      const uint32_t two = (first >= p.threshold ? 1u : 0u) | (second >= p.threshold ? 2u : 0u);
      if (i < 16) {
        keep[0] |= two << 2 * i;
      } else {
        keep[1] |= two << 2 * (i - 16);
      }
    }
#pragma unroll
    for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
      for (int j = 0; j < kNI * 4; ++j) {
        const uint32_t kept = keep[mi / 2] >> (mi % 2 * kNI * 4 + j) & 1;
        acc[mi][j / 4][j % 4] = kept ? acc[mi][j / 4][j % 4] : 0.f;
      }
    }
  }

  // onepass: writes low, selected and rounded, to the left tiles of the first stages and to
  // low_out.
  __device__ void place_low() {
#pragma unroll
    for (int i = 0; i < kMI * 4; ++i) {
      const int mi = i / 4, ni = i / 2 % 2, half = i % 2;
      const int row = (warp_m * kMI + mi) * 16 + half * 8 + lane / 4;
      const int column = warp_n * 16 + ni * 8 + lane % 4 * 2;
      const bool on = is_active(row);
      const uint32_t two =
          on ? pack<T>(low_acc[mi][ni][half * 2] * p.scale, low_acc[mi][ni][half * 2 + 1] * p.scale)
             : 0u;
      store_shared(stage_at(column / 32) + swizzle64(row, column % 32 / 8) + column % 8 * 2, two);
      if (on && p.low_out != nullptr && n0 == 0 && warp_n * 16 < p.r) {
        T* at = static_cast<T*>(p.low_out) + (m0 + row) * p.low_out_m + column;
        *reinterpret_cast<uint32_t*>(at) = two;
      }
    }
  }

  // The epilogue: adds biases, selects and rounds. Rows are written through shared memory in
  // 16-byte pieces.
  __device__ void finish() {
    __syncthreads();
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
      const int column = warp_n * 32 + ni * 8 + lane % 4 * 2, n = n0 + column;
      float bias[2] = {}, extra[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (n + j >= p.n) continue;
        if (p.bias != nullptr) bias[j] = to_float(static_cast<const T*>(p.bias)[n + j]);
        if (p.lora_bias != nullptr) {
          extra[j] =
              p.lora_bias_scale * to_float(adapter_at<T>(p.lora_bias, n + j, has(kAdapterFloat)));
        }
      }
#pragma unroll
      for (int i = 0; i < kMI * 2; ++i) {
        const int mi = i / 2, half = i % 2;
        const int row = (warp_m * kMI + mi) * 16 + half * 8 + lane / 4, m = m0 + row;
        const bool on = is_active(row);
        float v[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          v[j] = acc[mi][ni][half * 2 + j] + bias[j];
          v[j] = on ? v[j] + extra[j] : v[j];
          if (has(kActiveOnly)) v[j] = on ? v[j] : 0.f;
          if (has(kAdd) && m < p.m && n + j < p.n) {
            v[j] += to_float(static_cast<const T*>(p.out)[m * p.out_m + n + j]);
          }
        }
        store_shared(ring + swizzle<256>(row, column / 8) + column % 8 * 2, pack<T>(v[0], v[1]));
      }
    }
    __syncthreads();
#pragma unroll 2
    for (int i = tid; i < kBlockM * 16; i += kThreads) {
      const int m = m0 + i / 16, n = n0 + i % 16 * 8;
      if (m >= p.m || n >= p.n) continue;
      const uint4 v = load_shared(ring + swizzle<256>(i / 16, i % 16));
      T* at = static_cast<T*>(p.out) + m * p.out_m + n;
      if (has(kVectorOut) && n + 8 <= p.n) {
        *reinterpret_cast<uint4*>(at) = v;
      } else {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (n + j >= p.n) continue;
          reinterpret_cast<uint16_t*>(at)[j] =
              static_cast<uint16_t>(j % 2 ? words[j / 2] >> 16 : words[j / 2]);
        }
      }
    }
  }

  // All products of the tile. In tail, the ring carries the R steps first. With kLow (onepass, in a
  // tile with active rows) the R steps come last, from low_acc.
  template <Layout kLayout, bool kLow>
  __device__ void accumulate(int low_steps, int main_steps) {
    const int steps = low_steps + main_steps;
    const auto load = [&](int step) {
      const uint32_t stage = stage_at(step % kStages);
      const int k0 = (step - low_steps) * kBlockK;
      if (step < low_steps) {
        this->load_low(stage, step * kBlockK);
        this->template load_up<kLayout>(stage + kLeftBytes, step * kBlockK);
      } else if (step < steps) {
        this->template load_main<kLayout>(stage, k0);
        if (kLow) this->fetch_down(stage, k0);
      }
      commit_copies();
    };
    this->template start_main<kLayout>();
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      load(step);
      if (kLow && step < steps) this->store_down(stage_at(step));
    }
#pragma unroll 1
    for (int step = 0; step < low_steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      multiply_stage<kLayout, false>(stage_at(step % kStages));
    }
    if (low_steps > 0 && has(kDropout)) drop_low_product();
    // The main loop has only copies of K steps, fragment loads and products. Copies past the end of
    // K write zeros that nobody reads.
    constexpr int kAhead = (kStages - 1) * kBlockK;
    const int end = main_steps > 0 ? p.k + kAhead : 0;
    uint32_t stage = stage_at(low_steps % kStages),
             next = stage_at((low_steps + kStages - 1) % kStages);
#pragma unroll 1
    for (int k0 = kAhead; k0 < end; k0 += kBlockK) {
      wait_copies<kStages - 2>();
      __syncthreads();
      if (kLayout != Layout::kStrided || k0 < p.k) this->template load_main<kLayout>(next, k0);
      if (kLow && k0 < p.k) this->fetch_down(next, k0);
      commit_copies();
      multiply_stage<kLayout, kLow>(stage);
      if (kLow && k0 < p.k) this->store_down(next);
      next = stage;
      stage = stage + kStageBytes == stage_at(kStages) ? ring : stage + kStageBytes;
    }
    wait_copies<0>();
    if constexpr (kLow) {
      __syncthreads();
      place_low();
      for (int piece = 0; piece * kBlockK < p.r; ++piece) {
        this->template load_up<kLayout>(stage_at(piece) + kLeftBytes, piece * kBlockK);
      }
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      for (int piece = 0; piece * kBlockK < p.r; ++piece) {
        multiply_stage<kLayout, false>(stage_at(piece));
      }
    }
  }

  template <Layout kLayout>
  __device__ void accumulate() {
    const bool any = this->find_active(), low = any && p.up != nullptr;
    const int main_steps = has(kActiveOnly) && !any ? 0 : (p.k + kBlockK - 1) / kBlockK;
    if (low && has(kOnePass)) {
      accumulate<kLayout, true>(0, main_steps);
    } else {
      accumulate<kLayout, false>(low ? (p.r + kBlockK - 1) / kBlockK : 0, main_steps);
    }
  }

  __device__ void run() {
    if (has(kAlongN)) {
      accumulate<Layout::kKN>();
    } else if (has(kStrided)) {
      accumulate<Layout::kStrided>();
    } else {
      accumulate<Layout::kNK>();
    }
    finish();
  }
};

template <typename T, int kMI>
__device__ __forceinline__ void gemm(const GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Gemm<T, kMI>(p, shared).run();
}

}  // namespace alora
