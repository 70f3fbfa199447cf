// Draws dropout masks by Philox4x32-10 on the CPU (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", 2011). keep_mask in alora_kernels/reference.py defines the result.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FOR_EVERY_X86 __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_X86
#endif

namespace {

constexpr int kRounds = 10;
constexpr int kBlock = 256;  // counters at a time: their four words each stay in the L1 cache
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

// The mask of one row, for 4 * count columns from column 4 * first_group: 1 where word < threshold.
FOR_EVERY_X86 void drop_block(uint64_t seed, uint32_t threshold, uint32_t row, uint32_t first_group,
                              int count, uint8_t* out) {
  uint32_t c0[kBlock], c1[kBlock], c2[kBlock], c3[kBlock];
  for (int i = 0; i < count; ++i) {
    c0[i] = first_group + i;
    c1[i] = row;
    c2[i] = c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    for (int i = 0; i < count; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kMultiplier0;
      const uint64_t p1 = static_cast<uint64_t>(c2[i]) * kMultiplier1;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
  }
  for (int i = 0; i < count; ++i) {
    out[4 * i] = c0[i] < threshold;
    out[4 * i + 1] = c1[i] < threshold;
    out[4 * i + 2] = c2[i] < threshold;
    out[4 * i + 3] = c3[i] < threshold;
  }
}

// out[r, 4 * g + w] = word w of counter (g, rows[r], 0, 0) < threshold; out is uint8
// [num_rows, 4 * num_groups], contiguous; rows is int64 [num_rows].
void drop_mask(uint64_t seed, uint32_t threshold, uintptr_t rows, int64_t num_rows,
               int64_t num_groups, uintptr_t out) {
  const auto* row = reinterpret_cast<const int64_t*>(rows);
  auto* drop = reinterpret_cast<uint8_t*>(out);
  const pybind11::gil_scoped_release without_gil;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t g = 0; g < num_groups; g += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, num_groups - g));
      drop_block(seed, threshold, static_cast<uint32_t>(row[r]), static_cast<uint32_t>(g), count,
                 drop + 4 * (r * num_groups + g));
    }
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.def("drop_mask", &drop_mask, pybind11::arg("seed"), pybind11::arg("threshold"),
             pybind11::arg("rows"), pybind11::arg("num_rows"), pybind11::arg("num_groups"),
             pybind11::arg("out"));
}
