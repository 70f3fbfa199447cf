// The GEMM for Hopper: out = left · right + bias + active ⊙ (keep ⊙ (low · up) + lora_bias), only
// `tail`. Formula, operands and the order of steps are those of gemm.cuh.
//
// Schedule: 384 threads, persistent: block b takes tiles b, b + grid, ... of 128 × kBlockN, in
// groups of eight row tiles. A producer warpgroup keeps a ring of stages of 64 steps full: one
// thread issues the tensor-map copies of left and right. Two consumer warpgroups compute 64 rows
// each. They wait for a stage, issue four wgmma, wait for these, and release the stage. The R steps
// of an active tile come first in the ring. If `up` has another dtype or unaligned rows, the whole
// producer warpgroup converts it into the stage instead of copying. Each warpgroup writes its out
// tile through two small buffers by tensor-map stores; meanwhile the producer fills the ring for
// the next tile.
//
// Shared memory: kStages × (left [128][64] 16 KiB, right [kBlockN][64] or [64][kBlockN]), then
// 2 × 2 × out [64][64] 8 KiB, then the mbarriers; rows of 128 bytes, swizzled by 128 bytes.
#pragma once

#include "tma.cuh"
#include "wgmma.cuh"

namespace alora {

// Makes the first warpgroup the producer, with few registers, and all others consumers.
template <int kProducer, int kConsumer, typename Kernel>
__device__ __forceinline__ void share_work(Kernel& kernel) {
  if (threadIdx.x < 128) {
    give_registers<kProducer>();
    kernel.produce();
  } else {
    take_registers<kConsumer>();
    kernel.consume();
    if (threadIdx.x % 128 == 0) wait_tiles_read<0>();  // shared memory must outlive the stores
  }
}

// The right tile and the instruction have kBlockN columns. The first kColumns are columns of out.
template <typename T, bool kRightAlongN, int kBlockN, int kColumns = kBlockN>
struct GemmSm90 {
  static constexpr int kBlockM = 128, kBlockK = 64, kStages = kBlockN == 256 ? 4 : 6;
  static constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
  static constexpr uint32_t kLeftBytes = kBlockM * 128, kRightBytes = kBlockN * 128;
  static constexpr uint32_t kStageBytes = kLeftBytes + kRightBytes, kOutBytes = 64 * 128;
  static constexpr uint32_t kOutAt = kStages * kStageBytes;
  static constexpr uint32_t kBarriersAt = kOutAt + kConsumers * 2 * kOutBytes;
  static constexpr uint32_t kSharedBytes = kBarriersAt + kStages * 16;
  static_assert(kSharedBytes <= 227 * 1024, "must fit a Hopper multiprocessor");
  static_assert(kBlockN % 64 == 0, "right lies in blocks of 64 columns");
  static_assert(kColumns % 16 == 0 && kColumns <= kBlockN, "16-byte pieces of out");
  static constexpr int kPieces = (kColumns + 63) / 64;  // of out; the last one may be narrower
  // The bytes of a right tile that the tensor-map copies fill.
  static constexpr uint32_t kCopiedBytes = kRightAlongN ? kPieces * 8192 : kColumns * 128;

  const GemmSm90Params& p;
  const uint32_t shared;
  const int tiles_m, tiles_n;

  __device__ GemmSm90(const GemmSm90Params& params, uint32_t base)
      : p(params),
        shared(uniform(base)),
        tiles_m((params.m + kBlockM - 1) / kBlockM),
        tiles_n((params.n + kColumns - 1) / kColumns) {}

  __device__ bool has(uint32_t flag) const { return p.flags & flag; }
  __device__ uint32_t full(int stage) const { return shared + kBarriersAt + stage * 16; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ uint32_t left_tile(int stage) const { return shared + stage * kStageBytes; }
  __device__ uint32_t right_tile(int stage) const { return left_tile(stage) + kLeftBytes; }

  struct Tile {
    int m0, n0, low_steps, main_steps;
  };

  // The position of tile `index` in out.
  __device__ Tile place(int index) const {
    constexpr int kGroup = 8;
    const int per_group = kGroup * tiles_n, group = index / per_group;
    const int size = min(tiles_m - group * kGroup, kGroup), rest = index % per_group;
    return {(group * kGroup + rest % size) * kBlockM, rest / size * kColumns, 0, 0};
  }

  // The steps of a tile depend on whether it has an active row.
  __device__ void set_steps(Tile& t, bool active) const {
    t.low_steps = active ? (p.r + kBlockK - 1) / kBlockK : 0;
    t.main_steps = has(kActiveOnly) && !active ? 0 : (p.k + kBlockK - 1) / kBlockK;
  }

  // Every warp computes the tile itself; all get the same result.
  __device__ Tile tile_at(int index) const {
    Tile t = place(index);
    bool active = false;
#pragma unroll
    for (int i = 0; i < kBlockM / 32; ++i) {
      const int m = t.m0 + 32 * i + threadIdx.x % 32;
      active |= m < p.m && p.row_adapter[min(m, p.m - 1)] >= 0;
    }
    set_steps(t, __any_sync(~0u, active));
    return t;
  }

  struct Ring {  // a position in the ring: the stage, and the parity of the rounds
    int stage = 0;
    uint32_t round = 0;
    __device__ void step() {
      if (++stage == kStages) stage = 0, round ^= 1;
    }
  };

  __device__ void copy_right(const TensorMap& map, int stage, int k0, int n0) {
    if constexpr (kRightAlongN) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        copy_tile_in(right_tile(stage) + piece * 8192, map, n0 + piece * 64, k0, full(stage));
      }
    } else {
      copy_tile_in(right_tile(stage), map, k0, n0, full(stage));
    }
  }

  // Writes steps r0 .. r0 + depth - 1 of `up`, rounded to T, into the right tile. A thread takes a
  // chunk of eight neighbours per turn.
  __device__ void convert_up(int stage, int r0, int n0, int depth) {
    const bool is_float = has(kAdapterFloat), vector = has(kVectorUp);
    const int chunks = depth / 8;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < kColumns * chunks; i += 128) {
      if constexpr (kRightAlongN) {
        const int r = i / (kColumns / 8), chunk = i % (kColumns / 8), n = n0 + chunk * 8;
        const int valid = r0 + r < p.r ? p.n - n : 0;
        store_shared(right_tile(stage) + chunk / 8 * 8192 + swizzle<128>(r, chunk % 8),
                     adapter_chunk<T>(p.up_values, (r0 + r) * p.up_r + n * p.up_n, p.up_n, valid,
                                      is_float, vector));
      } else {
        const int n = n0 + i / chunks, chunk = i % chunks, r = r0 + chunk * 8;
        store_shared(right_tile(stage) + swizzle<128>(i / chunks, chunk),
                     adapter_chunk<T>(p.up_values, r * p.up_r + n * p.up_n, p.up_r,
                                      n < p.n ? p.r - r : 0, is_float, vector));
      }
    }
  }

  // Loads the R steps of a tile; the whole producer warpgroup runs this. The leader calls `ready`
  // before it copies the first tile of low.
  template <typename Ready>
  __device__ void load_low(Ring& ring, const Tile& t, const Ready& ready) {
    const bool leads = threadIdx.x == 0, convert = has(kConvertUp);
#pragma unroll 1
    for (int step = 0; step < t.low_steps; ++step, ring.step()) {
      // Only the leader waits: the other threads may miss a phase of the barrier.
      if (leads) barrier_wait(empty(ring.stage), ring.round ^ 1);
      if (convert) {
        sync_some<128>(1);
        convert_up(ring.stage, step * kBlockK, t.n0, kBlockK);
        fence_async_proxy();
        sync_some<128>(1);
      }
      if (!leads) continue;
      if (step == 0) ready();
      barrier_arrive_expecting(full(ring.stage), convert ? kLeftBytes : kStageBytes);
      copy_tile_in(left_tile(ring.stage), p.low, step * kBlockK, t.m0, full(ring.stage));
      if (!convert) copy_right(p.up, ring.stage, step * kBlockK, t.n0);
    }
  }

  __device__ void load_main(Ring& ring, const Tile& t) {
    const bool leads = threadIdx.x == 0;
#pragma unroll 1
    for (int step = 0; step < t.main_steps; ++step, ring.step()) {
      if (!leads) continue;
      barrier_wait(empty(ring.stage), ring.round ^ 1);
      barrier_arrive_expecting(full(ring.stage), kStageBytes);
      copy_tile_in(left_tile(ring.stage), p.left, step * kBlockK, t.m0, full(ring.stage));
      copy_right(p.right, ring.stage, step * kBlockK, t.n0);
    }
  }

  __device__ void produce() {
    Ring ring;
    for (int index = blockIdx.x; index < tiles_m * tiles_n; index += gridDim.x) {
      const Tile t = tile_at(index);
      load_low(ring, t, [] {});
      load_main(ring, t);
    }
  }

  // The wgmma descriptor of a tile of 128-byte rows with the 128-byte swizzle. `leading` is the
  // distance between blocks of 64 columns, if rows are steps of the reduction. Eight rows take 1024
  // bytes. Shared memory is smaller than 256 KiB, so no field overflows into the next.
  static __device__ uint64_t descriptor(uint32_t address, uint32_t leading) {
    return (address >> 4) + (leading >> 4 << 16) +
           (static_cast<uint64_t>(1024 >> 4 | 1u << 30) << 32);
  }
  // The descriptor of the tile that begins `bytes` later.
  static __device__ uint64_t advance(uint64_t d, uint32_t bytes) {
    return (d >> 32 << 32) | (static_cast<uint32_t>(d) + (bytes >> 4));
  }
  __device__ uint64_t left_step(int stage, int group, int step) const {
    return advance(descriptor(left_tile(stage) + group * 8192, 16), step * 32);
  }
  __device__ uint64_t right_step(int stage, int step) const {
    return advance(descriptor(right_tile(stage), kRightAlongN ? 8192 : 16),
                   step * (kRightAlongN ? 2048 : 32));
  }

  __device__ void multiply_step(float (&acc)[kBlockN / 2], int stage, int group, int step) {
    Wgmma<T, kBlockN>::template multiply<kRightAlongN>(acc, left_step(stage, group, step),
                                                       right_step(stage, step));
  }

  __device__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty(stage));
  }

  __device__ void multiply_low(float (&acc)[kBlockN / 2], Ring& ring, const Tile& t, int group) {
#pragma unroll 1
    for (int step = 0; step < t.low_steps; ++step, ring.step()) {
      barrier_wait(full(ring.stage), ring.round);
      const int sixteens = min(4, (p.r - step * kBlockK + 15) / 16);
      wgmma_fence(acc);
#pragma unroll 1
      for (int i = 0; i < sixteens; ++i) {
        multiply_step(acc, ring.stage, group, i);
        wgmma_commit();
        wgmma_wait<0>(acc);
      }
      release(ring.stage);
    }
  }

  __device__ void multiply_main(float (&acc)[kBlockN / 2], Ring& ring, const Tile& t, int group) {
#pragma unroll 1
    for (int step = 0; step < t.main_steps; ++step, ring.step()) {
      barrier_wait(full(ring.stage), ring.round);
      wgmma_fence(acc);
#pragma unroll
      for (int i = 0; i < kBlockK / 16; ++i) multiply_step(acc, ring.stage, group, i);
      wgmma_commit();
      wgmma_wait<0>(acc);
      release(ring.stage);
    }
  }

  __device__ void consume() {
    const int group = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8, of the group's 64 rows
    const uint32_t out = shared + kOutAt + group * 2 * kOutBytes;
    Ring ring;
    for (int index = blockIdx.x; index < tiles_m * tiles_n; index += gridDim.x) {
      const Tile t = tile_at(index);
      float acc[kBlockN / 2];
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) acc[i] = 0.f;
      multiply_low(acc, ring, t, group);
      if (t.low_steps > 0 && has(kDropout)) drop_low_product(acc, t.m0 + group * 64 + row, t.n0);
      multiply_main(acc, ring, t, group);
      finish(acc, t, group, row, out);
    }
  }

  // As in gemm.cuh: a rolled loop collects the bits of sixteen pairs into one word.
  __device__ void drop_low_product(float (&acc)[kBlockN / 2], int m, int n0) {
    const int64_t seed = *p.seed;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int word = 0; word < kBlockN / 64; ++word) {
      uint32_t keep = 0;
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        const int column = n0 + (word * 8 + i / 2) * 8 + lane % 4 * 2;
        const uint4 w = philox(seed, column / 4, m + i % 2 * 8);
        const uint32_t first = lane & 1 ? w.z : w.x, second = lane & 1 ? w.w : w.y;
        keep |= (first >= p.threshold ? 1u : 0u) << 2 * i;
        keep |= (second >= p.threshold ? 2u : 0u) << 2 * i;
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) acc[word * 32 + i] = keep >> i & 1 ? acc[word * 32 + i] : 0.f;
    }
  }

  __device__ void finish(float (&acc)[kBlockN / 2], const Tile& t, int group, int row,
                         uint32_t out) {
    const int lane = threadIdx.x % 32;
    const bool leads = threadIdx.x % 128 == 0;
    bool on[2], inside[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = t.m0 + group * 64 + row + half * 8;
      inside[half] = m < p.m;
      on[half] = inside[half] && p.row_adapter[min(m, p.m - 1)] >= 0;
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int width = min(64, kColumns - piece * 64);
      const uint32_t buffer = out + piece % 2 * kOutBytes;
      if (leads) {  // wait until the last store from this buffer has read it
        if (kPieces % 2 == 1 && piece == 0) {
          wait_tiles_read<0>();  // that store was the last one of the previous tile
        } else {
          wait_tiles_read<1>();
        }
      }
      sync_some<128>(2 + group);
#pragma unroll
      for (int j = 0; j < width / 8; ++j) {
        const int column = piece * 64 + j * 8 + lane % 4 * 2, n = t.n0 + column;
        float bias[2] = {}, extra[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (n + i >= p.n) continue;
          if (p.bias != nullptr) bias[i] = to_float(static_cast<const T*>(p.bias)[n + i]);
          if (p.lora_bias != nullptr) {
            extra[i] =
                p.lora_bias_scale * to_float(adapter_at<T>(p.lora_bias, n + i, has(kAdapterFloat)));
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[i] = acc[(piece * 8 + j) * 4 + half * 2 + i] + bias[i];
            v[i] = on[half] ? v[i] + extra[i] : v[i];
            if (has(kActiveOnly)) v[i] = on[half] ? v[i] : 0.f;
            if (has(kAdd) && inside[half] && n + i < p.n) {
              const int64_t m = t.m0 + group * 64 + row + half * 8;
              v[i] += to_float(static_cast<const T*>(p.out_values)[m * p.out_m + n + i]);
            }
          }
          store_shared(buffer + swizzle<128>(row + half * 8, j) + lane % 4 * 4,
                       pack<T>(v[0], v[1]));
        }
      }
      fence_async_proxy();
      sync_some<128>(2 + group);
      if (width < 64) store_narrow(t, group, piece * 64, width, buffer);
      if (leads) {
        if (width == 64) copy_tile_out(p.out, t.n0 + piece * 64, t.m0 + group * 64, buffer);
        commit_tiles_out();  // also without a store, so that every buffer has its own group
      }
    }
  }

  // Writes the last columns of out by ordinary stores, if they do not fill a box of its tensor map.
  __device__ void store_narrow(const Tile& t, int group, int column, int width, uint32_t buffer) {
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < 64 * (width / 8); i += 128) {
      const int row = i / (width / 8), chunk = i % (width / 8);
      const int m = t.m0 + group * 64 + row, n = t.n0 + column + chunk * 8;
      if (m >= p.m || n >= p.n) continue;
      store_row(static_cast<T*>(p.out_values) + m * p.out_m + n,
                load_shared(buffer + swizzle<128>(row, chunk)), p.n - n, true);
    }
  }

  // The caller must synchronise the block before the barriers are used.
  __device__ void init_barriers() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full(stage), 1);
        barrier_init(empty(stage), 4 * kConsumers);
      }
      fence_barrier_init();
    }
  }

  __device__ void run() {
    init_barriers();
    __syncthreads();
    // The code above may overlap the end of the previous kernel, which writes `low`.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    share_work<40, 232>(*this);
  }
};

template <typename T, bool kRightAlongN, int kBlockN>
__device__ __forceinline__ void gemm_sm90(const GemmSm90Params& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  GemmSm90<T, kRightAlongN, kBlockN>(p, shared_address(shared)).run();
}

}  // namespace alora
