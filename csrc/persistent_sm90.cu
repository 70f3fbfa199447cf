// Compiles Hopper's persistent kernel for both memory orders of the weight.
#include "persistent_sm90.cuh"
#include "registry.h"

#define ALORA_FUSED_SM90(type)                                                           \
  ALORA_KERNEL(masked_lora_fused_##type##_sm90nk_kernel, alora::FusedSm90Params, 384, 1, \
               alora::fused_sm90<alora::type, false>)                                    \
  ALORA_KERNEL(masked_lora_fused_##type##_sm90kn_kernel, alora::FusedSm90Params, 384, 1, \
               alora::fused_sm90<alora::type, true>)

ALORA_FUSED_SM90(bf16)
ALORA_FUSED_SM90(fp16)
