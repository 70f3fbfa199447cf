// The list of kernels by name. Each .cu file adds its own; the binding and the tests read it.
#pragma once

namespace alora {

struct Entry {
  const char* name;
  const void* function;
};

class Registry {
 public:
  static constexpr int kCapacity = 256;
  static Registry& get() {
    static Registry registry;
    return registry;
  }
  Entry entries[kCapacity];
  int count = 0;
};

struct Register {
  Register(const char* name, const void* function) {
    Registry& r = Registry::get();
    if (r.count < Registry::kCapacity) r.entries[r.count++] = {name, function};
  }
};

}  // namespace alora

// Defines and registers the `extern "C"` kernel `name`, which calls the given function with its
// parameters. `blocks` blocks of it should fit on a multiprocessor.
#define ALORA_KERNEL(name, Params, threads, blocks, ...)        \
  extern "C" __global__ void __launch_bounds__(threads, blocks) \
      name(const __grid_constant__ Params p) {                  \
    __VA_ARGS__(p);                                             \
  }                                                             \
  static const alora::Register register_##name(#name, reinterpret_cast<const void*>(&name));
