// onepass for Hopper, R ≤ 64. It is gemm_sm90.cuh with rows of `down` as the last R16 of the 256
// columns of right, so one wgmma computes columns of out and of left · downᵀ together. Formula and
// operands are those of gemm.cuh.
//
// Schedule: as gemm_sm90.cuh, with tiles of 128 × kColumns = 128 × (256 - R16). After the K steps
// of an active tile, each consumer warpgroup scales, selects and rounds its low. Then low is the
// left operand, in registers, of R16 / 16 more products. Their right operand is `up`, the tile's
// last stage. The tiles of the first column store low for backward. Tiles without an active row
// load no `down` and use instructions of kColumns columns.
//
// `down` is copied by tensor map. If its dtype or layout does not allow that, it goes through the
// registers of the producer warpgroup, which writes it kLag steps behind the copies, after these
// have landed. If right is along N this is always so, because boxes of right overlap the columns of
// `down`. A second barrier then tells that the stage is complete.
//
// Shared memory: that of GemmSm90 with kBlockN = 256, then the second barriers. In a right tile,
// rows (columns along N) kColumns .. 255 belong to `down`. The last stage of a tile contains `up`.
#pragma once

#include "gemm_sm90.cuh"

namespace alora {

template <typename T, bool kRightAlongN, int kColumns>
struct OnePassSm90 : GemmSm90<T, kRightAlongN, 256, kColumns> {
  using Gemm = GemmSm90<T, kRightAlongN, 256, kColumns>;
  using Gemm::kBlockK, Gemm::kCopiedBytes, Gemm::kLeftBytes, Gemm::kStages;
  using Gemm::left_step, Gemm::right_step, Gemm::release;
  using Gemm::p, Gemm::has, Gemm::full, Gemm::empty, Gemm::left_tile, Gemm::right_tile;
  using typename Gemm::Ring;
  using typename Gemm::Tile;
  static constexpr int kR16 = 256 - kColumns, kLag = 2;
  static constexpr uint32_t kWholeAt = Gemm::kSharedBytes;
  static constexpr uint32_t kSharedBytes = kWholeAt + kStages * 8;
  static_assert(kR16 >= 16 && kR16 <= 64, "low of a tile is at most 64 columns");
  static_assert(kLag < kStages, "the copies may not wait for a stage that is not yet whole");
  static_assert(kSharedBytes <= 227 * 1024, "must fit a Hopper multiprocessor");

  const OnePassSm90Params& q;

  __device__ OnePassSm90(const OnePassSm90Params& params, uint32_t base)
      : Gemm(params.gemm, base), q(params) {}

  __device__ uint32_t whole(int turn) const { return this->shared + kWholeAt + turn * 8; }
  __device__ bool converts(const Tile& t) const { return t.low_steps > 0 && has(kConvertDown); }

  // The leader issues the copies of one K step.
  __device__ void copy_step(const Ring& ring, const Tile& t, int k0, bool with_down) {
    const uint32_t landed = full(ring.stage);
    barrier_wait(empty(ring.stage), ring.round ^ 1);
    barrier_arrive_expecting(landed, kLeftBytes + kCopiedBytes + (with_down ? kR16 * 128 : 0));
    copy_tile_in(left_tile(ring.stage), p.left, k0, t.m0, landed);
    this->copy_right(p.right, ring.stage, k0, t.n0);
    if (with_down) copy_tile_in(right_tile(ring.stage) + kColumns * 128, q.down, k0, 0, landed);
  }

  // Writes steps k0 .. k0 + 63 of `down`, rounded to T. A thread takes a chunk of eight per turn.
  __device__ void convert_down(int stage, int k0) {
    const bool is_float = has(kAdapterFloat), vector = has(kVectorAdapter);
#pragma unroll
    for (int i = threadIdx.x; i < kR16 * 8; i += 128) {
      if constexpr (kRightAlongN) {  // eight neighbours along R
        const int k = k0 + i / (kR16 / 8), r = i % (kR16 / 8) * 8, column = kColumns + r;
        store_shared(
            right_tile(stage) + column / 64 * 8192 + swizzle<128>(i / (kR16 / 8), column % 64 / 8),
            adapter_chunk<T>(q.down_values, r * q.down_r + k * q.down_k, q.down_r,
                             k < p.k ? p.r - r : 0, is_float, vector));
      } else {
        const int r = i / 8, k = k0 + i % 8 * 8;
        store_shared(right_tile(stage) + swizzle<128>(kColumns + r, i % 8),
                     adapter_chunk<T>(q.down_values, r * q.down_r + k * q.down_k, q.down_k,
                                      r < p.r ? p.k - k : 0, is_float, vector));
      }
    }
  }

  // `second` is the position in the second barriers, which tell that a stage is complete. It lags
  // behind the ring.
  __device__ void load_main(Ring& ring, Ring& second, const Tile& t) {
    const bool leads = threadIdx.x == 0;
    if (!converts(t)) {
#pragma unroll 1
      for (int step = 0; step < t.main_steps; ++step, ring.step()) {
        if (leads) copy_step(ring, t, step * kBlockK, t.low_steps > 0);
      }
      return;
    }
    Ring behind = ring;
#pragma unroll 1
    for (int step = 0; step < t.main_steps + kLag; ++step) {
      if (step < t.main_steps) {
        if (leads) copy_step(ring, t, step * kBlockK, false);
        ring.step();
      }
      if (step < kLag) continue;
      // Keeps all threads with the leader. Otherwise a thread could mistake a phase of `full` for a
      // later one.
      sync_some<128>(1);
      barrier_wait(full(behind.stage), behind.round);
      convert_down(behind.stage, (step - kLag) * kBlockK);
      fence_async_proxy();
      barrier_arrive(whole(second.stage));
      second.step();
      behind.step();
    }
  }

  __device__ void load_up(Ring& ring, const Tile& t) {
    const bool leads = threadIdx.x == 0;
    if (t.low_steps == 0) return;
    if (leads) barrier_wait(empty(ring.stage), ring.round ^ 1);
    if (has(kConvertUp)) {
      sync_some<128>(1);
      this->convert_up(ring.stage, 0, t.n0, kR16);
      fence_async_proxy();
      sync_some<128>(1);
      if (leads) barrier_arrive(full(ring.stage));
    } else if (leads) {
      barrier_arrive_expecting(full(ring.stage), kCopiedBytes);
      this->copy_right(p.up, ring.stage, 0, t.n0);
    }
    ring.step();
  }

  __device__ void produce() {
    Ring ring, second;
    for (int index = blockIdx.x; index < this->tiles_m * this->tiles_n; index += gridDim.x) {
      const Tile t = this->tile_at(index);
      load_main(ring, second, t);
      load_up(ring, t);
    }
  }

  // acc += left · [right ∣ downᵀ], or left · right alone with narrower instructions. With
  // kConverted it waits for the second barrier alone: the producer arrives there after the copies
  // have landed.
  template <int kN, bool kConverted>
  __device__ void multiply_main(float (&acc)[128], Ring& ring, Ring& second, const Tile& t,
                                int group) {
#pragma unroll 1
    for (int step = 0; step < t.main_steps; ++step, ring.step()) {
      if constexpr (kConverted) {
        barrier_wait(whole(second.stage), second.round);
        second.step();
      } else {
        barrier_wait(full(ring.stage), ring.round);
      }
      wgmma_fence(acc);
#pragma unroll
      for (int i = 0; i < kBlockK / 16; ++i) {
        Wgmma<T, kN>::template multiply<kRightAlongN>(acc, left_step(ring.stage, group, i),
                                                      right_step(ring.stage, i));
      }
      wgmma_commit();
      wgmma_wait<0>(acc);
      release(ring.stage);
    }
  }

  // Takes low from the last columns of acc, stores it, and adds low · up to the other columns.
  __device__ void add_low(float (&acc)[128], Ring& ring, const Tile& t, int group, int row) {
    uint32_t low[kR16 / 16][4];  // [sixteen columns][two column halves × two row halves]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = t.m0 + group * 64 + row + half * 8;
      const bool on = m < p.m && p.row_adapter[min(m, p.m - 1)] >= 0;
      T* const at = static_cast<T*>(q.low_out) + m * q.low_m + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < kR16 / 8; ++j) {
        const float* d = acc + kColumns / 2 + j * 4 + half * 2;
        const uint32_t two = on ? pack<T>(d[0] * q.scale, d[1] * q.scale) : 0u;
        low[j / 2][j % 2 * 2 + half] = two;
        if (on && t.n0 == 0 && q.low_out != nullptr) *reinterpret_cast<uint32_t*>(at + j * 8) = two;
      }
    }
    barrier_wait(full(ring.stage), ring.round);
    wgmma_fence(acc);
#pragma unroll
    for (int i = 0; i < kR16 / 16; ++i) {
      Wgmma<T, kColumns>::template multiply<kRightAlongN>(acc, low[i], right_step(ring.stage, i));
    }
    wgmma_commit();
    wgmma_wait<0>(acc);
    release(ring.stage);
    ring.step();
  }

  __device__ void consume() {
    const int group = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8, of the group's 64 rows
    const uint32_t out = this->shared + Gemm::kOutAt + group * 2 * Gemm::kOutBytes;
    Ring ring, second;
    for (int index = blockIdx.x; index < this->tiles_m * this->tiles_n; index += gridDim.x) {
      const Tile t = this->tile_at(index);
      float acc[128];
#pragma unroll
      for (int i = 0; i < 128; ++i) acc[i] = 0.f;
      if (t.low_steps == 0) {
        multiply_main<kColumns, false>(acc, ring, second, t, group);
      } else {
        if (has(kConvertDown)) {
          multiply_main<256, true>(acc, ring, second, t, group);
        } else if constexpr (!kRightAlongN) {
          multiply_main<256, false>(acc, ring, second, t, group);
        }
        add_low(acc, ring, t, group, row);
      }
      this->finish(acc, t, group, row, out);
    }
  }

  __device__ void run() {
    if (threadIdx.x < kStages) barrier_init(whole(threadIdx.x), 128);
    this->init_barriers();
    __syncthreads();
    share_work<56, 224>(*this);
  }
};

// Runs the kernel for the memory order of right that the flags say.
template <typename T, int kColumns>
__device__ __forceinline__ void onepass_sm90(const OnePassSm90Params& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  if (p.gemm.flags & kAlongN) {
    OnePassSm90<T, true, kColumns>(p, shared_address(shared)).run();
  } else {
    OnePassSm90<T, false, kColumns>(p, shared_address(shared)).run();
  }
}

}  // namespace alora
