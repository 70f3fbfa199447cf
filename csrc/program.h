// A program: launches that are complete except for the addresses of a call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.h"
#include "registry.h"

namespace alora {

constexpr int kMaxDevices = 64;
constexpr size_t kMaxParams = 1024;
constexpr int kDefaultShared = 48 * 1024;  // a kernel that uses more must set an attribute

// Kernels by name.
inline const std::unordered_map<std::string_view, const void*>& kernels() {
  static const auto* map = [] {
    auto* made = new std::unordered_map<std::string_view, const void*>;
    const Registry& registry = Registry::get();
    for (int i = 0; i < registry.count; ++i) {
      (*made)[registry.entries[i].name] = registry.entries[i].function;
    }
    return made;
  }();
  return *map;
}

// The address of tensor number `tensor`, plus `shift` bytes, goes to byte `offset` of the
// parameters.
struct Slot {
  size_t offset;
  size_t tensor;
  uint64_t shift;
};

struct MapSlot {
  Slot slot;
  MapShape shape;
};

struct CounterSlot {
  size_t offset;
  size_t words;
};

// One launch without addresses. `params` is the kernel's parameter struct. A `dependent` kernel may
// begin while the previous one ends, and waits for that end by griddepcontrol. The blocks of a
// `cooperative` kernel wait for each other, so the launch fails if they cannot all run at once.
struct Launch {
  std::string name;
  unsigned grid[3];
  unsigned block;
  int shared;
  bool dependent, cooperative;
  std::string params;
  std::vector<Slot> addresses;
  std::vector<MapSlot> maps;
  std::vector<CounterSlot> counters;
  const void* function = nullptr;
};

using Addresses = std::vector<uint64_t>;

// A sequence of launches. It contains no address, no stream and no device.
class Program {
 public:
  // `residues`: the address of each tensor modulo 16; -1 if it does not matter.
  Program(std::vector<Launch> launches, std::vector<int> residues)
      : launches_(std::move(launches)), residues_(std::move(residues)) {
    for (Launch& launch : launches_) {
      const auto found = kernels().find(launch.name);
      if (found == kernels().end()) {
        throw std::invalid_argument("alora_kernels: no kernel is called " + launch.name);
      }
      launch.function = found->second;
      if (launch.params.size() > kMaxParams) {
        throw std::invalid_argument("alora_kernels: " + std::to_string(launch.params.size()) +
                                    " bytes of parameters, at most " + std::to_string(kMaxParams) +
                                    " are taken");
      }
      for (const Slot& s : launch.addresses) check_slot(launch, s, sizeof(uint64_t));
      for (const MapSlot& m : launch.maps) check_slot(launch, m.slot, sizeof(TensorMap));
      for (const CounterSlot& c : launch.counters) {
        check_slot(launch, {c.offset, 0, 0}, sizeof(uint64_t));
      }
    }
  }

  const std::vector<Launch>& launches() const { return launches_; }

  // Whether the addresses have the alignment that the launches were planned for.
  bool fits(const Addresses& addresses) const {
    if (addresses.size() != residues_.size()) {
      throw std::invalid_argument("alora_kernels: " + std::to_string(addresses.size()) +
                                  " addresses, the program has " +
                                  std::to_string(residues_.size()) + " tensors");
    }
    for (size_t i = 0; i < addresses.size(); ++i) {
      if (residues_[i] >= 0 && addresses[i] % 16 != static_cast<uint64_t>(residues_[i])) {
        return false;
      }
    }
    return true;
  }

  // Writes the parameters of `launch` with addresses into `bytes`; maps and counters stay zero.
  static void fill(const Launch& launch, const Addresses& addresses, unsigned char* bytes) {
    std::memcpy(bytes, launch.params.data(), launch.params.size());
    for (const Slot& s : launch.addresses) {
      const uint64_t address = addresses[s.tensor] + s.shift;
      std::memcpy(bytes + s.offset, &address, sizeof(address));
    }
  }

  // Launches all kernels. Does not wait for the device.
  void run(const Addresses& addresses, int device, cudaStream_t stream) const {
    if (device < 0 || device >= kMaxDevices) {
      throw std::invalid_argument("alora_kernels: device " + std::to_string(device) +
                                  " is outside 0.." + std::to_string(kMaxDevices - 1));
    }
    const Bound bound(device);
    Context& context = Context::current();
    for (const Launch& launch : launches_) {
      alignas(64) unsigned char bytes[kMaxParams];
      fill(launch, addresses, bytes);
      for (const MapSlot& m : launch.maps) {
        encode(m.shape, addresses[m.slot.tensor] + m.slot.shift, bytes + m.slot.offset);
      }
      for (const CounterSlot& c : launch.counters) {
        const uint64_t address = context.counters.take(owner_of(stream), c.words);
        std::memcpy(bytes + c.offset, &address, sizeof(address));
      }
      send(launch, context, bytes, stream);
    }
  }

 private:
  void check_slot(const Launch& launch, const Slot& slot, size_t size) const {
    if (slot.offset + size > launch.params.size() || slot.tensor >= residues_.size()) {
      throw std::invalid_argument(
          "alora_kernels: " + launch.name + ": tensor " + std::to_string(slot.tensor) + " of " +
          std::to_string(residues_.size()) + " at byte " + std::to_string(slot.offset) + " of " +
          std::to_string(launch.params.size()));
    }
  }

  static void send(const Launch& launch, Context& context, unsigned char* bytes,
                   cudaStream_t stream) {
    if (launch.shared > kDefaultShared) {
      int& granted = context.shared[launch.function];
      if (granted < launch.shared) {
        check(cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   launch.shared),
              launch.name + ": " + std::to_string(launch.shared) + " bytes of shared memory");
        granted = launch.shared;
      }
    }
    void* arguments[] = {bytes};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    config.blockDim = dim3(launch.block);
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared);
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (launch.dependent) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    check(cudaLaunchKernelExC(&config, launch.function, arguments), "launch of " + launch.name);
  }

  std::vector<Launch> launches_;
  std::vector<int> residues_;
};

}  // namespace alora
