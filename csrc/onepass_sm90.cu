// Compiles Hopper's onepass for each R16: 16, 32, 48, 64.
#include "onepass_sm90.cuh"
#include "registry.h"

#define ALORA_ONEPASS_SM90(type, columns)                                                      \
  ALORA_KERNEL(masked_lora_onepass_##type##_sm90_##columns##_kernel, alora::OnePassSm90Params, \
               384, 1, alora::onepass_sm90<alora::type, columns>)

ALORA_ONEPASS_SM90(bf16, 240)
ALORA_ONEPASS_SM90(bf16, 224)
ALORA_ONEPASS_SM90(bf16, 208)
ALORA_ONEPASS_SM90(bf16, 192)
ALORA_ONEPASS_SM90(fp16, 240)
ALORA_ONEPASS_SM90(fp16, 224)
ALORA_ONEPASS_SM90(fp16, 208)
ALORA_ONEPASS_SM90(fp16, 192)
