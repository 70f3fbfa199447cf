"""An activated LoRA by definition: the base model, and hooks that add the adapter's part.

    y = base(x) + scaling · on ⊙ ((x Aᵀ) Bᵀ),   on: tokens at or after the adapter's start

Nothing of PEFT or of this package runs in it. Rows of x are told apart by their position in the
sequence, so a layer that reads the whole latent cache is right as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, tuple[Tensor, Tensor, float]]  # by layer: A [R, K], B [N, R], scaling


def weights_of(model: Any, adapter: str) -> Weights:
    """Copies of the matrices of `adapter` in a PEFT model, by the names of the base model."""
    found: Weights = {}
    for path, layer in model.get_base_model().named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            found[path] = (a.detach().clone(), b.detach().clone(), layer.scaling[adapter])
    return found


def spread(on: Tensor, lead: Sequence[int], first: int, kept: int = 0) -> Tensor | None:
    """`on [B, all]` for rows `[*lead]` of a layer's input, shaped to multiply its output.

    `first` tokens of `all` lie in a cache, and the layer may read the new ones alone, all, or
    the last `kept` (a part of the output layer). None: the rows are not the sequence's tokens.
    """
    batch, lead = on.shape[0], list(lead)
    for mask in (on[:, first:], on, *([on[:, -kept:]] if kept else [])):
        tokens = mask.shape[1]
        for shape in (lead, lead[1:] if lead[:1] == [1] else None):
            if shape is None:
                continue
            extra = (1,) * (len(lead) - len(shape))
            if shape[:2] == [batch, tokens]:
                return mask.reshape(*extra, batch, tokens, *(1,) * (len(shape) - 2), 1)
            if shape[:2] == [tokens, batch]:
                return mask.t().reshape(*extra, tokens, batch, *(1,) * (len(shape) - 2), 1)
            if shape == [batch * tokens]:
                return mask.reshape(*extra, batch * tokens, 1)
        if len(lead) > 2 and lead[0] == batch and lead[-1] == tokens:
            return mask.reshape(batch, *(1,) * (len(lead) - 2), tokens, 1)
    return None


class Definition:
    """A base model with the adapters of some rows.

    Args:
        base: the model alone, without PEFT.
        adapters: the matrices of each adapter.
    """

    def __init__(self, base: Any, adapters: dict[str, Weights]) -> None:
        self.base, self.adapters = base, adapters

    @contextmanager
    def running(
        self, names: Sequence[str | None], starts: Sequence[int | None], cached: bool = False
    ) -> Iterator[Any]:
        """The base model with hooks; `names` and `starts` for each row of its batches.

        With `cached` each forward goes on where the one before ended.
        """
        seen = {"first": 0, "new": 0, "kept": 0}

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            seen["first"] = seen["first"] + seen["new"] if cached else 0
            seen["new"] = ids.shape[1]
            keep = kwargs.get("logits_to_keep")
            seen["kept"] = keep if isinstance(keep, int) else 0

        def add_to(path: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
                x, first = args[0], seen["first"]
                position = torch.arange(first + seen["new"])
                for name, weights in self.adapters.items():
                    begins = [s if n == name else None for n, s in zip(names, starts)]
                    if path not in weights or all(b is None for b in begins):
                        continue
                    far = first + seen["new"]
                    begin = torch.tensor([far if b is None else b for b in begins])
                    on = spread(position >= begin.unsqueeze(1), x.shape[:-1], first, seen["kept"])
                    if on is None:
                        raise RowsUnknown(path, tuple(x.shape))
                    a, b, scaling = weights[path]
                    a, b = a.to(x.dtype), b.to(x.dtype)
                    y = y + on.to(x.dtype) * (scaling * ((x @ a.t()) @ b.t()))
                return y

            return hook

        paths = {path for weights in self.adapters.values() for path in weights}
        handles = [self.base.register_forward_pre_hook(count, with_kwargs=True)]
        handles += [
            self.base.get_submodule(path).register_forward_hook(add_to(path)) for path in paths
        ]
        try:
            yield self.base
        finally:
            for handle in handles:
                handle.remove()

    def logits(
        self, ids: Tensor, names: Sequence[str | None], starts: Sequence[int | None]
    ) -> Tensor:
        """Of whole rows, from scratch, without a cache."""
        with self.running(names, starts) as base:
            return base(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def greedy(
        self, ids: Tensor, names: Sequence[str | None], starts: Sequence[int | None], tokens: int
    ) -> Tensor:
        """The logits `[B, tokens, V]` of a greedy answer, each from scratch."""
        steps = []
        for _ in range(tokens):
            steps.append(self.logits(ids, names, starts)[:, -1])
            ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
        return torch.stack(steps, 1)


class RowsUnknown(Exception):
    """A layer reads rows that are not the sequence's tokens."""

    def __init__(self, path: str, shape: tuple[int, ...]) -> None:
        super().__init__(f"{path} reads {shape}")
        self.path = path


@torch.no_grad()
def strays(base: Any, paths: Sequence[str], ids: Tensor) -> tuple[dict[str, str], set[str]]:
    """The layers for which the definition cannot be written, each with the reason; all that ran."""
    batch, tokens = ids.shape
    found: dict[str, str] = {}
    ran: set[str] = set()

    def look(path: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], y: Any) -> None:
            ran.add(path)
            x = args[0] if args else None
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                found[path] = "its input or output is no tensor"
            elif spread(torch.ones(batch, tokens), x.shape[:-1], 0) is None:
                found[path] = f"it reads rows {list(x.shape[:-1])} of {batch} × {tokens} tokens"
            elif x.shape[:-1] != y.shape[:-1] or y.shape[-1] != outputs_of(layer):
                found[path] = f"it makes {list(y.shape)} of {list(x.shape)}"

        return hook

    handles = [base.get_submodule(path).register_forward_hook(look(path)) for path in paths]
    try:
        base(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found, ran


def outputs_of(layer: Any) -> int:
    """N of a Linear or of transformers' Conv1D."""
    return layer.nf if hasattr(layer, "nf") else layer.out_features
