"""The definition of an activated LoRA, written out by hooks on the base model alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def defined(
    model: Any, base: Any, starts: Sequence[int | None], name: str = "default", off: Any = ()
) -> Any:
    """A copy of `base` whose projections add the part of adapter `name` from `starts` on.

    Right for forwards of whole rows without a cache.

    Args:
        model: the PEFT model whose adapter it is.
        base: the model without adapters.
        starts: the first active column of each row; None for a row of the base model.
        off: names, or parts of names, of modules that never see the tokens.
    """
    copied = copy.deepcopy(base)
    for path, layer in model.get_base_model().named_modules():
        if name in getattr(layer, "lora_A", {}) and not any(part in path for part in off):
            copied.get_submodule(path).register_forward_hook(_part(layer, name, starts))
    return copied


def _part(layer: Any, name: str, starts: Sequence[int | None]) -> Any:
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]

    def add(_: nn.Module, args: Any, y: Tensor) -> Tensor:
        x = args[0]
        column = torch.arange(x.shape[-2])
        begin = torch.tensor([10**9 if s is None else s for s in starts])
        on = (column >= begin.unsqueeze(1)).view(len(begin), *(1,) * (x.dim() - 3), -1, 1)
        return torch.where(on, y + b(a(x)) * scaling, y)

    return add


def greedy(
    model: Any, ids: Tensor, tokens: int, mask: Tensor | None = None, bad: Sequence[int] = ()
) -> Tensor:
    """`tokens` greedy tokens other than `bad`, each from a forward of the whole row."""
    for _ in range(tokens):
        inputs = {"input_ids": ids}
        if mask is not None:
            inputs["attention_mask"] = mask
            mask = torch.cat([mask, mask[:, -1:]], 1)
            inputs["position_ids"] = (mask[:, :-1].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        logits[..., list(bad)] = -torch.inf
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids
