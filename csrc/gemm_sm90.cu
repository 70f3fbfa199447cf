// Compiles Hopper's GEMM for both memory orders of the weight.
#include "gemm_sm90.cuh"
#include "registry.h"

#define ALORA_GEMM_SM90(type, columns)                                                          \
  ALORA_KERNEL(masked_lora_gemm_##type##_sm90nk_##columns##_tail_kernel, alora::GemmSm90Params, \
               384, 1, alora::gemm_sm90<alora::type, false, columns>)                           \
  ALORA_KERNEL(masked_lora_gemm_##type##_sm90kn_##columns##_tail_kernel, alora::GemmSm90Params, \
               384, 1, alora::gemm_sm90<alora::type, true, columns>)

ALORA_GEMM_SM90(bf16, 256)
ALORA_GEMM_SM90(bf16, 128)
ALORA_GEMM_SM90(fp16, 256)
ALORA_GEMM_SM90(fp16, 128)
