// The module alora_kernels._cuda: kernels by name, launched with a block of parameter bytes.
// It knows addresses, sizes and streams as integers, and nothing of torch.
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

// `params` is the kernel's parameter struct. The GIL is kept: nothing here waits for the device.
void launch(std::string_view name, unsigned grid_x, unsigned grid_y, unsigned grid_z,
            unsigned block, int shared, std::string_view params, int device, uintptr_t stream) {
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
  check(cudaLaunchKernelExC(&config, kernel.function, arguments), "launch of " + std::string(name));
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
             py::arg("device"), py::arg("stream"));
  module.def("kernel_names", &kernel_names, "Names of all kernels, sorted.");
  module.def("versions", &versions, "(driver, runtime) as 1000 · major + 10 · minor.");
  py::dict sizes;
  sizes["GemmParams"] = sizeof(GemmParams);
  sizes["ShrinkParams"] = sizeof(ShrinkParams);
  sizes["ExpandParams"] = sizeof(ExpandParams);
  sizes["GradParams"] = sizeof(GradParams);
  sizes["ReduceParams"] = sizeof(ReduceParams);
  module.attr("param_sizes") = sizes;
}
