// fused for Hopper: low = scale · left · downᵀ on active rows, and out = left · right + bias +
// active ⊙ (low · up + lora_bias), in one persistent launch. Operands as in gemm.cuh; no dropout.
//
// Schedule: threads, tiles, ring and epilogue are those of gemm_sm90.cuh. The list of tiles begins
// with narrow tiles [128, 64] of low: one for each 64 columns of low in each row block that has an
// active row. Ordinary tiles follow. Block b takes tiles b, b + grid, ... A narrow tile runs K
// through the same ring, stores its part of low and adds to the row block's word in `ready`. An
// ordinary tile runs K first, which needs no low. Then its producer waits for the word, and the R
// steps follow. All blocks must run at the same time: then every narrow tile has begun before a
// block waits for it, and narrow tiles wait for nothing.
//
// `ready`: the lower half of a word counts the warpgroups that have stored their part of low. The
// upper half counts the ordinary tiles that have seen all parts; the last one sets the word back to
// zero.
//
// Active row blocks are a bitmap in shared memory. Each block of threads computes it from
// active_rows[0 .. active_count). All decisions use this bitmap, so waiting tiles and tiles that
// they wait for always agree.
//
// Shared memory: that of gemm_sm90.cuh, then the bitmap and its count, 528 bytes. The stage of a
// narrow tile contains left [128][64] and, in the place of right, down [64][64].
#pragma once

#include "flags.cuh"
#include "gemm_sm90.cuh"

namespace alora {

template <typename T, bool kRightAlongN>
struct FusedSm90 : GemmSm90<T, kRightAlongN, 256> {
  using Gemm = GemmSm90<T, kRightAlongN, 256>;
  using Gemm::kBlockK, Gemm::kBlockM, Gemm::kConsumers, Gemm::kLeftBytes, Gemm::p;
  using Gemm::kSharedBytes;
  using typename Gemm::Ring;
  using typename Gemm::Tile;
  static constexpr int kLowColumns = 64, kWords = 128;
  static constexpr uint32_t kDownBytes = kLowColumns * 128;
  static_assert(kSharedBytes + kWords * 4 + 16 <= 227 * 1024, "must fit a Hopper multiprocessor");

  const FusedSm90Params& q;
  uint32_t* const bitmap;  // [kWords] in shared memory, then the number of bits that are set
  const int chunks;        // of 64 columns in low

  __device__ FusedSm90(const FusedSm90Params& params, uint8_t* base)
      : Gemm(params.gemm, shared_address(base)),
        q(params),
        bitmap(reinterpret_cast<uint32_t*>(base + kSharedBytes)),
        chunks((params.gemm.r + kLowColumns - 1) / kLowColumns) {}

  __device__ bool is_active(int row_block) const {
    return bitmap[row_block / 32] >> row_block % 32 & 1;
  }

  // The `index`-th row block with an active row.
  __device__ int active_block(int index) const {
    int word = 0;
    uint32_t bits = bitmap[0];
    for (; __popc(bits) <= index; bits = bitmap[++word]) index -= __popc(bits);
    for (; index > 0; --index) bits &= bits - 1;
    return word * 32 + __ffs(bits) - 1;
  }

  __device__ void find_active_blocks() {
    if (threadIdx.x < kWords) bitmap[threadIdx.x] = 0;
    __syncthreads();
    const int count = *q.active_count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int block = q.active_rows[i] / kBlockM;
      if (i == 0 || q.active_rows[i - 1] / kBlockM != block) {
        atomicOr(bitmap + block / 32, 1u << block % 32);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int blocks = 0;
      for (int word = 0; word < (this->tiles_m + 31) / 32; ++word) blocks += __popc(bitmap[word]);
      bitmap[kWords] = blocks;
    }
    __syncthreads();
  }

  // The number of narrow tiles, and of all tiles. Computed at each use, because the producer has
  // few registers.
  __device__ int narrow() const { return static_cast<int>(bitmap[kWords]) * chunks; }
  __device__ int tiles() const { return narrow() + this->tiles_m * this->tiles_n; }

  __device__ Tile ordinary_tile(int index) const {
    Tile t = this->place(index - narrow());
    this->set_steps(t, is_active(t.m0 / kBlockM));
    return t;
  }

  // Writes a tile of `down`, rounded to T. A thread takes a chunk of eight neighbours per turn.
  // Rows past R are zero, because the product is always 64 columns wide.
  __device__ void convert_down(int stage, int k0, int r0) {
    const bool is_float = this->has(kAdapterFloat), vector = this->has(kVectorAdapter);
#pragma unroll 2
    for (int i = threadIdx.x; i < kLowColumns * 8; i += 128) {
      const int r = r0 + (kRightAlongN ? i % 8 * 8 : i / 8);
      const int k = k0 + (kRightAlongN ? i / 8 : i % 8 * 8);
      const int valid = kRightAlongN ? (k < p.k ? p.r - r : 0) : (r < p.r ? p.k - k : 0);
      store_shared(this->right_tile(stage) + swizzle<128>(i / 8, i % 8),
                   adapter_chunk<T>(q.down_values, r * q.down_r + k * q.down_k,
                                    kRightAlongN ? q.down_r : q.down_k, valid, is_float, vector));
    }
  }

  __device__ void load_narrow(Ring& ring, int index) {
    const bool leads = threadIdx.x == 0, convert = this->has(kConvertDown);
    const int m0 = active_block(index / chunks) * kBlockM, r0 = index % chunks * kLowColumns;
#pragma unroll 1
    for (int k0 = 0; k0 < p.k; k0 += kBlockK, ring.step()) {
      const uint32_t full = this->full(ring.stage);
      if (leads) barrier_wait(this->empty(ring.stage), ring.round ^ 1);
      if (convert) {
        sync_some<128>(1);
        convert_down(ring.stage, k0, r0);
        fence_async_proxy();
        sync_some<128>(1);
      }
      if (!leads) continue;
      barrier_arrive_expecting(full, convert ? kLeftBytes : kLeftBytes + kDownBytes);
      copy_tile_in(this->left_tile(ring.stage), p.left, k0, m0, full);
      if (convert) continue;
      copy_tile_in(this->right_tile(ring.stage), q.down, kRightAlongN ? r0 : k0,
                   kRightAlongN ? k0 : r0, full);
    }
  }

  __device__ void produce() {
    Ring ring;
    for (int index = blockIdx.x; index < tiles(); index += gridDim.x) {
      if (index < narrow()) {
        load_narrow(ring, index);
        continue;
      }
      const Tile t = ordinary_tile(index);
      this->load_main(ring, t);
      this->load_low(ring, t, [&] {
        while ((load_relaxed(q.ready + t.m0 / kBlockM) & 0xFFFF) != kConsumers * chunks) {
        }
        fence_acquire();
        fence_async_proxy_global();
      });
      if (t.low_steps > 0 && threadIdx.x == 0) {
        uint32_t* const ready = q.ready + t.m0 / kBlockM;
        const uint32_t before = add_relaxed(ready, 1u << 16);
        if (before >> 16 == this->tiles_n - 1) store_relaxed(ready, 0);
      }
    }
  }

  __device__ void make_low(Ring& ring, int index, int group, int row) {
    const int block = active_block(index / chunks), r0 = index % chunks * kLowColumns;
    float acc[kLowColumns / 2];
#pragma unroll
    for (int i = 0; i < kLowColumns / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
    for (int k0 = 0; k0 < p.k; k0 += kBlockK, ring.step()) {
      barrier_wait(this->full(ring.stage), ring.round);
      wgmma_fence(acc);
#pragma unroll
      for (int i = 0; i < kBlockK / 16; ++i) {
        const uint32_t right = this->right_tile(ring.stage);
        Wgmma<T, kLowColumns>::template multiply<kRightAlongN>(
            acc, this->descriptor(this->left_tile(ring.stage) + group * 8192 + i * 32, 16),
            kRightAlongN ? this->descriptor(right + i * 2048, 8192)
                         : this->descriptor(right + i * 32, 16));
      }
      wgmma_commit();
      wgmma_wait<0>(acc);
      this->release(ring.stage);
    }
    // Columns past R and inactive rows are set to zero by selection, because left may contain NaN.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = block * kBlockM + group * 64 + row + half * 8;
      if (m >= p.m) continue;
      const bool on = p.row_adapter[m] >= 0;
      T* const at = static_cast<T*>(q.low_out) + m * q.low_m;
#pragma unroll
      for (int j = 0; j < kLowColumns / 8; ++j) {
        const int r = r0 + j * 8 + threadIdx.x % 4 * 2;
        if (r >= (p.r + 15) / 16 * 16) continue;
        const float first = acc[j * 4 + half * 2], second = acc[j * 4 + half * 2 + 1];
        *reinterpret_cast<uint32_t*>(at + r) = pack<T>(on && r < p.r ? first * q.scale : 0.f,
                                                       on && r + 1 < p.r ? second * q.scale : 0.f);
      }
    }
    fence_async_proxy_global();
    sync_some<128>(2 + group);
    if (threadIdx.x % 128 == 0) release_add(q.ready + block, 1);
  }

  __device__ void consume() {
    const int group = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8, of the group's 64 rows
    const uint32_t out = this->shared + Gemm::kOutAt + group * 2 * Gemm::kOutBytes;
    Ring ring;
    for (int index = blockIdx.x; index < tiles(); index += gridDim.x) {
      if (index < narrow()) {
        make_low(ring, index, group, row);
        continue;
      }
      const Tile t = ordinary_tile(index);
      float acc[128];
#pragma unroll
      for (int i = 0; i < 128; ++i) acc[i] = 0.f;
      this->multiply_main(acc, ring, t, group);
      this->multiply_low(acc, ring, t, group);
      this->finish(acc, t, group, row, out);
    }
  }

  __device__ void run() {
    this->init_barriers();
    find_active_blocks();
    share_work<56, 224>(*this);
  }
};

template <typename T, bool kRightAlongN>
__device__ __forceinline__ void fused_sm90(const FusedSm90Params& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  FusedSm90<T, kRightAlongN>(p, shared).run();
}

}  // namespace alora
