// Compiles the GEMM with tiles of 128 rows.
#include "gemm.cuh"
#include "registry.h"

ALORA_KERNEL(masked_lora_gemm_bf16_128_kernel, alora::GemmParams, 256, 1,
             alora::gemm<alora::bf16, 4>)
ALORA_KERNEL(masked_lora_gemm_fp16_128_kernel, alora::GemmParams, 256, 1,
             alora::gemm<alora::fp16, 4>)
