"""One architecture with two adapters, ready for every check."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alora_kernels.peft import accelerate

from .definition import Definition, strays, weights_of
from .models import FIRST, LAST, Architecture, base_model

INVOCATIONS = {"ask": [5, 6, 7], "sum": [8, 9]}
LENGTH, START = 23, 12  # of a row and of its invocation; no size of a small model is 23
NEAR = 5e-4  # of the largest logit: some models round to float32 inside
# In some families PEFT takes these names for the parameters of fused experts, where it has no
# activated LoRA.
OF_EXPERTS = tuple(
    f".{name}"
    for name in (
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "router.gate",
        "w1",
        "w2",
        "w3",
    )
)
# PEFT refuses to adapt their out_proj.
MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


class Subject:
    """One architecture: its base model, the adapters on it, and the definition of both.

    Attributes:
        near: how far logits may lie apart, as a part of the largest one.
        strays: linear layers for which the definition cannot be written, with the reason; the
            adapters leave them out, except in the check of that name.
        without: why other linear layers are left out.
    """

    def __init__(
        self, arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        self.arch, self.seed = arch, seed
        torch.manual_seed(seed + 1)
        self.ids = torch.randint(FIRST, LAST, (2, LENGTH))
        self.ids[0, START : START + 3] = torch.tensor(INVOCATIONS["ask"])
        self.ids[1, START + 1 : START + 4] = torch.tensor(INVOCATIONS["ask"])
        self.starts = [START, START + 1]
        self.without = ""
        try:
            self._make(dtype)
        except RuntimeError:  # some models cast to float32 by hand
            self._make(torch.float32)
        kept = [path for path in self.linear if path not in self.strays]
        self.stock: Any = None
        if not kept:
            return
        try:
            self.stock = adapted(self.base, kept)
        except ValueError:
            kept = [path for path in kept if path in self.ran and not path.endswith(OF_EXPERTS)]
            self.stock = adapted(self.base, kept)
            self.without = "PEFT takes its MLP's names for its experts' parameters"
        self.definition = Definition(
            self.base, {name: weights_of(self.stock, name) for name in INVOCATIONS}
        )

    def _make(self, dtype: torch.dtype) -> None:
        self.near = NEAR if dtype is torch.float64 else 4 * NEAR
        self.base = base_model(self.arch, self.seed, dtype)
        self.linear = _linear_layers(self.base)
        self.strays, self.ran = strays(self.base, self.linear, self.ids)

    def accelerated(self) -> Any:
        """A model of its own for each check: nothing of one check reaches the next."""
        return accelerate(copy.deepcopy(self.stock))

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """The mask, and the position ids where this model takes them."""
        names = self.base.forward.__code__.co_varnames
        found = {"attention_mask": mask}
        if "position_ids" in names:
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return found


def _linear_layers(base: Any) -> list[str]:
    """Every linear layer but the output layer. (PEFT's "all-linear" asks for the experts'
    parameters too, where it has no activated LoRA.)"""
    output = base.get_output_embeddings()
    linear = [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]
    if base.config.model_type in MAMBA:
        return [path for path in linear if not path.endswith("out_proj")]
    return linear


def _lora(name: str, targets: str) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights=False,
        alora_invocation_tokens=INVOCATIONS[name],
    )


def adapted(base: Any, targets: list[str]) -> Any:
    """A PEFT model with both adapters, whose matrices keep the size of what they read."""
    pattern = "|".join(path.replace(".", r"\.") for path in targets)
    model = get_peft_model(copy.deepcopy(base), _lora("ask", pattern), adapter_name="ask")
    model.add_adapter("sum", _lora("sum", pattern))
    model.set_adapter("ask")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.7 / parameter.shape[1] ** 0.5)
    return model.to(next(base.parameters()).dtype).eval()
