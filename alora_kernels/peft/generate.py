"""Runs `generate` with the starts of its adapters, which are found once, in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, find_invocation_starts
from . import caches
from .adapters import Adapters
from .cache_record import (
    CacheRecord,
    Chunk,
    continued_starts,
    forget,
    kept_starts,
    recall,
    write_record,
)
from .generation import Generation, Starts
from .requests import Request, current_request, requesting, rows_of
from .sequences import Sequences


class generation(requesting):
    """A context for one `generate` call; its forwards take the starts found in the prompt.

    It removes `adapter_names` and `alora_offsets` from `kwargs`.
    """

    def __init__(self, sequences: Sequences, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running, request = begin(sequences, args, kwargs)
        self.given = caches.among(kwargs) is not None
        super().__init__(request)

    def __enter__(self) -> generation:  # type: ignore[override]
        super().__enter__()
        return self

    def finish(self, result: Any) -> Any:
        """Leave a true record on a cache that outlives `generate`; returns `result`.

        The record that the forwards wrote may be wrong: beam search moves rows, and compiled
        forwards write no record.
        """
        cache = caches.of_output(result)
        if cache is None and self.given:
            cache = self.running.cache
        length = None if cache is None else caches.length_of(cache)
        if length is not None and int(length):
            assert self.request is not None
            if recall(cache, int(length), self.request.adapters.key) is None:
                self._rewrite(cache, int(length), result)
        return result

    def _rewrite(self, cache: Any, length: int, result: Any) -> None:
        assert self.request is not None
        adapters, running = self.request.adapters, self.running
        bits = caches.fingerprint(cache, length)
        if bits is None:
            forget(cache)
            return
        names, row_names = _adapters(self.request, len(bits))
        rows = {name: running.starts_of(name) for name in names if adapters.invocation(name)}
        if any(not r or len(bits) % len(r) for r in rows.values()):
            forget(cache)
            return
        starts = {}
        for name, told in rows.items():
            repeated = [s for s in told or () for _ in range(len(bits) // len(told or ()))]
            mine = [name] * len(bits) if row_names is None else row_names
            starts[name] = [s if n == name else None for s, n in zip(repeated, mine)]
        ids = result.get("sequences") if isinstance(result, dict) else result
        whole = running.prompt is not None and not running.before
        if isinstance(ids, Tensor) and whole and len(ids) == len(bits) and ids.shape[1] >= length:
            chunk = Chunk(length, ids[:, :length], bits)
        else:
            chunk = Chunk(length, None, bits)
        write_record(cache, CacheRecord(0, adapters.key, (chunk,), starts))


def check_batching(adapters: Adapters) -> None:
    """Refuse continuous batching if it would run the wrong adapter.

    It runs in its own thread, which no scope reaches, so a chosen adapter would be ignored. And it
    packs tokens of many sequences into each forward, over a paged cache that does not know where
    a sequence began, so an activated LoRA cannot run.

    Raises:
        NotImplementedError: an adapter is chosen, or an activated LoRA is active.
    """
    request = current_request(adapters)
    if request is not None and (request.chosen or request.generation is None):
        raise NotImplementedError(
            "generate_batch: continuous batching runs in a thread of its own, which adapter_scope "
            "and adapter_names do not reach; choose the adapter by model.set_adapter or "
            "disable_adapter(), or use generate"
        )
    for name in adapters.active_names():
        if adapters.invocation(name) is not None:
            raise NotImplementedError(
                f"generate_batch: adapter {name!r} is an Activated LoRA, and a forward of "
                "continuous batching packs tokens of many sequences over a paged cache, so where "
                "each one's invocation began is not known; use generate with a padded batch, "
                "Session.ask, or vLLM (`alora_kernels.vllm`); or make a plain LoRA active, or "
                "disable_adapter()"
            )


def begin(
    sequences: Sequences, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Generation, Request]:
    """The `Generation` for these arguments of `generate`, and the request under which it runs."""
    outer = current_request(sequences.adapters)
    names = kwargs.pop("adapter_names", None)
    offsets = kwargs.pop("alora_offsets", None)
    chosen, picked = names is not None, names
    if outer is not None:
        offsets = outer.offsets if offsets is None else offsets
        if not chosen:
            chosen, picked = outer.chosen, outer.names
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    ids = ids if isinstance(ids, Tensor) else None
    if ids is not None and ids.dim() == 1:
        ids = ids.unsqueeze(0)
    embeds = kwargs.get("inputs_embeds")
    if ids is not None and ids.shape[1] == 0 and embeds is not None:
        ids = None
    running = Generation(ids, custom=kwargs.get("custom_generate") is not None)
    request = Request(sequences.adapters, chosen, picked, generation=running)
    rows = embeds if ids is None else ids
    if outer is not None and outer.starts is not None and names is None and offsets is None:
        running.every = list(outer.starts)
    elif outer is not None and outer.activation is not None and names is None and offsets is None:
        running.every = _starts_in(outer.activation, rows)
    if rows is not None:
        _find(sequences, request, running, rows, kwargs, offsets)
    return running, request


def _adapters(request: Request, batch: int) -> tuple[tuple[str, ...], list[str | None] | None]:
    if request.chosen:
        return rows_of(request.names, batch)
    return request.adapters.active_names(), None


def _find(
    sequences: Sequences,
    request: Request,
    running: Generation,
    rows: Tensor,
    kwargs: dict[str, Any],
    offsets: Sequence[int | None] | None,
) -> None:
    """Find where the adapters of the prompt `rows` begin."""
    adapters, ids = request.adapters, running.prompt
    batch, width = rows.shape[:2]
    names, row_names = _adapters(request, batch) if running.every is None else ((), None)
    invocations = {n: t for n in names if (t := adapters.invocation(n)) is not None}
    if not invocations:
        return
    cache = caches.among(kwargs)
    length = caches.length_of(cache)
    record = None
    if length is None or int(length):
        record = recall(cache, None if length is None else int(length), adapters.key)
    if length is None and record is None:
        raise sequences.lengthless(next(iter(invocations)), cache)
    past = record.length if length is None else int(length)  # type: ignore[union-attr]
    mask = kwargs.get("attention_mask")
    longer = isinstance(mask, Tensor) and mask.shape[1] != width
    if past and (longer or width <= past or length is None):
        running.before = running.position = past  # the rows are the new tokens alone
    assistant = bool(getattr(kwargs.get("generation_config"), "is_assistant", False))
    for name, tokens in invocations.items():
        if offsets is not None:
            if len(offsets) != batch:
                raise ValueError(
                    f"alora_offsets has {len(offsets)} items for {batch} prompts; give one "
                    "for each prompt (None for the base model)"
                )
            end = running.before + width
            starts = [None if not o or o < 0 else max(end - int(o), 0) for o in offsets]
        elif ids is None:
            raise ValueError(
                f"adapter {name!r}: generate got inputs_embeds alone, in which its invocation "
                "cannot be found; pass input_ids, or alora_offsets (from the end of the row)"
            )
        elif running.before:
            starts = continued_starts(name, tokens, ids, past, record, batch)
        else:
            starts = [None if s < 0 else s for s in find_invocation_starts(ids, tokens).tolist()]
            if past:
                starts = kept_starts(name, starts, past, record, row_names, assistant)
            else:
                sequences.look(row_names, name, starts)
        running.starts[name] = starts


def _starts_in(activation: Activation, rows: Tensor | None) -> Starts:
    """The starts that describe the same rows as `activation`.

    Raises:
        ValueError: no starts do.
    """
    if activation.num_active in (0, activation.num_rows):
        return [None if activation.num_active == 0 else 0]
    if rows is not None and activation.num_rows == rows.shape[0] * rows.shape[1]:
        mask = activation.mask.view(rows.shape[:2]).cpu()
        width = mask.shape[1]
        starts = (width - mask.sum(1)).tolist()
        if torch.equal(mask, torch.arange(width) >= torch.tensor(starts).unsqueeze(1)):
            return [None if s == width else s for s in starts]
    raise ValueError(
        "adapter_scope: generate goes on after the prompt, so an activation for it has one row for "
        "each token of the prompt, and a row that is active stays so to the end; give starts=[...]"
    )
