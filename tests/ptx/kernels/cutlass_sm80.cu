// A CUTLASS GEMM for sm_80 (mma.sync, cp.async in three stages) and, as a host program that needs
// no driver, its launch: prints grid, block, shared bytes, cluster and the parameters as hex.
#include <cstdio>
#include <cstdlib>

#include "cutlass/gemm/device/gemm.h"

using Element = cutlass::bfloat16_t;
using Gemm = cutlass::gemm::device::Gemm<
    Element, cutlass::layout::RowMajor, Element, cutlass::layout::ColumnMajor, Element,
    cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<32, 32, 32>,
    cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3>;
using Kernel = Gemm::GemmKernel;

template __global__ void cutlass::Kernel<Kernel>(Kernel::Params);

int main(int argc, char** argv) {
  int m = atoi(argv[1]), n = atoi(argv[2]), k = atoi(argv[3]);
  auto at = [&](int i) { return reinterpret_cast<Element*>(strtoull(argv[i], nullptr, 0)); };
  cutlass::gemm::GemmCoord problem(m, n, k);
  Gemm::ThreadblockSwizzle swizzle;
  auto tiles = swizzle.get_tiled_shape(
      problem, {Gemm::ThreadblockShape::kM, Gemm::ThreadblockShape::kN, Gemm::ThreadblockShape::kK},
      1);
  Kernel::Params params{problem,    tiles,      {at(4), k},  {at(5), k},
                        {at(6), n}, {at(6), n}, {1.0f, 0.0f}};
  dim3 grid = swizzle.get_grid_shape(tiles);
  printf("%d %d %d %d %zu 1 1 1 ", grid.x, grid.y, grid.z, Kernel::kThreadCount,
         sizeof(Kernel::SharedStorage));
  for (size_t i = 0; i < sizeof(params); ++i)
    printf("%02x", reinterpret_cast<unsigned char*>(&params)[i]);
  printf("\n");
}
