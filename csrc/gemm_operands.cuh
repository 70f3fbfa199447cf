// Loads the operands of gemm.cuh into shared memory: tiles of left, right, low, up and down, for
// each layout of right.
//
// Shared memory: 4 stages of left 32·kMI × 64 B and right 8 KiB; onepass: 4 × down 4 KiB; then the
// bits of the active rows. Rows of 64 bytes are swizzled by chunk ^ (row / 2 mod 4), rows of 256
// bytes by chunk ^ (row mod 8). So ldmatrix and the copies have no bank conflicts.
#pragma once

#include "common.cuh"

namespace alora {

enum class Layout { kNK, kKN, kStrided };  // right: K contiguous, N contiguous, anything

template <typename T, int kMI>
struct GemmOperands {
  static constexpr int kThreads = 256;
  static constexpr int kBlockM = 32 * kMI, kBlockN = 128, kBlockK = 32, kStages = 4;
  static constexpr int kMaxOnePassR = 64;
  static constexpr uint32_t kLeftBytes = kBlockM * kBlockK * 2, kRightBytes = kBlockN * kBlockK * 2;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes;
  static constexpr uint32_t kDownBytes = kMaxOnePassR * kBlockK * 2;
  static constexpr uint32_t kRingBytes = kStages * kStageBytes;
  static_assert(kBlockM * kBlockN * 2 <= kRingBytes, "the out tile reuses the ring");
  static_assert(kRingBytes + kStages * kDownBytes + 16 <= 99 * 1024,
                "must fit the 99 KiB of sm_86, sm_89 and sm_120");
  static_assert(kMaxOnePassR <= 2 * kBlockK, "onepass keeps low in two stages");
  static constexpr int kLeftChunks = (kBlockM * 4 + kThreads - 1) / kThreads;
  static constexpr int kRightChunks = kBlockN * 4 / kThreads;

  const GemmParams& p;
  const uint32_t ring;
  uint32_t* const active;  // shared [kMI]: one bit for each row of the tile
  const int tid, lane;
  int m0, n0;
  float4 held[2];  // a chunk of a float32 `down` between load and store
  // For each of this thread's chunks of the two main operands: the next address, and the step of K
  // at which there is nothing left to read.
  const T *left_next[kLeftChunks], *right_next[kRightChunks];
  int left_end[kLeftChunks], right_end[kRightChunks];

  __device__ GemmOperands(const GemmParams& params, uint8_t* shared)
      : p(params),
        ring(shared_address(shared)),
        active(reinterpret_cast<uint32_t*>(shared + kRingBytes +
                                           (params.flags & kOnePass ? kStages * kDownBytes : 0))),
        tid(threadIdx.x),
        lane(threadIdx.x % 32) {
    constexpr int kGroup = 8;
    const int tiles_m = (p.m + kBlockM - 1) / kBlockM, tiles_n = (p.n + kBlockN - 1) / kBlockN;
    const int per_group = kGroup * tiles_n, group = blockIdx.x / per_group;
    const int size = min(tiles_m - group * kGroup, kGroup), rest = blockIdx.x % per_group;
    m0 = (group * kGroup + rest % size) * kBlockM;
    n0 = rest / size * kBlockN;
  }

  // A stage is identified by its first byte. It contains left, then right.
  __device__ uint32_t stage_at(int slot) const { return ring + slot * kStageBytes; }
  __device__ uint32_t down_tile(uint32_t stage) const {
    return ring + kRingBytes + (stage - ring) / kStageBytes * kDownBytes;
  }
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

  // Loads the active rows of `low`, 32 columns from r0.
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

  // The address of an element of a right tile: step k of the stage, column n of the tile.
  template <Layout kLayout>
  __device__ uint32_t right_at(uint32_t tile, int k, int n) const {
    if constexpr (kLayout == Layout::kKN) return tile + swizzle<256>(k, n / 8) + n % 8 * 2;
    return tile + swizzle64(n, k / 8) + k % 8 * 2;
  }

  template <Layout kLayout>
  __device__ void load_up(uint32_t tile, int r0) {
    constexpr bool kAlongN = kLayout == Layout::kKN;
    if (has(kVectorUp)) {
#pragma unroll 1
      for (int i = tid; i < kBlockN * kBlockK / 8; i += kThreads) {
        const int k = kAlongN ? i / 16 : i % 4 * 8, n = kAlongN ? i % 16 * 8 : i / 4;
        copy_adapter<T>(right_at<kLayout>(tile, k, n), p.up, (r0 + k) * p.up_r + (n0 + n) * p.up_n,
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
      store_shared_element(right_at<kLayout>(tile, k, n), v);
    }
  }

  template <Layout kLayout>
  __device__ void start_main() {
    const T *left = static_cast<const T*>(p.left), *right = static_cast<const T*>(p.right);
#pragma unroll
    for (int i = 0; i < kLeftChunks; ++i) {
      const int row = tid / 4 + i * (kThreads / 4);
      left_end[i] = row < kBlockM && m0 + row < p.m ? p.k - tid % 4 * 8 : 0;
      left_next[i] = left + (m0 + row) * p.left_m + tid % 4 * 8;
    }
#pragma unroll
    for (int i = 0; i < kRightChunks; ++i) {
      if constexpr (kLayout == Layout::kKN) {
        const int row = tid / 16 + i * (kThreads / 16), n = n0 + tid % 16 * 8;
        right_end[i] = n < p.n ? p.k - row : 0;
        right_next[i] = right + row * p.right_k + n;
      } else {
        const int row = tid / 4 + i * (kThreads / 4);
        right_end[i] = n0 + row < p.n ? p.k - tid % 4 * 8 : 0;
        right_next[i] = right + (n0 + row) * p.right_n + tid % 4 * 8;
      }
    }
  }

  // Loads the next 32 steps of K, from k0. A copy of an invalid chunk writes zeros and reads
  // nothing.
  template <Layout kLayout>
  __device__ void load_main(uint32_t stage, int k0) {
    if constexpr (kLayout == Layout::kStrided) {
      load_strided(stage, k0);
      return;
    }
    // Rows 64 apart (16 apart along N) have the same swizzle.
    const uint32_t left = stage + swizzle64(tid / 4, tid % 4);
    const uint32_t right =
        stage + kLeftBytes +
        (kLayout == Layout::kKN ? swizzle<256>(tid / 16, tid % 16) : swizzle64(tid / 4, tid % 4));
#pragma unroll
    for (int i = 0; i < kLeftChunks; ++i) {
      if (kBlockM % (kThreads / 4) == 0 || tid / 4 + i * (kThreads / 4) < kBlockM) {
        copy_async(left + i * 4096, left_next[i], k0 < left_end[i]);
      }
      left_next[i] += kBlockK;
    }
#pragma unroll
    for (int i = 0; i < kRightChunks; ++i) {
      copy_async(right + i * 4096, right_next[i], k0 < right_end[i]);
      right_next[i] += kLayout == Layout::kKN ? kBlockK * p.right_k : kBlockK;
    }
  }

  __device__ void load_strided(uint32_t stage, int k0) {
    const T *left = static_cast<const T*>(p.left), *right = static_cast<const T*>(p.right);
#pragma unroll 1
    for (int i = tid; i < kBlockM * 4; i += kThreads) {
      const int m = m0 + i / 4, k = k0 + i % 4 * 8, valid = m < p.m ? p.k - k : 0;
      store_shared(stage + swizzle64(i / 4, i % 4),
                   gather(left + m * p.left_m + k * p.left_k, p.left_k, valid));
    }
#pragma unroll 1
    for (int i = tid; i < kBlockN * 4; i += kThreads) {
      const int n = n0 + i / 4, k = k0 + i % 4 * 8, valid = n < p.n ? p.k - k : 0;
      store_shared(stage + kLeftBytes + swizzle64(i / 4, i % 4),
                   gather(right + n * p.right_n + k * p.right_k, p.right_k, valid));
    }
  }

  // `down` for onepass: one chunk of eight elements for each thread. A float32 chunk needs a
  // conversion, so it is loaded before the products of the current stage and stored after them.
  __device__ bool down_waits() const { return has(kVectorAdapter) && has(kAdapterFloat); }
  __device__ void fetch_down(uint32_t stage, int k0) {
    const int r = tid / 4, k = k0 + tid % 4 * 8;
    const bool valid = r < p.r && k < p.k;
    const uint32_t at = down_tile(stage) + swizzle64(r, tid % 4);
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
  __device__ void store_down(uint32_t stage) {
    if (!down_waits()) return;
    store_shared(down_tile(stage) + swizzle64(tid / 4, tid % 4),
                 make_uint4(pack<T>(held[0].x, held[0].y), pack<T>(held[0].z, held[0].w),
                            pack<T>(held[1].x, held[1].y), pack<T>(held[1].z, held[1].w)));
  }
};

}  // namespace alora
