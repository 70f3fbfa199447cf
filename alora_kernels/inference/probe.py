"""A model's first `ask`: two tokens of a batch are compared with those of its rows alone.

The shared attention checks in every forward what it can see. This finds the rest: positions that a
model counts in the cache, rows that change each other, and states beside the cache.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .attending import implementation_of
from .options import Settings
from .shared_prefix import SharedPrefixError
from .turns import Turn

# How far two orders of summation may differ. Models in float64 compute some parts in float32.
_FINE = 4096 * torch.finfo(torch.float32).eps
_COARSE = 0.05

_lock = threading.Lock()
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Any, str | None]] = weakref.WeakKeyDictionary()

Answering = Callable[[Any, Settings], Any]


class _Two(Settings):
    """Settings for two greedy tokens and their logits, whatever else is in effect."""

    def keywords(self) -> dict[str, Any]:
        nothing = ("generation_config", "max_time", "max_length", "eos_token_id", "min_new_tokens")
        return {
            **super().keywords(),
            **dict.fromkeys((*nothing, "stop_strings")),
            "min_length": 0,
            "max_new_tokens": 2,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }

    @property
    def stop_strings(self) -> list[str]:
        return []


def first_use_problem(
    model: nn.Module,
    cache: Cache,
    turns: Sequence[Turn],
    settings: Settings,
    batch: Answering,
    alone: Answering,
) -> str | None:
    """Why the batch of `turns` does not answer as they do one by one, or None.

    The verdict is kept with the model, for what it can depend on: the forwards of its modules, the
    config, the attention, the dtype, autocast, whether rows are padded, and the length of the
    context up to a power of two.

    Args:
        batch: answers all turns at once with the given settings, and returns the logits of each
            token. It returns no cache, since that would stay alive.
        alone: answers one turn, and returns its logits.
    """
    key = _key(model, cache, turns)
    with _lock:
        known = _verdicts.setdefault(model, {})
        if key in known:
            return known[key]
    two = _Two(settings.options, settings.own, settings.tokenizer, settings.where)
    try:
        problem = _compared(model, turns, two, batch, alone)
    except SharedPrefixError as error:
        problem = str(error)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"a batch fails: {type(error).__name__}: {error}"  # not kept: the next call may work
    with _lock:
        known[key] = problem
    return problem


def _compared(
    model: Any, turns: Sequence[Turn], two: Settings, batch: Answering, alone: Answering
) -> str | None:
    lengths = [len(turn.suffix) for turn in turns]
    together = batch(turns, two)
    for row in {lengths.index(max(lengths)), lengths.index(min(lengths))}:
        single = alone(turns[row], two)
        for step, (all_rows, one) in enumerate(zip(together, single)):
            if not _close(all_rows[row], one[0], _tolerance(model)):
                return (
                    f"token {step + 1} of a row of {lengths[row]} tokens has other logits in a "
                    f"batch of rows of {min(lengths)} to {max(lengths)} tokens than alone"
                )
            if all_rows[row].argmax() != one[0].argmax():
                break
    return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors of logits differ little, compared with how much logits vary."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(a[~finite], b[~finite]):
        return False
    a, b = a[finite], b[finite]
    spread = (b - b.mean()).square().mean().sqrt() + b.abs().mean() * 1e-3
    return bool((a - b).square().mean().sqrt() <= tolerance * spread)


def _tolerance(model: Any) -> float:
    exact = not _autocast(model.device.type)
    if model.device.type != "cpu":
        exact = exact and torch.get_float32_matmul_precision() == "highest"
    if not exact or model.dtype not in (torch.float32, torch.float64):
        return _COARSE
    return _FINE


def _autocast(device: str) -> str:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""


def _key(model: Any, cache: Cache, turns: Sequence[Turn]) -> Any:
    lengths = {len(turn.suffix) for turn in turns}
    return (
        tuple(_forward_of(module) for module in model.modules()),
        json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        implementation_of(model.config.get_text_config(decoder=True)),
        str(model.dtype),
        str(model.device),
        _autocast(model.device.type),
        len(lengths) > 1,
        cache.get_seq_length().bit_length(),
    )


def _forward_of(module: nn.Module) -> Any:
    """The function that runs a module.

    A function of the module's own may hold the model, so only a weak reference to it is kept.
    """
    own = module.__dict__.get("forward")
    return type(module).forward if own is None else weakref.ref(own)
