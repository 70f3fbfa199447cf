// CUTLASS's GEMM with the tile, warps and stages of csrc/gemm.cuh, compiled for its main loop
// alone.
#include "cutlass/gemm/device/gemm.h"

using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
#if ALONG_N
using Right = Row;
#else
using Right = cutlass::layout::ColumnMajor;
#endif
using Gemm = cutlass::gemm::device::Gemm<
    Element, Row, Element, Right, Element, Row, float, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 32>,
    cutlass::gemm::GemmShape<64, 32, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 4>;

template __global__ void cutlass::Kernel<Gemm::GemmKernel>(Gemm::GemmKernel::Params);
