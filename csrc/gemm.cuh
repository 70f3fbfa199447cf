// gemm: out = left · right + bias + active ⊙ (keep ⊙ (low · up) + lora_bias_scale · lora_bias)
//
//   left [M, K], right [K, N], low [M, R], up [R, N], down [R, K], out [M, N]
//   forward: left = x, right = weightᵀ, up = lora_bᵀ, down = lora_a
//   dx:      left = dy, right = weight, up = lora_a, down = lora_bᵀ
//
// tail:    `low` (xa or dya) was written by shrink. The ring of the main loop first carries the R
//          steps of low and up, into the same accumulators; dropout's mask (a function of the row
//          and of out's column) then acts on them alone, and the K steps follow.
// onepass: the main loop also multiplies left by downᵀ, sixteen columns for each warp of a row of
//          warps. After it low = scale · left · downᵀ is rounded, selected by row, put where a
//          stage's left tile lies, and multiplied by up like any other step.
//
// Schedule: 256 threads, eight warps as 2 × 4; each owns 16·kMI × 32 of the tile 32·kMI × 128.
// A ring of four stages of 32 steps is filled by cp.async three stages ahead. Tiles without an
// active row skip all R steps. Blocks walk the tiles in groups of eight row tiles for L2 reuse.
//
// Shared memory: 4 × (left 32·kMI × 64 B, right 8 KiB, onepass: down 4 KiB), then reused as the
// out tile [32·kMI][128]. All tiles are swizzled so that ldmatrix and the copies are free of bank
// conflicts.
#pragma once

#include "common.cuh"

namespace alora {

enum class Layout { kNK, kKN, kStrided };  // right: K contiguous, N contiguous, anything

template <typename T, Layout kLayout, int kMI, bool kOnePass>
struct Gemm {
  static constexpr int kThreads = 256, kWarpsN = 4, kNI = 4;
  static constexpr int kBlockM = 32 * kMI, kBlockN = 128, kBlockK = 32, kStages = 4;
  static constexpr int kMaxOnePassR = 16 * kWarpsN;
  static constexpr uint32_t kLeftBytes = kBlockM * kBlockK * 2, kRightBytes = kBlockN * kBlockK * 2;
  static constexpr uint32_t kDownBytes = kOnePass ? kMaxOnePassR * kBlockK * 2 : 0;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes + kDownBytes;
  static constexpr uint32_t kRingBytes = kStages * kStageBytes;
  static constexpr uint32_t kSharedBytes = kRingBytes + 16;  // and the active words
  static_assert(kBlockM * kBlockN * 2 <= kRingBytes, "the out tile reuses the ring");
  static_assert(kSharedBytes <= 99 * 1024, "must fit the 99 KiB of sm_86, sm_89 and sm_120");
  static_assert(kMaxOnePassR <= 2 * kBlockK, "onepass keeps low in two stages");

  const GemmParams& p;
  const uint32_t ring;
  uint32_t* const active;  // shared [kMI]: one bit for each row of the tile
  const int tid, lane, warp_m, warp_n;
  int m0, n0;
  float acc[kMI][kNI][4] = {};
  float low_acc[kOnePass ? kMI : 1][2][4] = {};
  float4 held[2];  // a chunk of a float32 `down` on its way
  static constexpr int kLeftChunks = (kBlockM * 4 + kThreads - 1) / kThreads;
  static constexpr int kRightChunks = kBlockN * 4 / kThreads;
  const T *left_next[kLeftChunks], *right_next[kRightChunks];
  bool left_valid[kLeftChunks], right_valid[kRightChunks];

  __device__ Gemm(const GemmParams& params, uint32_t shared, uint32_t* active_words)
      : p(params),
        ring(shared),
        active(active_words),
        tid(threadIdx.x),
        lane(threadIdx.x % 32),
        warp_m(threadIdx.x / 32 / kWarpsN),
        warp_n(threadIdx.x / 32 % kWarpsN) {
    constexpr int kGroup = 8;
    const int tiles_m = (p.m + kBlockM - 1) / kBlockM, tiles_n = (p.n + kBlockN - 1) / kBlockN;
    const int per_group = kGroup * tiles_n, group = blockIdx.x / per_group;
    const int size = min(tiles_m - group * kGroup, kGroup), rest = blockIdx.x % per_group;
    m0 = (group * kGroup + rest % size) * kBlockM;
    n0 = rest / size * kBlockN;
  }

  __device__ uint32_t left_tile(int slot) const { return ring + slot * kStageBytes; }
  __device__ uint32_t right_tile(int slot) const { return left_tile(slot) + kLeftBytes; }
  __device__ uint32_t down_tile(int slot) const { return right_tile(slot) + kRightBytes; }
  __device__ bool has(uint32_t flag) const { return p.flags & flag; }
  __device__ bool is_active(int row) const { return active[row / 32] >> (row & 31) & 1; }

  __device__ bool find_active() {
    if (tid < kBlockM) {
      const int m = m0 + tid;
      const bool on = m < p.m && p.row_adapter[min(m, p.m - 1)] >= 0;
      const uint32_t word = __ballot_sync(~0u, on);
      if (lane == 0) active[tid / 32] = word;
    }
    __syncthreads();
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kMI; ++i) any |= active[i];
    return any != 0;
  }

  // Active rows of `low`, 32 columns from r0.
  __device__ void load_low(uint32_t tile, int r0) {
    const int columns = (p.r + 15) / 16 * 16;
#pragma unroll 1
    for (int i = tid; i < kBlockM * 4; i += kThreads) {
      const int row = i / 4, r = r0 + i % 4 * 8;
      const bool valid = is_active(row) && r < columns;
      const T* src = static_cast<const T*>(p.low) + (valid ? (m0 + row) * p.low_m + r : 0);
      copy_async(tile + swizzle64(row, i % 4), src, valid);
    }
  }

  // One element of a right tile, at step k of the stage and column n of the tile.
  __device__ uint32_t right_at(uint32_t tile, int k, int n) const {
    if constexpr (kLayout == Layout::kKN) return tile + swizzle<256>(k, n / 8) + n % 8 * 2;
    return tile + swizzle64(n, k / 8) + k % 8 * 2;
  }

  __device__ void load_up(uint32_t tile, int r0) {
    constexpr bool kAlongN = kLayout == Layout::kKN;
    if (has(kVectorUp)) {
#pragma unroll 1
      for (int i = tid; i < kBlockN * kBlockK / 8; i += kThreads) {
        const int k = kAlongN ? i / 16 : i % 4 * 8, n = kAlongN ? i % 16 * 8 : i / 4;
        copy_adapter<T>(right_at(tile, k, n), p.up, (r0 + k) * p.up_r + (n0 + n) * p.up_n,
                        r0 + k < p.r && n0 + n < p.n, has(kAdapterFloat));
      }
      return;
    }
#pragma unroll 4
    for (int i = tid; i < kBlockN * kBlockK; i += kThreads) {
      const int k = kAlongN ? i / kBlockN : i % kBlockK, n = kAlongN ? i % kBlockN : i / kBlockK;
      T v = from_float<T>(0.f);
      if (r0 + k < p.r && n0 + n < p.n) {
        v = adapter_at<T>(p.up, (r0 + k) * p.up_r + (n0 + n) * p.up_n, has(kAdapterFloat));
      }
      store_shared_element(right_at(tile, k, n), v);
    }
  }

  // Where this thread's chunks of the two main operands begin; load_main moves on from there.
  __device__ void start_main() {
    const T *left = static_cast<const T*>(p.left), *right = static_cast<const T*>(p.right);
#pragma unroll
    for (int i = 0; i < kLeftChunks; ++i) {
      const int row = tid / 4 + i * (kThreads / 4);
      left_valid[i] = row < kBlockM && m0 + row < p.m;
      left_next[i] = left + (m0 + row) * p.left_m + tid % 4 * 8;
    }
#pragma unroll
    for (int i = 0; i < kRightChunks; ++i) {
      if constexpr (kLayout == Layout::kKN) {
        const int row = tid / 16 + i * (kThreads / 16), n = n0 + tid % 16 * 8;
        right_valid[i] = n < p.n;
        right_next[i] = right + row * p.right_k + n;
      } else {
        const int row = tid / 4 + i * (kThreads / 4);
        right_valid[i] = n0 + row < p.n;
        right_next[i] = right + (n0 + row) * p.right_n + tid % 4 * 8;
      }
    }
  }

  // The next 32 steps of K, from k0 on. A copy of an invalid chunk writes zeros and reads nothing.
  __device__ void load_main(int slot, int k0) {
    if constexpr (kLayout == Layout::kStrided) {
      load_strided(slot, k0);
    } else {
      const bool inside = k0 + tid % 4 * 8 < p.k;
#pragma unroll
      for (int i = 0; i < kLeftChunks; ++i) {
        const int row = tid / 4 + i * (kThreads / 4);
        if (kBlockM % (kThreads / 4) == 0 || row < kBlockM) {
          copy_async(left_tile(slot) + swizzle64(row, tid % 4), left_next[i],
                     left_valid[i] && inside);
        }
        left_next[i] += kBlockK;
      }
#pragma unroll
      for (int i = 0; i < kRightChunks; ++i) {
        if constexpr (kLayout == Layout::kKN) {
          const int row = tid / 16 + i * (kThreads / 16);
          copy_async(right_tile(slot) + swizzle<256>(row, tid % 16), right_next[i],
                     right_valid[i] && k0 + row < p.k);
          right_next[i] += kBlockK * p.right_k;
        } else {
          const int row = tid / 4 + i * (kThreads / 4);
          copy_async(right_tile(slot) + swizzle64(row, tid % 4), right_next[i],
                     right_valid[i] && inside);
          right_next[i] += kBlockK;
        }
      }
    }
  }

  __device__ void load_strided(int slot, int k0) {
    const T *left = static_cast<const T*>(p.left), *right = static_cast<const T*>(p.right);
#pragma unroll 1
    for (int i = tid; i < kBlockM * 4; i += kThreads) {
      const int m = m0 + i / 4, k = k0 + i % 4 * 8, valid = m < p.m ? p.k - k : 0;
      store_shared(left_tile(slot) + swizzle64(i / 4, i % 4),
                   gather(left + m * p.left_m + k * p.left_k, p.left_k, valid));
    }
#pragma unroll 1
    for (int i = tid; i < kBlockN * 4; i += kThreads) {
      const int n = n0 + i / 4, k = k0 + i % 4 * 8, valid = n < p.n ? p.k - k : 0;
      store_shared(right_tile(slot) + swizzle64(i / 4, i % 4),
                   gather(right + n * p.right_n + k * p.right_k, p.right_k, valid));
    }
  }

  // `down` for onepass: one chunk of eight for each thread. What cannot go by cp.async is fetched
  // before the products of the current stage and stored after them.
  __device__ bool down_waits() const { return has(kVectorAdapter) && has(kAdapterFloat); }
  __device__ void fetch_down(int slot, int k0) {
    const int r = tid / 4, k = k0 + tid % 4 * 8;
    const bool valid = r < p.r && k < p.k;
    const uint32_t at = down_tile(slot) + swizzle64(r, tid % 4);
    if (down_waits()) {
      const float4* src = reinterpret_cast<const float4*>(static_cast<const float*>(p.down) +
                                                          (valid ? r * p.down_r + k : 0));
      held[0] = held[1] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (valid) held[0] = src[0], held[1] = src[1];
    } else if (has(kVectorAdapter)) {
      copy_async(at, static_cast<const T*>(p.down) + (valid ? r * p.down_r + k : 0), valid);
    } else {
      store_shared(at, gather_adapter<T>(p.down, r * p.down_r + k * p.down_k, p.down_k,
                                         valid ? p.k - k : 0, has(kAdapterFloat)));
    }
  }
  __device__ void store_down(int slot) {
    if (!down_waits()) return;
    store_shared(down_tile(slot) + swizzle64(tid / 4, tid % 4),
                 make_uint4(pack<T>(held[0].x, held[0].y), pack<T>(held[0].z, held[0].w),
                            pack<T>(held[1].x, held[1].y), pack<T>(held[1].z, held[1].w)));
  }

  // acc += left tile · right tile of one stage; with `low`, low_acc += left tile · down tileᵀ.
  __device__ void multiply_stage(int slot, bool low) {
    const uint32_t left = left_tile(slot), right = right_tile(slot);
#pragma unroll
    for (int half = 0; half < kBlockK / 16; ++half) {
      uint32_t a[kMI][4];
#pragma unroll
      for (int mi = 0; mi < kMI; ++mi) {
        const int row = (warp_m * kMI + mi) * 16 + lane % 16;
        load_matrices(a[mi], left + swizzle64(row, half * 2 + lane / 16));
      }
      // Rows of a K-contiguous operand that this lane addresses, and its chunk.
      const int row = (lane & 7) + (lane >> 4) * 8, chunk = half * 2 + (lane >> 3 & 1);
#pragma unroll
      for (int pair = 0; pair < kNI / 2; ++pair) {
        uint32_t b[4];
        const int n = warp_n * 32 + pair * 16;
        if constexpr (kLayout == Layout::kKN) {
          const int k = half * 16 + (lane & 15);
          load_matrices_transposed(b, right + swizzle<256>(k, n / 8 + lane / 16));
        } else {
          load_matrices(b, right + swizzle64(n + row, chunk));
        }
#pragma unroll
        for (int mi = 0; mi < kMI; ++mi) {
          multiply<T>(acc[mi][2 * pair], a[mi], b[0], b[1]);
          multiply<T>(acc[mi][2 * pair + 1], a[mi], b[2], b[3]);
        }
      }
      if constexpr (kOnePass) {
        if (low && warp_n * 16 < p.r) {
          uint32_t b[4];
          load_matrices(b, down_tile(slot) + swizzle64(warp_n * 16 + row, chunk));
#pragma unroll
          for (int mi = 0; mi < kMI; ++mi) {
            multiply<T>(low_acc[mi][0], a[mi], b[0], b[1]);
            multiply<T>(low_acc[mi][1], a[mi], b[2], b[3]);
          }
        }
      }
    }
  }

  // acc is zero where dropout drops (row, column of out). Two bits for each pair are gathered in a
  // rolled loop, because the unrolled one would be two thousand instructions.
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

  // onepass: low, selected and rounded, to the left tiles of the first stages and to low_out.
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
      store_shared(left_tile(column / 32) + swizzle64(row, column % 32 / 8) + column % 8 * 2, two);
      if (on && p.low_out != nullptr && n0 == 0 && warp_n * 16 < p.r) {
        T* at = static_cast<T*>(p.low_out) + (m0 + row) * p.low_out_m + column;
        *reinterpret_cast<uint32_t*>(at) = two;
      }
    }
  }

  // Bias, selection and rounding; rows leave through shared memory in 16-byte pieces.
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

  __device__ void run() {
    const bool any = find_active();
    const bool low = any && p.up != nullptr;
    const int low_steps = !kOnePass && low ? (p.r + kBlockK - 1) / kBlockK : 0;
    const int main_steps = has(kActiveOnly) && !any ? 0 : (p.k + kBlockK - 1) / kBlockK;
    const int steps = low_steps + main_steps;
    const auto load = [&](int step) {
      const int slot = step % kStages;
      if (step < low_steps) {
        load_low(left_tile(slot), step * kBlockK);
        load_up(right_tile(slot), step * kBlockK);
      } else if (step < steps) {
        load_main(slot, (step - low_steps) * kBlockK);
        if constexpr (kOnePass) {
          if (low) fetch_down(slot, (step - low_steps) * kBlockK);
        }
      }
      commit_copies();
    };
    const auto settle = [&](int step) {
      if constexpr (kOnePass) {
        if (low && step < steps) store_down(step % kStages);
      }
    };
    start_main();
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      load(step);
      settle(step);
    }
    int step = 0;
#pragma unroll 1
    for (; step < low_steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      multiply_stage(step % kStages, false);
    }
    if (low_steps > 0 && has(kDropout)) drop_low_product();
    // The rest is the main loop: nothing but copies of K steps, fragments and products.
    int slot = step % kStages, next = (step + kStages - 1) % kStages;
    int k0 = (step + kStages - 1 - low_steps) * kBlockK;
#pragma unroll 1
    for (; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const bool more = k0 < p.k;
      if (more) {
        load_main(next, k0);
        if constexpr (kOnePass) {
          if (low) fetch_down(next, k0);
        }
      }
      commit_copies();
      multiply_stage(slot, low);
      if constexpr (kOnePass) {
        if (low && more) store_down(next);
      }
      k0 += kBlockK;
      slot = slot + 1 == kStages ? 0 : slot + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    wait_copies<0>();
    if constexpr (kOnePass) {
      if (low) {
        __syncthreads();
        place_low();
        for (int piece = 0; piece * kBlockK < p.r; ++piece) {
          load_up(right_tile(piece), piece * kBlockK);
        }
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        for (int piece = 0; piece * kBlockK < p.r; ++piece) multiply_stage(piece, false);
      }
    }
    finish();
  }
};

template <typename T, Layout kLayout, int kMI, bool kOnePass>
__device__ __forceinline__ void gemm(const GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using Kernel = Gemm<T, kLayout, kMI, kOnePass>;
  Kernel(p, shared_address(shared), reinterpret_cast<uint32_t*>(shared + Kernel::kRingBytes)).run();
}

}  // namespace alora
