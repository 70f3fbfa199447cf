"""Touched place: vLLM's LoRA ops.

On a CPU vLLM gathers A and B once for each row, and takes the index −1 ("no adapter") for the last
slot. `AloraWrapperCPU` replaces that wrapper: vLLM asks its platform for the name of the class.

On a GPU vLLM's Triton ops skip −1 already, and they stay. `ALORA_VLLM_OPS=1` puts this package's
kernels behind `add_lora_linear` there. Embeddings, logits and fully sharded layers stay vLLM's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .patch import Touch, wrap

VARIABLE = "ALORA_VLLM_OPS"

_CPU = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU."
_GPU = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU."
_INIT = "(self, max_num_batched_tokens, max_batches, device, **kwargs)"
_UPDATE = "(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)"
_LINEAR = (
    "(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs)"
)
_OVERRIDDEN = {
    "__init__": _INIT,
    "update_metadata": _UPDATE,
    "_update_base_metadata": "(self, mapping, lora_index_to_id, max_loras, vocab_size)",
    "add_shrink": "(self, y, x, lora_a_stacked, scale, **kwargs)",
    "add_expand": (
        "(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs)"
    ),
    "add_lora_embedding": "(self, y, x, lora_b_stacked, add_inputs=True, **kwargs)",
    "add_lora_linear": _LINEAR,
    "add_lora_logits": (
        "(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs)"
    ),
    "apply_lora_full_linear": "(self, y, x, weight_stacked, bias_stacked, module_enabled)",
    "_select_full_linear_output": "(self, y, adapter_y, bias_stacked, module_enabled)",
}

CHOICE = Touch(
    "vllm.platforms.cpu.CpuPlatform.get_punica_wrapper",
    "(cls)",
    "vLLM's CPU LoRA ops copy A and B for every token and read −1 as the last adapter",
)
ON_CPU = tuple(
    Touch(_CPU + name, parameters, "a subclass overrides or calls it: " + CHOICE.reason)
    for name, parameters in _OVERRIDDEN.items()
)
ON_GPU = tuple(
    Touch(_GPU + name, parameters, f"{VARIABLE}=1 runs this package's kernels on a GPU")
    for name, parameters in (
        ("__init__", _INIT),
        ("update_metadata", _UPDATE),
        ("add_lora_linear", _LINEAR),
    )
)


def on_gpu() -> bool:
    """Whether the user asked for this package's kernels on a GPU."""
    given = os.environ.get(VARIABLE, "0")
    if given not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={given!r}: expected 0 (vLLM's ops) or 1 (this package's)")
    return given == "1"


TOUCHED: tuple[Touch, ...] = (CHOICE, *ON_CPU, *(ON_GPU if on_gpu() else ()))


def install() -> None:
    """Puts the CPU wrapper in place, and with `ALORA_VLLM_OPS=1` the linear op on a GPU."""
    wrap(CHOICE, _cpu_wrapper)
    if on_gpu():
        for touch, make in zip(ON_GPU, (_with_rows, _updating_rows, _with_our_kernels)):
            wrap(touch, make)


def _cpu_wrapper(function: Callable[[Any], str]) -> Callable[[Any], str]:
    def get_punica_wrapper(cls: Any) -> str:
        return "alora_kernels.vllm.wrappers.AloraWrapperCPU"

    return get_punica_wrapper


def _with_rows(function: Callable[..., None]) -> Callable[..., None]:
    from .lora_gpu import DeviceRows

    def __init__(
        self: Any, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any
    ) -> None:
        function(self, max_num_batched_tokens, max_batches, device, **kwargs)
        # Not at the first batch: a graph may be captured before it, and must read these tensors.
        self.alora_rows = DeviceRows(self.max_loras, max_num_batched_tokens, device)

    return __init__


def _updating_rows(function: Callable[..., None]) -> Callable[..., None]:
    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        function(self, *args, **kwargs)
        self.alora_rows.update(self.token_lora_indices)

    return update_metadata


def _with_our_kernels(function: Callable[..., None]) -> Callable[..., None]:
    import torch

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        if not kwargs.get("add_inputs", True) or y.dtype != x.dtype:
            # vLLM's second stream passes a y that is to be overwritten, and a float32 head reads
            # 16-bit rows. The kernels serve neither of them.
            function(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        rows = self.alora_rows
        torch.ops.alora_kernels_vllm.add_linear(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            list(lora_a_stacked),
            list(lora_b_stacked),
            rows.row_adapter,
            rows.active_rows,
            rows.active_count,
            float(scale),
            list(output_slices),
        )

    return add_lora_linear
