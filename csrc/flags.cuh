// Flags in global memory with which blocks of one grid wait for each other.
#pragma once

#include "common.cuh"

namespace alora {

// Adds to a flag. A thread that acquires the new value sees all writes of this thread, and of the
// threads that met this thread at a barrier before.
__device__ __forceinline__ void release_add(uint32_t* flag, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Reads a flag and orders nothing. After a loop that polls a flag so, use fence_acquire.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void fence_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Adds without ordering any other access; returns the former value.
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
// Orders ordinary stores to global memory, those of this thread and those that it has seen, before
// copies by tensor map that follow. Writers and readers both use it: that is how CUTLASS passes
// data from stores to copies; the reader alone would do by the rules, but is little tried.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace alora
