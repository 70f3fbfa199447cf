// The argument of each kernel: one plain struct, so that a launch is a name, a grid and some bytes.
// `alora_kernels/backends/cuda/params.py` declares the same structs in Python. `fields.h` lists
// their fields, and Python compares both when it loads the extension.
#pragma once

#include <cstdint>

namespace alora {

// Bits of `flags`.
enum Flags : uint32_t {
  kAdapterFloat = 1,    // lora_a, lora_b, lora_bias are float32; otherwise they have x's dtype
  kDropout = 2,         // the keep mask selects (see the kernel)
  kAdd = 4,             // out += instead of out =
  kActiveOnly = 8,      // inactive rows of out become zero, their tiles are skipped
  kVectorAdapter = 16,  // `down` (shrink: right) allows 16-byte loads along its inner dimension
  kVectorOut = 32,      // rows of out allow 16-byte stores
  kFloatOut = 64,       // out is float32
  kConvertUp = 128,     // `up` cannot be copied by tensor map: another dtype or unaligned rows
  kPairsAdapter = 256,  // shrink: neighbouring columns of the adapter operand load as pairs
  kConvertDown = 512,   // `down` cannot be copied by tensor map
  kVectorUp = 1024,     // `up` allows 16-byte loads along its inner dimension
  kAlongN = 2048,       // the inner dimension of `right` is N, not K
  kStrided = 4096,      // `left` and `right`, or grad's `wide`, do not allow 16-byte pieces
  kOnePass = 8192,      // the main loop computes low from `down`
};

struct GemmParams {
  const void* left;            // [M, K]
  const void* right;           // [K, N] by strides
  const void* bias;            // [N] or null, dtype of left
  const void* low;             // [M, R16] dtype of left; tail only; padding columns hold zeros
  const void* up;              // [R, N] by strides, adapter dtype, or null
  const void* down;            // [R, K] by strides, adapter dtype; onepass only
  const void* lora_bias;       // [N] or null, adapter dtype
  void* out;                   // [M, N]
  void* low_out;               // [M, R16] or null; onepass only
  const int32_t* row_adapter;  // [M]
  const int64_t* seed;         // [1] or null
  int64_t left_m, left_k, right_k, right_n, low_m, up_r, up_n, down_r, down_k, out_m, low_out_m;
  int32_t m, n, k, r;
  float scale;  // of x · downᵀ; onepass only
  float lora_bias_scale;
  uint32_t threshold;  // a Philox word below it drops
  uint32_t flags;
};

// A tensor map, encoded by the driver.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// The GEMM of sm_90a. The tensor maps contain the strides. Boxes are 64 columns wide (128 bytes,
// swizzled).
struct GemmSm90Params {
  TensorMap left;   // [M, K], box 128 × 64
  TensorMap right;  // [N, K], box kBlockN × 64; or [K, N], box 64 × 64
  TensorMap low;    // [M, R16], box 128 × 64, inactive rows are zero; unused in onepass
  TensorMap up;     // [N, R] or [R, N] like right; unless kConvertUp
  TensorMap out;    // [M, N], box 64 × 64
  const void* bias;
  const void* up_values;  // [R, N] by strides, adapter dtype; with kConvertUp
  const void* lora_bias;
  void* out_values;  // [M, N], the matrix of `out`; for kAdd and for columns that fill no box
  const int32_t* row_adapter;
  const int64_t* seed;
  int64_t up_r, up_n, out_m;
  int32_t m, n, k, r;
  float lora_bias_scale;
  uint32_t threshold, flags;
};

// onepass of sm_90a: the GEMM above, without a map of `low`. If K (or R) is their inner dimension,
// the boxes of `right` (or `up`) have 256 - R16 rows.
struct OnePassSm90Params {
  TensorMap down;  // [R, K], box R16 × 64; unless kConvertDown
  GemmSm90Params gemm;
  const void* down_values;  // [R, K] by strides, adapter dtype; with kConvertDown
  void* low_out;            // [M, R16] or null; active rows are written
  int64_t down_r, down_k, low_m;
  float scale;  // of left · downᵀ
};

// The persistent kernel of sm_90a: the GEMM above; the kernel itself writes `low`.
struct FusedSm90Params {
  TensorMap down;  // [R, K] or [K, R] like right, box 64 × 64; unless kConvertDown
  GemmSm90Params gemm;
  const void* down_values;  // [R, K] by strides, adapter dtype; with kConvertDown
  void* low_out;            // [M, R16], the matrix of gemm.low; written in active row blocks
  const int32_t* active_rows;
  const int32_t* active_count;
  uint32_t* ready;  // [row blocks], zero before and after the kernel
  int64_t down_r, down_k, low_m;
  float scale;  // of left · downᵀ
};

struct DecodeParams {
  const void* left;    // [M ≤ 16, K]
  const void* weight;  // [N, K], K contiguous
  const void* bias;
  const void* up;    // [R, N] by strides, adapter dtype
  const void* down;  // [R, K] by strides, adapter dtype
  const void* lora_bias;
  void* out;         // [M, N]
  float* part;       // [S, tiles, 16, 64]
  int32_t* arrived;  // [tiles], zero before and after the kernel
  const int32_t* row_adapter;
  int64_t left_m, weight_n, up_r, up_n, down_r, down_k, out_m;
  int32_t m, n, k, r, k_slice;
  float scale, lora_bias_scale;
  uint32_t flags;
};

constexpr int kMaxColumnBlocks = 16;

// Sixteen columns of shrink's output, from up to sixteen rows of one projection's adapter.
struct ColumnBlock {
  const void* right;  // [valid, K]
  int32_t valid;      // 1 to 16; the other columns become zero
  float scale;
};

struct ShrinkParams {
  const void* left;  // [M, K]
  void* out;         // [M, 16 · blocks], dtype of left
  const int32_t* active_rows;
  const int32_t* active_count;
  const int64_t* seed;
  int64_t left_m, left_k, right_r, right_k, out_m;
  int32_t k, blocks;
  uint32_t threshold, flags;
  ColumnBlock columns[kMaxColumnBlocks];
};

struct ExpandParams {
  const void* low;  // [M, R16]; padding columns hold zeros
  const void* up;   // [R, N] by strides, adapter dtype
  const void* lora_bias;
  void* out;  // [M, N] by strides
  const int32_t* active_rows;
  const int32_t* active_count;
  const int64_t* seed;
  int64_t low_m, up_r, up_n, out_m, out_n;
  int32_t n, r;
  float lora_bias_scale;
  uint32_t threshold, flags;
};

struct GradParams {
  const void* wide;  // [M, P] by strides
  const void* low;   // [M, R16]; padding columns hold zeros
  float* part;       // [S, P, R16]
  const int32_t* active_rows;
  const int32_t* active_count;
  const int64_t* seed;
  int64_t wide_m, wide_p, low_m;
  int32_t p, r16, split_rows;
  uint32_t threshold, flags;
};

struct GradBParams {
  const void* dy;   // [M, N], rows of 16-byte pieces
  const void* low;  // [M, R16]; padding columns hold zeros
  const void* up;   // lora_b [N, R] by strides, adapter dtype
  float* part;      // [G, N, R16]
  float* low_part;  // [H, slots, R16]
  const int32_t* active_rows;
  const int32_t* active_count;
  int64_t dy_m, low_m, up_n, up_r;
  int32_t n, r, r16, split_rows, slots;
  uint32_t flags;
};

struct ReduceParams {
  const float* part;           // [S, P, R16]
  void* out;                   // [P, R] by strides; float32 or the kernel's dtype
  const int32_t* active_rows;  // row p of `part` goes to row active_rows[p]; null: to row p
  const int32_t* active_count;
  int64_t out_p, out_r;
  int32_t p, r, r16;
  int32_t split_rows;  // active rows of a part; 0: the number of parts is `splits`
  int32_t splits;
  float scale;
  uint32_t flags;
};

}  // namespace alora
