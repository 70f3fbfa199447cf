// Helpers for all kernels: element types, asynchronous copies, tensor-core fragments, swizzles,
// Philox.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "params.h"

namespace alora {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float v) {
  return __float2half_rn(v);
}

// Lets the next kernel begin, if it was launched as a programmatic dependent. It still waits for
// the end of this grid before it reads this grid's results.
__device__ __forceinline__ void allow_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Rounds two elements into one register, `first` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float first, float second) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
  return d;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float first, float second) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
  return d;
}

template <typename T>
__device__ __forceinline__ uint32_t bits(T v) {
  return *reinterpret_cast<uint16_t*>(&v);
}

// One element of an adapter, rounded to T.
template <typename T>
__device__ __forceinline__ T adapter_at(const void* base, int64_t offset, bool is_float) {
  if (is_float) return from_float<T>(static_cast<const float*>(base)[offset]);
  return static_cast<const T*>(base)[offset];
}

template <typename T>
__device__ __forceinline__ float adapter_float(const void* base, int64_t offset, bool is_float) {
  return is_float ? static_cast<const float*>(base)[offset]
                  : to_float(static_cast<const T*>(base)[offset]);
}

// Eight elements of an adapter from 16-byte-aligned memory, rounded to T.
template <typename T>
__device__ __forceinline__ uint4 adapter_vector(const void* base, int64_t offset, bool is_float) {
  if (!is_float) {
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(base) + offset);
  }
  const float4* at = reinterpret_cast<const float4*>(static_cast<const float*>(base) + offset);
  const float4 a = at[0], b = at[1];
  return make_uint4(pack<T>(a.x, a.y), pack<T>(a.z, a.w), pack<T>(b.x, b.y), pack<T>(b.z, b.w));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes from global to shared memory. If `valid` is false, writes zeros and does not read
// `src`.
__device__ __forceinline__ void copy_async(uint32_t dst, const void* src, bool valid) {
  const int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(size)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
template <typename T>
__device__ __forceinline__ void store_shared_element(uint32_t at, T v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(*reinterpret_cast<uint16_t*>(&v))
               : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

// Copies eight elements of an adapter from 16-byte-aligned memory to shared memory, rounded to T;
// writes zeros if `valid` is false. The copy is asynchronous if the dtype needs no conversion.
template <typename T>
__device__ __forceinline__ void copy_adapter(uint32_t to, const void* base, int64_t offset,
                                             bool valid, bool is_float) {
  if (is_float) {
    store_shared(to, valid ? adapter_vector<T>(base, offset, true) : make_uint4(0, 0, 0, 0));
  } else {
    copy_async(to, static_cast<const T*>(base) + (valid ? offset : 0), valid);
  }
}

__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(at)
               : "memory");
}

// d += a · b, where a is 16×16, b is 16×8 and d is 16×8.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
template <>
__device__ __forceinline__ void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte offset of the 16-byte chunk `chunk` of `row`, in a tile of 64-byte rows. Two rows share a
// line of 128 bytes, so the swizzle changes with every second row.
__device__ __forceinline__ uint32_t swizzle64(int row, int chunk) {
  return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}
// The same offset in a tile of rows of `kBytes`, a multiple of 128.
template <int kBytes>
__device__ __forceinline__ uint32_t swizzle(int row, int chunk) {
  static_assert(kBytes % 128 == 0, "the swizzle permutes the eight chunks of 128 bytes");
  return row * kBytes + ((chunk ^ (row & 7)) << 4);
}

// Philox4x32-10 with counter (column ÷ 4, row, 0, 0): four words for four neighbouring columns.
__device__ __forceinline__ uint4 philox(int64_t seed, uint32_t column_group, uint32_t row) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint4 c = make_uint4(column_group, row, 0, 0);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Applies dropout to v, the elements (row, column .. column + 7): dropped ones become zero.
// `column` is a multiple of 8.
__device__ __forceinline__ uint4 drop(uint4 v, int64_t seed, uint32_t threshold, int column,
                                      int row) {
  const uint4 a = philox(seed, column / 4, row), b = philox(seed, column / 4 + 1, row);
  const auto select = [&](uint32_t pair, uint32_t low_word, uint32_t high_word) {
    return pair &
           ((low_word >= threshold ? 0xFFFFu : 0u) | (high_word >= threshold ? 0xFFFF0000u : 0u));
  };
  return make_uint4(select(v.x, a.x, a.y), select(v.y, a.z, a.w), select(v.z, b.x, b.y),
                    select(v.w, b.z, b.w));
}

// Stores the first `valid` of eight neighbouring elements to global memory. `vector`: the address
// allows a store of all eight at once.
template <typename T>
__device__ __forceinline__ void store_row(T* at, uint4 v, int valid, bool vector) {
  if (vector && valid >= 8) {
    *reinterpret_cast<uint4*>(at) = v;
    return;
  }
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= valid) continue;
    reinterpret_cast<uint16_t*>(at)[i] =
        static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2]);
  }
}

// Tells the compiler that all lanes have the same value.
__device__ __forceinline__ uint32_t uniform(uint32_t v) { return __shfl_sync(~0u, v, 0); }

// Loads eight elements (at, at + stride, ...). Only the first `valid` exist; the others are zero.
template <typename T>
__device__ __forceinline__ uint4 gather(const T* at, int64_t stride, int valid) {
  uint32_t e[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) e[i] = i < valid ? bits(at[i * stride]) : 0u;
  return make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
}

template <typename T>
__device__ __forceinline__ uint4 gather_adapter(const void* base, int64_t offset, int64_t stride,
                                                int valid, bool is_float) {
  uint32_t e[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    e[i] = i < valid ? bits(adapter_at<T>(base, offset + i * stride, is_float)) : 0u;
  }
  return make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
}

// gather_adapter, but by 16-byte loads if `vector` (the address allows them) and all eight exist.
template <typename T>
__device__ __forceinline__ uint4 adapter_chunk(const void* base, int64_t offset, int64_t stride,
                                               int valid, bool is_float, bool vector) {
  return vector && valid >= 8 ? adapter_vector<T>(base, offset, is_float)
                              : gather_adapter<T>(base, offset, stride, valid, is_float);
}

}  // namespace alora
