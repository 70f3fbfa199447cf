// Counters in device memory. They are zero, and every kernel that uses some sets them back to zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

namespace alora {

// Hands out slices of zeroed slabs. Kernels that may run at the same time must not share a slice.
// So each stream has its own slice. Each graph also has its own, one for each stream that was
// captured into it, because a graph may be launched on any stream at any time. Kernels of one
// stream, or of one captured stream in a graph, run one after the other and leave their slice
// zeroed.
//
// No memory is freed: a graph may use its slice as long as it exists, and nothing tells this class
// when a graph is destroyed. But slices are small. All slices that one owner ever had are together
// less than four times as large as its largest launch needs (or than kLeast).
class Counters {
 public:
  static constexpr size_t kLeast = 64;         // words of the smallest slice
  static constexpr size_t kSlab = 256 * 1024;  // words of a slab

  using Allocate = std::function<uintptr_t(size_t bytes)>;  // allocates zeroed memory
  using Owner = std::pair<uint64_t, uint64_t>;              // stream and capture; 0: no capture

  // Allocates the first slab.
  explicit Counters(Allocate allocate) : allocate_(std::move(allocate)) { add_slab(kSlab); }

  // The address of the owner's slice, which has at least `words` zeroed words.
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
