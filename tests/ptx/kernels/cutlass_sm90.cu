// A CUTLASS GEMM for sm_90a (TMA, warp-specialised, ping-pong or cooperative) and, as a host
// program that needs no driver, its launch: prints grid, block, shared bytes, cluster and the
// parameters.
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

// Tensor maps in the interpreter's own format (tests/ptx/maps.py).
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type,
                                           cuuint32_t rank, void* address, const cuuint64_t* dims,
                                           const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t*, CUtensorMapInterleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  unsigned char raw[128] = {};
  memcpy(raw, &address, 8);
  raw[8] = rank - 1;
  // CUtensorMapDataType to the codes of PTX.
  const unsigned char codes[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};
  raw[9] = codes[type];
  raw[10] = swizzle;
  for (unsigned i = 0; i < rank; ++i) {
    unsigned dim = dims[i];
    memcpy(raw + 16 + 4 * i, &dim, 4);
    memcpy(raw + 36 + 4 * i, &box[i], 4);
    if (i) memcpy(raw + 56 + 8 * i, &strides[i - 1], 8);
  }
  memcpy(map, raw, 128);
  return CUDA_SUCCESS;
}

using namespace cute;
using Element = cutlass::bfloat16_t;
using TileShape = Shape<_64, _64, _64>;
using ClusterShape = Shape<Int<CLUSTER>, _1, _1>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
    8, Element, cutlass::layout::RowMajor, 8, cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8,
    Element, cutlass::layout::ColumnMajor, 8, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCount<3>,
    cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;

// Named in a function that is never called: that instantiates it.
auto instantiated() { return &cutlass::device_kernel<Kernel>; }

int main(int argc, char** argv) {
  int m = atoi(argv[1]), n = atoi(argv[2]), k = atoi(argv[3]);
  auto at = [&](int i) { return reinterpret_cast<Element*>(strtoull(argv[i], nullptr, 0)); };
  auto a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
  auto b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
  auto d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1});
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = atoi(argv[7]);
  hardware.max_active_clusters = hardware.sm_count / CLUSTER;
  typename Kernel::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {m, n, k, 1},
                                       {at(4), a, at(5), b},
                                       {{1.0f, 0.0f}, nullptr, {}, at(6), d},
                                       hardware};
  auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  dim3 grid = Kernel::get_grid_shape(params), block = Kernel::get_block_shape();
  printf("%d %d %d %d %d %d 1 1 ", grid.x, grid.y, grid.z, block.x, Kernel::SharedStorageSize,
         CLUSTER);
  for (size_t i = 0; i < sizeof(params); ++i)
    printf("%02x", reinterpret_cast<unsigned char*>(&params)[i]);
  printf("\n");
}
