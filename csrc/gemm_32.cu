// Compiles the GEMM with tiles of 32 rows.
#include "gemm.cuh"
#include "registry.h"

ALORA_KERNEL(masked_lora_gemm_bf16_32_kernel, alora::GemmParams, 256, 2,
             alora::gemm<alora::bf16, 1>)
ALORA_KERNEL(masked_lora_gemm_fp16_32_kernel, alora::GemmParams, 256, 2,
             alora::gemm<alora::fp16, 1>)
