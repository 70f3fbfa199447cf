// The host's calls of CUDA's driver and runtime: errors, contexts, tensor maps, counters.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "counters.h"
#include "params.h"

namespace alora {

inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) {
    throw std::runtime_error("alora_kernels: " + what + ": " + cudaGetErrorString(status));
  }
}

inline void check(CUresult status, const std::string& what) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("alora_kernels: " + what + ": CUresult " + std::to_string(status));
  }
}

// The driver's functions, looked up at run time, because this library does not link against the
// driver.
class Driver {
 public:
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  const decltype(&cuTensorMapEncodeTiled) tensor_map_encode_tiled =
      find<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const decltype(&cuCtxGetDevice) ctx_get_device =
      find<decltype(&cuCtxGetDevice)>("cuCtxGetDevice");
  const decltype(&cuCtxGetId) ctx_get_id = find<decltype(&cuCtxGetId)>("cuCtxGetId");
  const decltype(&cuCtxPushCurrent) ctx_push_current =
      find<decltype(&cuCtxPushCurrent)>("cuCtxPushCurrent");
  const decltype(&cuCtxPopCurrent) ctx_pop_current =
      find<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent");
  const decltype(&cuDevicePrimaryCtxRetain) primary_ctx_retain =
      find<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  const decltype(&cuDevicePrimaryCtxRelease) primary_ctx_release =
      find<decltype(&cuDevicePrimaryCtxRelease)>("cuDevicePrimaryCtxRelease");

 private:
  template <class Function>
  static Function find(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    check(status, name);
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("alora_kernels: the driver lacks " + std::string(name));
    }
    return reinterpret_cast<Function>(function);
  }
};

// Makes a context of `device` current as long as this object exists. If the thread's current
// context belongs to `device`, it stays; otherwise the primary context of `device` is pushed.
// Afterwards the thread has its former context again, or none. So nothing is created on another
// device, and PyTorch's current device does not change.
class Bound {
 public:
  explicit Bound(int device) : device_(device) {
    CUdevice current = -1;
    const Driver& driver = Driver::get();
    if (driver.ctx_get_device(&current) == CUDA_SUCCESS && current == device) return;
    const std::string name = "the context of device " + std::to_string(device);
    CUcontext context = nullptr;
    check(driver.primary_ctx_retain(&context, device), name);
    const CUresult status = driver.ctx_push_current(context);
    if (status != CUDA_SUCCESS) driver.primary_ctx_release(device);
    check(status, name);
    pushed_ = true;
  }
  ~Bound() {
    if (!pushed_) return;
    CUcontext context = nullptr;
    Driver::get().ctx_pop_current(&context);
    Driver::get().primary_ctx_release(device_);
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

 private:
  int device_;
  bool pushed_ = false;
};

// Allocates zeroed memory in the current context. This is safe while a graph is being captured, and
// the graph records nothing of it: the work runs on a separate stream, outside PyTorch's allocator.
inline uintptr_t zeroed(size_t bytes) {
  struct Relaxed {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode), "the mode of capture"); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  } const relaxed;
  struct Stream {
    cudaStream_t stream = nullptr;
    Stream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream"); }
    ~Stream() { cudaStreamDestroy(stream); }
  } const own;
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), std::to_string(bytes) + " bytes of counters");
  cudaError_t status = cudaMemsetAsync(memory, 0, bytes, own.stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(own.stream);
  if (status != cudaSuccess) cudaFree(memory);
  check(status, "counters");
  return reinterpret_cast<uintptr_t>(memory);
}

// The state that belongs to one context of the driver.
struct Context {
  Counters counters{zeroed};
  std::unordered_map<const void*, int> shared;  // dynamic shared memory granted to a kernel

  // The state of the current context. The driver never reuses the id of a context, so the state of
  // a destroyed context is not found again.
  static Context& current() {
    static auto* all = new std::unordered_map<unsigned long long, Context>;
    unsigned long long id = 0;
    check(Driver::get().ctx_get_id(nullptr, &id), "cuCtxGetId");
    return (*all)[id];
  }
};

// The owner of the counters for launches on `stream`.
inline Counters::Owner owner_of(cudaStream_t stream) {
  unsigned long long id = 0, capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  check(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
  return {id, status == cudaStreamCaptureStatusActive ? capture + 1 : 0};
}

// A tensor map without its address: a matrix of 16-bit elements, with rows that are `stride` bytes
// apart. Elements outside the matrix read as zero and are not written.
struct MapShape {
  bool is_bf16;
  uint64_t columns, rows, stride;
  uint32_t box_columns, box_rows;
};

inline void encode(const MapShape& m, uint64_t address, void* out) {
  alignas(64) CUtensorMap map;
  static_assert(sizeof(map) == sizeof(TensorMap));
  const cuuint64_t dims[] = {m.columns, m.rows}, strides[] = {m.stride};
  const cuuint32_t box[] = {m.box_columns, m.box_rows}, steps[] = {1, 1};
  const CUresult status = Driver::get().tensor_map_encode_tiled(
      &map, m.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      reinterpret_cast<void*>(address), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status, "no tensor map of [" + std::to_string(m.rows) + ", " + std::to_string(m.columns) +
                    "] with rows " + std::to_string(m.stride) + " bytes apart");
  std::memcpy(out, &map, sizeof(map));
}

}  // namespace alora
