// Flags in global memory by which blocks of one grid wait for each other.
#pragma once

#include "common.cuh"

namespace alora {

// Adds to a flag; who acquires the new value sees all that this thread and those that it has met
// at a barrier have written.
__device__ __forceinline__ void release_add(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
// Adds without ordering anything else; returns what was there.
__device__ __forceinline__ uint32_t add_relaxed(uint32_t* flag, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(flag), "r"(value)
               : "memory");
  return before;
}
__device__ __forceinline__ void store_relaxed(uint32_t* flag, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Orders what this thread has seen written by ordinary stores, in any memory, before copies by
// tensor map and wgmma that follow.
__device__ __forceinline__ void fence_async_proxy_everywhere() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace alora
