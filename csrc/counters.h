// Zeros on a device that kernels count with and set back to zero when they end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

namespace alora {

// Hands out slices of zeroed slabs. Kernels that may run at one time must not share a slice, so
// each stream has its own, and each graph has its own for each stream that was captured into it: a
// graph may be launched on any stream, at any time. Kernels of one stream, or of one stream's part
// of a graph, run one after the other and leave their slice as they found it.
//
// Nothing is ever given back: a slice may be in use for as long as a graph lives, which nobody
// tells. Slices are small instead: all that one owner ever had are less than four times the words
// of its largest launch.
class Counters {
 public:
  static constexpr size_t kLeast = 64;         // words of a slice
  static constexpr size_t kSlab = 256 * 1024;  // words of a slab

  using Allocate = std::function<uintptr_t(size_t bytes)>;  // of zeroed memory
  using Owner = std::pair<uint64_t, uint64_t>;              // stream and capture; 0: no capture

  // Makes the first slab.
  explicit Counters(Allocate allocate) : allocate_(std::move(allocate)) { add_slab(kSlab); }

  // The address of at least `words` zeros of the owner's own.
  uintptr_t take(Owner owner, size_t words) {
    Slice& slice = slices_[owner];
    if (slice.words < words) {
      size_t needed = kLeast;
      while (needed < words) needed *= 2;
      if (left_ < needed) add_slab(needed > kSlab ? needed : kSlab);
      slice = {next_, needed};
      next_ += 4 * needed;
      left_ -= needed;
    }
    return slice.address;
  }

 private:
  struct Slice {
    uintptr_t address = 0;
    size_t words = 0;
  };

  void add_slab(size_t words) {
    next_ = allocate_(4 * words);
    left_ = words;
  }

  Allocate allocate_;
  std::map<Owner, Slice> slices_;
  uintptr_t next_ = 0;
  size_t left_ = 0;  // words
};

}  // namespace alora
