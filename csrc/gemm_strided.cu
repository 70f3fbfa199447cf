// The gemm for any strides, any alignment.
#include "gemm.cuh"
#include "registry.h"

using alora::Layout;

#define ALORA_GEMM(type, rows, mi, blocks)                                                        \
  ALORA_KERNEL(masked_lora_gemm_##type##_strided_##rows##_tail_kernel, alora::GemmParams, 256,    \
               blocks, alora::gemm<alora::type, Layout::kStrided, mi, false>)                     \
  ALORA_KERNEL(masked_lora_gemm_##type##_strided_##rows##_onepass_kernel, alora::GemmParams, 256, \
               blocks, alora::gemm<alora::type, Layout::kStrided, mi, true>)

ALORA_GEMM(bf16, 128, 4, 1)
ALORA_GEMM(bf16, 32, 1, 2)
ALORA_GEMM(fp16, 128, 4, 1)
ALORA_GEMM(fp16, 32, 1, 2)
