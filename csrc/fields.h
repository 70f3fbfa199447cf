// The layout of the parameter structs as the compiler sees it: names, kinds and offsets of fields.
// Python compares it with `alora_kernels/backends/cuda/params.py` when it loads the extension.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "params.h"

namespace alora {

struct Field {
  std::string name;
  char kind;  // P a pointer, q i I f as in Python's struct, M a tensor map
  size_t offset;
};

struct Layout {
  std::string name;
  size_t size;
  std::vector<Field> fields;
};

template <class T>
constexpr char kind_of() {
  if constexpr (std::is_pointer_v<T>) return 'P';
  if constexpr (std::is_same_v<T, int64_t>) return 'q';
  if constexpr (std::is_same_v<T, int32_t>) return 'i';
  if constexpr (std::is_same_v<T, uint32_t>) return 'I';
  if constexpr (std::is_same_v<T, float>) return 'f';
  if constexpr (std::is_same_v<T, TensorMap>) return 'M';
  return '?';
}

// Appends the fields of `inner`, a member called `name` at `offset` in the struct, to `layout`.
inline Layout with(Layout layout, const std::string& name, size_t offset, const Layout& inner) {
  for (const Field& f : inner.fields) {
    layout.fields.push_back({name + "." + f.name, f.kind, offset + f.offset});
  }
  return layout;
}

#define FIELD(name) \
  Field { #name, kind_of<decltype(S::name)>(), offsetof(S, name) }

inline Layout gemm_layout() {
  using S = GemmParams;
  return {"GemmParams",
          sizeof(S),
          {FIELD(left),      FIELD(right),       FIELD(bias),      FIELD(low),
           FIELD(up),        FIELD(down),        FIELD(lora_bias), FIELD(out),
           FIELD(low_out),   FIELD(row_adapter), FIELD(seed),      FIELD(left_m),
           FIELD(left_k),    FIELD(right_k),     FIELD(right_n),   FIELD(low_m),
           FIELD(up_r),      FIELD(up_n),        FIELD(down_r),    FIELD(down_k),
           FIELD(out_m),     FIELD(low_out_m),   FIELD(m),         FIELD(n),
           FIELD(k),         FIELD(r),           FIELD(scale),     FIELD(lora_bias_scale),
           FIELD(threshold), FIELD(flags)}};
}

inline Layout gemm_sm90_layout() {
  using S = GemmSm90Params;
  return {"GemmSm90Params",
          sizeof(S),
          {FIELD(left),
           FIELD(right),
           FIELD(low),
           FIELD(up),
           FIELD(out),
           FIELD(bias),
           FIELD(up_values),
           FIELD(lora_bias),
           FIELD(out_values),
           FIELD(row_adapter),
           FIELD(seed),
           FIELD(up_r),
           FIELD(up_n),
           FIELD(out_m),
           FIELD(m),
           FIELD(n),
           FIELD(k),
           FIELD(r),
           FIELD(lora_bias_scale),
           FIELD(threshold),
           FIELD(flags)}};
}

inline Layout onepass_sm90_layout() {
  using S = OnePassSm90Params;
  const Layout own = {"OnePassSm90Params",
                      sizeof(S),
                      {FIELD(down), FIELD(down_values), FIELD(low_out), FIELD(down_r),
                       FIELD(down_k), FIELD(low_m), FIELD(scale)}};
  return with(own, "gemm", offsetof(S, gemm), gemm_sm90_layout());
}

inline Layout fused_sm90_layout() {
  using S = FusedSm90Params;
  const Layout own = {
      "FusedSm90Params",
      sizeof(S),
      {FIELD(down), FIELD(down_values), FIELD(low_out), FIELD(active_rows), FIELD(active_count),
       FIELD(ready), FIELD(down_r), FIELD(down_k), FIELD(low_m), FIELD(scale)}};
  return with(own, "gemm", offsetof(S, gemm), gemm_sm90_layout());
}

inline Layout decode_layout() {
  using S = DecodeParams;
  return {"DecodeParams",
          sizeof(S),
          {FIELD(left),    FIELD(weight),      FIELD(bias),   FIELD(up),
           FIELD(down),    FIELD(lora_bias),   FIELD(out),    FIELD(part),
           FIELD(arrived), FIELD(row_adapter), FIELD(left_m), FIELD(weight_n),
           FIELD(up_r),    FIELD(up_n),        FIELD(down_r), FIELD(down_k),
           FIELD(out_m),   FIELD(m),           FIELD(n),      FIELD(k),
           FIELD(r),       FIELD(k_slice),     FIELD(scale),  FIELD(lora_bias_scale),
           FIELD(flags)}};
}

inline Layout column_layout() {
  using S = ColumnBlock;
  return {"ColumnBlock", sizeof(S), {FIELD(right), FIELD(valid), FIELD(scale)}};
}

inline Layout shrink_layout() {
  using S = ShrinkParams;
  Layout own = {"ShrinkParams",
                sizeof(S),
                {FIELD(left), FIELD(out), FIELD(active_rows), FIELD(active_count), FIELD(seed),
                 FIELD(left_m), FIELD(left_k), FIELD(right_r), FIELD(right_k), FIELD(out_m),
                 FIELD(k), FIELD(blocks), FIELD(threshold), FIELD(flags)}};
  for (int i = 0; i < kMaxColumnBlocks; ++i) {
    own = with(std::move(own), "columns[" + std::to_string(i) + "]",
               offsetof(S, columns) + i * sizeof(ColumnBlock), column_layout());
  }
  return own;
}

inline Layout expand_layout() {
  using S = ExpandParams;
  return {
      "ExpandParams",
      sizeof(S),
      {FIELD(low), FIELD(up), FIELD(lora_bias), FIELD(out), FIELD(active_rows), FIELD(active_count),
       FIELD(seed), FIELD(low_m), FIELD(up_r), FIELD(up_n), FIELD(out_m), FIELD(out_n), FIELD(n),
       FIELD(r), FIELD(lora_bias_scale), FIELD(threshold), FIELD(flags)}};
}

inline Layout grad_layout() {
  using S = GradParams;
  return {"GradParams",
          sizeof(S),
          {FIELD(wide), FIELD(low), FIELD(part), FIELD(active_rows), FIELD(active_count),
           FIELD(seed), FIELD(wide_m), FIELD(wide_p), FIELD(low_m), FIELD(p), FIELD(r16),
           FIELD(split_rows), FIELD(threshold), FIELD(flags)}};
}

inline Layout grad_b_layout() {
  using S = GradBParams;
  return {"GradBParams",
          sizeof(S),
          {FIELD(dy), FIELD(low), FIELD(up), FIELD(part), FIELD(low_part), FIELD(active_rows),
           FIELD(active_count), FIELD(dy_m), FIELD(low_m), FIELD(up_n), FIELD(up_r), FIELD(n),
           FIELD(r), FIELD(r16), FIELD(split_rows), FIELD(slots), FIELD(flags)}};
}

inline Layout reduce_layout() {
  using S = ReduceParams;
  return {"ReduceParams",
          sizeof(S),
          {FIELD(part), FIELD(out), FIELD(active_rows), FIELD(active_count), FIELD(out_p),
           FIELD(out_r), FIELD(p), FIELD(r), FIELD(r16), FIELD(split_rows), FIELD(splits),
           FIELD(scale), FIELD(flags)}};
}

#undef FIELD

inline std::vector<Layout> layouts() {
  return {gemm_layout(),   gemm_sm90_layout(), onepass_sm90_layout(), fused_sm90_layout(),
          decode_layout(), shrink_layout(),    expand_layout(),       grad_layout(),
          grad_b_layout(), reduce_layout()};
}

// The names and bits of `Flags`.
inline std::vector<std::pair<std::string, uint32_t>> flag_bits() {
  return {{"kAdapterFloat", kAdapterFloat},
          {"kDropout", kDropout},
          {"kAdd", kAdd},
          {"kActiveOnly", kActiveOnly},
          {"kVectorAdapter", kVectorAdapter},
          {"kVectorOut", kVectorOut},
          {"kFloatOut", kFloatOut},
          {"kConvertUp", kConvertUp},
          {"kPairsAdapter", kPairsAdapter},
          {"kConvertDown", kConvertDown},
          {"kVectorUp", kVectorUp},
          {"kAlongN", kAlongN},
          {"kStrided", kStrided},
          {"kOnePass", kOnePass}};
}

}  // namespace alora
