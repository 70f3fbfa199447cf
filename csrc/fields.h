// The parameter structs as the compiler lays them out: names, kinds and offsets of their fields.
// `alora_kernels/backends/cuda/params.py` is compared with this when the extension is loaded.
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

// `layout` and the fields of a struct that lies in it at `offset`, called `name`.
inline Layout with(Layout layout, const std::string& name, size_t offset, const Layout& inner) {
  for (const Field& f : inner.fields) {
    layout.fields.push_back({name + "." + f.name, f.kind, offset + f.offset});
  }
  return layout;
}

#define ALORA_FIELD(name) \
  Field { #name, kind_of<decltype(S::name)>(), offsetof(S, name) }

inline Layout gemm_layout() {
  using S = GemmParams;
  return {"GemmParams",
          sizeof(S),
          {ALORA_FIELD(left),      ALORA_FIELD(right),     ALORA_FIELD(bias),
           ALORA_FIELD(low),       ALORA_FIELD(up),        ALORA_FIELD(down),
           ALORA_FIELD(lora_bias), ALORA_FIELD(out),       ALORA_FIELD(low_out),
           ALORA_FIELD(row_adapter), ALORA_FIELD(seed),    ALORA_FIELD(left_m),
           ALORA_FIELD(left_k),    ALORA_FIELD(right_k),   ALORA_FIELD(right_n),
           ALORA_FIELD(low_m),     ALORA_FIELD(up_r),      ALORA_FIELD(up_n),
           ALORA_FIELD(down_r),    ALORA_FIELD(down_k),    ALORA_FIELD(out_m),
           ALORA_FIELD(low_out_m), ALORA_FIELD(m),         ALORA_FIELD(n),
           ALORA_FIELD(k),         ALORA_FIELD(r),         ALORA_FIELD(scale),
           ALORA_FIELD(lora_bias_scale), ALORA_FIELD(threshold), ALORA_FIELD(flags)}};
}

inline Layout gemm_sm90_layout() {
  using S = GemmSm90Params;
  return {"GemmSm90Params",
          sizeof(S),
          {ALORA_FIELD(left),      ALORA_FIELD(right),      ALORA_FIELD(low),
           ALORA_FIELD(up),        ALORA_FIELD(out),        ALORA_FIELD(bias),
           ALORA_FIELD(up_values), ALORA_FIELD(lora_bias),  ALORA_FIELD(out_values),
           ALORA_FIELD(row_adapter), ALORA_FIELD(seed),     ALORA_FIELD(up_r),
           ALORA_FIELD(up_n),      ALORA_FIELD(out_m),      ALORA_FIELD(m),
           ALORA_FIELD(n),         ALORA_FIELD(k),          ALORA_FIELD(r),
           ALORA_FIELD(lora_bias_scale), ALORA_FIELD(threshold), ALORA_FIELD(flags)}};
}

inline Layout onepass_sm90_layout() {
  using S = OnePassSm90Params;
  const Layout own = {"OnePassSm90Params",
                      sizeof(S),
                      {ALORA_FIELD(down), ALORA_FIELD(down_values), ALORA_FIELD(low_out),
                       ALORA_FIELD(down_r), ALORA_FIELD(down_k), ALORA_FIELD(low_m),
                       ALORA_FIELD(scale)}};
  return with(own, "gemm", offsetof(S, gemm), gemm_sm90_layout());
}

inline Layout fused_sm90_layout() {
  using S = FusedSm90Params;
  const Layout own = {"FusedSm90Params",
                      sizeof(S),
                      {ALORA_FIELD(down), ALORA_FIELD(down_values), ALORA_FIELD(low_out),
                       ALORA_FIELD(active_rows), ALORA_FIELD(active_count), ALORA_FIELD(ready),
                       ALORA_FIELD(down_r), ALORA_FIELD(down_k), ALORA_FIELD(low_m),
                       ALORA_FIELD(scale)}};
  return with(own, "gemm", offsetof(S, gemm), gemm_sm90_layout());
}

inline Layout decode_layout() {
  using S = DecodeParams;
  return {"DecodeParams",
          sizeof(S),
          {ALORA_FIELD(left),   ALORA_FIELD(weight),  ALORA_FIELD(bias),
           ALORA_FIELD(up),     ALORA_FIELD(down),    ALORA_FIELD(lora_bias),
           ALORA_FIELD(out),    ALORA_FIELD(part),    ALORA_FIELD(arrived),
           ALORA_FIELD(row_adapter), ALORA_FIELD(left_m), ALORA_FIELD(weight_n),
           ALORA_FIELD(up_r),   ALORA_FIELD(up_n),    ALORA_FIELD(down_r),
           ALORA_FIELD(down_k), ALORA_FIELD(out_m),   ALORA_FIELD(m),
           ALORA_FIELD(n),      ALORA_FIELD(k),       ALORA_FIELD(r),
           ALORA_FIELD(k_slice), ALORA_FIELD(scale),  ALORA_FIELD(lora_bias_scale),
           ALORA_FIELD(flags)}};
}

inline Layout column_layout() {
  using S = ColumnBlock;
  return {"ColumnBlock",
          sizeof(S),
          {ALORA_FIELD(right), ALORA_FIELD(valid), ALORA_FIELD(scale)}};
}

inline Layout shrink_layout() {
  using S = ShrinkParams;
  Layout own = {"ShrinkParams",
                sizeof(S),
                {ALORA_FIELD(left), ALORA_FIELD(out), ALORA_FIELD(active_rows),
                 ALORA_FIELD(active_count), ALORA_FIELD(seed), ALORA_FIELD(left_m),
                 ALORA_FIELD(left_k), ALORA_FIELD(right_r), ALORA_FIELD(right_k),
                 ALORA_FIELD(out_m), ALORA_FIELD(k), ALORA_FIELD(blocks), ALORA_FIELD(threshold),
                 ALORA_FIELD(flags)}};
  for (int i = 0; i < kMaxColumnBlocks; ++i) {
    own = with(std::move(own), "columns[" + std::to_string(i) + "]",
               offsetof(S, columns) + i * sizeof(ColumnBlock), column_layout());
  }
  return own;
}

inline Layout expand_layout() {
  using S = ExpandParams;
  return {"ExpandParams",
          sizeof(S),
          {ALORA_FIELD(low), ALORA_FIELD(up), ALORA_FIELD(lora_bias), ALORA_FIELD(out),
           ALORA_FIELD(active_rows), ALORA_FIELD(active_count), ALORA_FIELD(seed),
           ALORA_FIELD(low_m), ALORA_FIELD(up_r), ALORA_FIELD(up_n), ALORA_FIELD(out_m),
           ALORA_FIELD(out_n), ALORA_FIELD(n), ALORA_FIELD(r), ALORA_FIELD(lora_bias_scale),
           ALORA_FIELD(threshold), ALORA_FIELD(flags)}};
}

inline Layout grad_layout() {
  using S = GradParams;
  return {"GradParams",
          sizeof(S),
          {ALORA_FIELD(wide), ALORA_FIELD(low), ALORA_FIELD(part), ALORA_FIELD(active_rows),
           ALORA_FIELD(active_count), ALORA_FIELD(seed), ALORA_FIELD(wide_m),
           ALORA_FIELD(wide_p), ALORA_FIELD(low_m), ALORA_FIELD(p), ALORA_FIELD(r16),
           ALORA_FIELD(split_rows), ALORA_FIELD(threshold), ALORA_FIELD(flags)}};
}

inline Layout grad_b_layout() {
  using S = GradBParams;
  return {"GradBParams",
          sizeof(S),
          {ALORA_FIELD(dy), ALORA_FIELD(low), ALORA_FIELD(up), ALORA_FIELD(part),
           ALORA_FIELD(low_part), ALORA_FIELD(active_rows), ALORA_FIELD(active_count),
           ALORA_FIELD(dy_m), ALORA_FIELD(low_m), ALORA_FIELD(up_n), ALORA_FIELD(up_r),
           ALORA_FIELD(n), ALORA_FIELD(r), ALORA_FIELD(r16), ALORA_FIELD(split_rows),
           ALORA_FIELD(slots), ALORA_FIELD(flags)}};
}

inline Layout reduce_layout() {
  using S = ReduceParams;
  return {"ReduceParams",
          sizeof(S),
          {ALORA_FIELD(part), ALORA_FIELD(out), ALORA_FIELD(active_rows),
           ALORA_FIELD(active_count), ALORA_FIELD(out_p), ALORA_FIELD(out_r), ALORA_FIELD(p),
           ALORA_FIELD(r), ALORA_FIELD(r16), ALORA_FIELD(split_rows), ALORA_FIELD(splits),
           ALORA_FIELD(scale), ALORA_FIELD(flags)}};
}

#undef ALORA_FIELD

inline std::vector<Layout> layouts() {
  return {gemm_layout(),   gemm_sm90_layout(), onepass_sm90_layout(), fused_sm90_layout(),
          decode_layout(), shrink_layout(),    expand_layout(),       grad_layout(),
          grad_b_layout(), reduce_layout()};
}

// The bits of `flags` by their names here.
inline std::vector<std::pair<std::string, uint32_t>> flag_bits() {
  return {{"kAdapterFloat", kAdapterFloat}, {"kDropout", kDropout},
          {"kAdd", kAdd},                   {"kActiveOnly", kActiveOnly},
          {"kVectorAdapter", kVectorAdapter}, {"kVectorOut", kVectorOut},
          {"kFloatOut", kFloatOut},         {"kConvertUp", kConvertUp},
          {"kPairsAdapter", kPairsAdapter}, {"kConvertDown", kConvertDown},
          {"kVectorUp", kVectorUp},         {"kAlongN", kAlongN},
          {"kStrided", kStrided},           {"kOnePass", kOnePass}};
}

}  // namespace alora
