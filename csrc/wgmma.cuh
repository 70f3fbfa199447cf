// Hopper's wgmma: d [64, N] += a [64, 16] · b [16, N]. `a` is in shared memory, given by a
// descriptor, or in registers. `b` is in shared memory. A lane of warp w has the rows r = 16w +
// lane/4 and r + 8 of d: d[4j + 2h + i] is row r + 8h, column 8j + 2·(lane mod 4) + i. If `a` is in
// registers, a[2j + h] has row r + 8h, columns 8j + 2·(lane mod 4) and the next one. `d` may be
// longer than the N/2 of the instruction. Only files named *_sm90.cu may include this file.
#pragma once

#include "common.cuh"

namespace alora {

template <typename T, int kN>
struct Wgmma;

// For each N, the accumulators in the text of the instruction, and as operands of the asm
// statement.
#define ALORA_D_64                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ALORA_D_128                                                                  \
  ALORA_D_64                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ALORA_D_192                                                                  \
  ALORA_D_128                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ALORA_D_208 ALORA_D_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define ALORA_D_224 ALORA_D_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define ALORA_D_240 ALORA_D_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define ALORA_D_256 ALORA_D_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define ALORA_REGISTERS_64                                                                        \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define ALORA_REGISTERS_128                                                                      \
  ALORA_REGISTERS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),           \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
      "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), \
      "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), \
      "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define ALORA_REGISTERS_192                                                                      \
  ALORA_REGISTERS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]),          \
      "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), \
      "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), \
      "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), \
      "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define ALORA_REGISTERS_208                                                              \
  ALORA_REGISTERS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), \
      "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define ALORA_REGISTERS_224                                                                  \
  ALORA_REGISTERS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), \
      "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define ALORA_REGISTERS_240                                                                  \
  ALORA_REGISTERS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), \
      "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define ALORA_REGISTERS_256                                                                  \
  ALORA_REGISTERS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), \
      "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// The other operands in the text: both tiles by descriptor, or the left one in registers.
#define ALORA_SHARED_64 "%32, %33, 1, 1, 1, 0, %34;"
#define ALORA_SHARED_128 "%64, %65, 1, 1, 1, 0, %66;"
#define ALORA_SHARED_192 "%96, %97, 1, 1, 1, 0, %98;"
#define ALORA_SHARED_208 "%104, %105, 1, 1, 1, 0, %106;"
#define ALORA_SHARED_224 "%112, %113, 1, 1, 1, 0, %114;"
#define ALORA_SHARED_240 "%120, %121, 1, 1, 1, 0, %122;"
#define ALORA_SHARED_256 "%128, %129, 1, 1, 1, 0, %130;"
#define ALORA_MIXED_64 "{%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
#define ALORA_MIXED_128 "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
#define ALORA_MIXED_192 "{%96, %97, %98, %99}, %100, 1, 1, 1, %101;"
#define ALORA_MIXED_208 "{%104, %105, %106, %107}, %108, 1, 1, 1, %109;"
#define ALORA_MIXED_224 "{%112, %113, %114, %115}, %116, 1, 1, 1, %117;"
#define ALORA_MIXED_240 "{%120, %121, %122, %123}, %124, 1, 1, 1, %125;"
#define ALORA_MIXED_256 "{%128, %129, %130, %131}, %132, 1, 1, 1, %133;"

#define ALORA_WGMMA(T, types, n)                                                                 \
  template <>                                                                                    \
  struct Wgmma<T, n> {                                                                           \
    template <int kTransposeB, int kSize>                                                        \
    static __device__ __forceinline__ void multiply(float (&d)[kSize], uint64_t a, uint64_t b) { \
      static_assert(kSize >= n / 2, "too few accumulators");                                     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" ALORA_D_##n      \
                   "}, " ALORA_SHARED_##n                                                        \
                   : ALORA_REGISTERS_##n                                                         \
                   : "l"(a), "l"(b), "n"(kTransposeB));                                          \
    }                                                                                            \
    template <int kTransposeB, int kSize>                                                        \
    static __device__ __forceinline__ void multiply(float (&d)[kSize], const uint32_t (&a)[4],   \
                                                    uint64_t b) {                                \
      static_assert(kSize >= n / 2, "too few accumulators");                                     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" ALORA_D_##n      \
                   "}, " ALORA_MIXED_##n                                                         \
                   : ALORA_REGISTERS_##n                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposeB));      \
    }                                                                                            \
  };

ALORA_WGMMA(bf16, "bf16.bf16", 64)
ALORA_WGMMA(fp16, "f16.f16", 64)
ALORA_WGMMA(bf16, "bf16.bf16", 128)
ALORA_WGMMA(fp16, "f16.f16", 128)
ALORA_WGMMA(bf16, "bf16.bf16", 192)
ALORA_WGMMA(fp16, "f16.f16", 192)
ALORA_WGMMA(bf16, "bf16.bf16", 208)
ALORA_WGMMA(fp16, "f16.f16", 208)
ALORA_WGMMA(bf16, "bf16.bf16", 224)
ALORA_WGMMA(fp16, "f16.f16", 224)
ALORA_WGMMA(bf16, "bf16.bf16", 240)
ALORA_WGMMA(fp16, "f16.f16", 240)
ALORA_WGMMA(bf16, "bf16.bf16", 256)
ALORA_WGMMA(fp16, "f16.f16", 256)

#undef ALORA_WGMMA

// Ties the accumulators to this place in the text: without it the compiler may move their reads and
// writes past a fence or a wait, which name no registers. No instruction comes of it.
template <int kCount>
__device__ __forceinline__ void hold(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}
// Orders this warpgroup's earlier accesses to registers and shared memory before its next wgmma.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&acc)[kCount]) {
  hold(acc);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are under way; the accumulators may then be read.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&acc)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  hold(acc);
}

}  // namespace alora
