// The module alora_kernels._cuda: kernels by name, launched with a block of parameter bytes.
// It knows addresses, sizes and streams as integers, and nothing of torch.
#include <cuda.h>
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#include "params.h"
#include "registry.h"

namespace py = pybind11;

namespace alora {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kDefaultShared = 48 * 1024;  // what a kernel may use without asking

void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) {
    throw std::runtime_error("alora_kernels: " + what + ": " + cudaGetErrorString(status));
  }
}

struct Kernel {
  const void* function;
  int shared[kMaxDevices] = {};  // bytes of dynamic shared memory granted on each device
};

std::unordered_map<std::string_view, Kernel>& kernels() {
  static auto* map = [] {
    auto* made = new std::unordered_map<std::string_view, Kernel>;
    const Registry& registry = Registry::get();
    for (int i = 0; i < registry.count; ++i) {
      (*made)[registry.entries[i].name].function = registry.entries[i].function;
    }
    return made;
  }();
  return *map;
}

// Makes `device` current for a launch, and the former one again after it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// `params` is the kernel's parameter struct. A `dependent` kernel may begin while the one before
// it ends, and waits for it by griddepcontrol. The blocks of a `cooperative` one wait for each
// other: all of them are on the device at once, or the launch is an error. The GIL is kept: nothing
// here waits for the device.
void launch(std::string_view name, unsigned grid_x, unsigned grid_y, unsigned grid_z,
            unsigned block, int shared, std::string_view params, int device, uintptr_t stream,
            bool dependent, bool cooperative) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    throw std::invalid_argument("alora_kernels: no kernel is called " + std::string(name));
  }
  if (device < 0 || device >= kMaxDevices) {
    throw std::invalid_argument("alora_kernels: device " + std::to_string(device) +
                                " is outside 0.." + std::to_string(kMaxDevices - 1));
  }
  Kernel& kernel = found->second;
  const DeviceGuard guard(device);
  if (shared > kDefaultShared && kernel.shared[device] < shared) {
    check(
        cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        std::string(name) + ": " + std::to_string(shared) + " bytes of shared memory");
    kernel.shared[device] = shared;
  }
  alignas(64) unsigned char bytes[1024];
  if (params.size() > sizeof(bytes)) {
    throw std::invalid_argument("alora_kernels: " + std::to_string(params.size()) +
                                " bytes of parameters, at most 1024 are taken");
  }
  std::memcpy(bytes, params.data(), params.size());
  void* arguments[] = {bytes};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid_x, grid_y, grid_z);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check(cudaLaunchKernelExC(&config, kernel.function, arguments), "launch of " + std::string(name));
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: this library does not link against the driver.
EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  check(status, "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("alora_kernels: the driver lacks cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<EncodeTiled>(function);
}

// The 128 bytes of a map of a matrix of 16-bit elements with `rows` rows of `columns`, `stride`
// bytes apart. What lies outside the matrix reads as zero and is not written.
py::bytes tensor_map(uint64_t address, bool is_bf16, uint64_t columns, uint64_t rows,
                     uint64_t stride, uint32_t box_columns, uint32_t box_rows) {
  static const EncodeTiled encode = find_encode_tiled();
  alignas(64) CUtensorMap map;
  const cuuint64_t dims[] = {columns, rows}, strides[] = {stride};
  const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
  const CUresult status =
      encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             reinterpret_cast<void*>(address), dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("alora_kernels: no tensor map of [" + std::to_string(rows) + ", " +
                             std::to_string(columns) + "] with rows " + std::to_string(stride) +
                             " bytes apart: CUresult " + std::to_string(status));
  }
  return py::bytes(reinterpret_cast<const char*>(&map), sizeof(map));
}

py::tuple kernel_names() {
  py::list names;
  for (const auto& [name, kernel] : kernels()) names.append(py::str(name.data(), name.size()));
  names.attr("sort")();
  return py::tuple(names);
}

// (driver, runtime) as 1000 · major + 10 · minor; the driver is 0 where none is installed.
py::tuple versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = CUDART_VERSION;
  cudaGetLastError();  // a missing driver is an answer, not an error to keep
  return py::make_tuple(driver, runtime);
}

}  // namespace
}  // namespace alora

PYBIND11_MODULE(_cuda, module) {
  using namespace alora;
  module.doc() = "Launches the CUDA kernels of alora_kernels by name.";
  module.def("launch", &launch, py::arg("name"), py::arg("grid_x"), py::arg("grid_y"),
             py::arg("grid_z"), py::arg("block"), py::arg("shared"), py::arg("params"),
             py::arg("device"), py::arg("stream"), py::arg("dependent") = false,
             py::arg("cooperative") = false);
  module.def("tensor_map", &tensor_map, py::arg("address"), py::arg("is_bf16"), py::arg("columns"),
             py::arg("rows"), py::arg("stride"), py::arg("box_columns"), py::arg("box_rows"));
  module.def("kernel_names", &kernel_names, "Names of all kernels, sorted.");
  module.def("versions", &versions, "(driver, runtime) as 1000 · major + 10 · minor.");
  py::dict sizes;
  sizes["GemmParams"] = sizeof(GemmParams);
  sizes["GemmSm90Params"] = sizeof(GemmSm90Params);
  sizes["FusedSm90Params"] = sizeof(FusedSm90Params);
  sizes["OnePassSm90Params"] = sizeof(OnePassSm90Params);
  sizes["DecodeParams"] = sizeof(DecodeParams);
  sizes["ShrinkParams"] = sizeof(ShrinkParams);
  sizes["ExpandParams"] = sizeof(ExpandParams);
  sizes["GradParams"] = sizeof(GradParams);
  sizes["GradBParams"] = sizeof(GradBParams);
  sizes["ReduceParams"] = sizeof(ReduceParams);
  module.attr("param_sizes") = sizes;
}
