"""generate: where its own sequence begins to be active, and which forwards are its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activation import Activation, find_invocation_starts
from . import caches, records
from .ambient import Request, current_request, requesting
from .refusal import invocation_of
from .rows import rows_of

if TYPE_CHECKING:
    from .acceleration import Acceleration

CHUNKING = "_prefill_chunking"  # where transformers 4.57 prefills in chunks
Starts = Sequence[int | None]


class Called:
    """A model whose `forward` is its call, hooks included."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward = model, model.__call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def skips_hooks(chunking: Any) -> bool:
    """Whether `chunking` calls the model's `forward`, past its hooks."""
    return "forward" in getattr(getattr(chunking, "__code__", None), "co_names", ())


class Prepare:
    """`root.prepare_inputs_for_generation`: what it returns are the inputs of the next forward.

    transformers calls it right before each forward of a generation, and nobody else does. So the
    forward that gets these inputs is `generate`'s own, and any other is not.
    """

    def __init__(self, owner: Acceleration) -> None:
        self.owner = owner

    @property
    def __signature__(self) -> inspect.Signature:  # which transformers reads
        return inspect.signature(self.owner.method("prepare_inputs_for_generation"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.owner.method("prepare_inputs_for_generation")(*args, **kwargs)
        request = current_request(self.owner)
        if request is not None and request.generation is not None and isinstance(inputs, dict):
            request.generation.expect(kwargs.get("input_ids", args[0] if args else None), inputs)
        return inputs


class Generation:
    """One call of `generate`.

    Attributes:
        prompt: its tokens `[B, P]`, if they are known.
        starts: by adapter, the absolute start in each row of the prompt (None = base).
        every: the starts of all adapters, told by `adapter_scope`.
        custom: it runs a method of the user's (`custom_generate`), which may move rows.
        awaited: the inputs of the next own forward are prepared, and it has not come yet.
        before: tokens in its cache before the first that was given.
        position: tokens that its own forwards have read.
        begun: no row has a start that is still to come.
        cache: what its last own forward wrote.
    """

    def __init__(self, prompt: Tensor | None, custom: bool) -> None:
        self.prompt, self.custom = prompt, custom
        self.starts: dict[str, Starts] = {}
        self.every: Starts | None = None
        self.fed: Any = None
        self.width = 0
        self.before = self.position = 0
        self.awaited = self.begun = self.seen = False
        self.cache: Any = None

    def starts_of(self, name: str) -> Starts | None:
        return self.starts.get(name) if self.every is None else self.every

    def expect(self, rows: Any, inputs: dict[str, Any]) -> None:
        """The next own forward gets `inputs`, the last tokens of `rows`."""
        fed = inputs.get("input_ids")
        self.fed = inputs.get("inputs_embeds") if fed is None else fed
        self.width = rows.shape[1] if isinstance(rows, Tensor) else 0
        self.awaited = self.fed is not None

    def owns(self, tokens: Tensor, ids: Tensor | None, cache: Any) -> bool:
        """Whether a forward of `tokens` is this generation's own."""
        if torch.compiler.is_compiling():
            return self.awaited  # only `generate` compiles what it prepared
        length = caches.length_of(cache) if self.custom or not self.seen else None
        fresh = length is not None and not int(length)
        if self.custom and not fresh:
            return False  # its record knows better: rows may have moved
        own = self._is_fed(tokens) or (fresh and self._is_prompt(ids))
        self.seen = self.seen or own
        return own

    def _is_fed(self, tokens: Tensor) -> bool:
        if not self.awaited:
            return False
        fed: Tensor = self.fed
        if tokens is fed:
            return True
        if tokens.shape != fed.shape or tokens.dtype != fed.dtype:
            return False
        return torch.equal(tokens.to(fed.device), fed)  # moved on the way

    def _is_prompt(self, ids: Tensor | None) -> bool:
        if ids is None or self.prompt is None or ids.shape[0] % max(len(self.prompt), 1):
            return False
        own = self.prompt.repeat_interleave(ids.shape[0] // max(len(self.prompt), 1), 0)
        begin = ids[:, : own.shape[1]]
        return begin.shape == own.shape and torch.equal(begin.to(own.device), own)

    def past(self, seq_len: int, length: Any, cache: Any) -> Any:
        """Tokens before an own forward of `seq_len`; `length`: what its cache tells, if anything.

        A cache may not tell (recurrent layers), and some models keep their state in themselves.
        """
        if torch.compiler.is_compiling():
            if length is not None or not self.begun:
                return length
            return self._last_start()  # further than that makes no difference
        if length is not None and (cache is not None or self.width <= seq_len):
            return length
        return self.before + self.width - seq_len if self.width > seq_len else self.position

    def wrote(self, cache: Any, position: int) -> None:
        """An own forward has read all tokens before `position`, and `cache` holds them."""
        self.cache, self.position = cache, position
        self.begun = position >= self._last_start()

    def _last_start(self) -> int:
        rows = [*self.starts.values(), *([] if self.every is None else [self.every])]
        return max((s for starts in rows for s in starts if s is not None), default=0)


class generation(requesting):
    """The scope of one `generate` call: the starts are found once, in the prompt.

    Takes `adapter_names` and `alora_offsets` out of `kwargs`.
    """

    def __init__(self, owner: Acceleration, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running, request = begin(owner, args, kwargs)
        self.given = caches.among(kwargs) is not None
        super().__init__(request)

    def __enter__(self) -> generation:  # type: ignore[override]
        super().__enter__()
        return self

    def finish(self, result: Any) -> Any:
        """Leave a true record on a cache that outlives `generate`; returns `result`.

        Beams have moved rows on the way, and compiled forwards write no record.
        """
        cache = caches.of_output(result)
        if cache is None and self.given:
            cache = self.running.cache
        length = None if cache is None else caches.length_of(cache)
        if length is not None and int(length):
            assert self.request is not None
            if records.recall(cache, int(length), self.request.owner.key) is None:
                self._rewrite(cache, int(length), result)
        return result

    def _rewrite(self, cache: Any, length: int, result: Any) -> None:
        assert self.request is not None
        owner, running = self.request.owner, self.running
        bits = caches.fingerprint(cache, length)
        if bits is None:
            records.forget(cache)
            return
        names, row_names = _adapters(self.request, len(bits))
        rows = {name: running.starts_of(name) for name in names if _invocation(owner, name)}
        if any(not r or len(bits) % len(r) for r in rows.values()):
            records.forget(cache)
            return
        starts = {}
        for name, told in rows.items():
            repeated = [s for s in told or () for _ in range(len(bits) // len(told or ()))]
            mine = [name] * len(bits) if row_names is None else row_names
            starts[name] = [s if n == name else None for s, n in zip(repeated, mine)]
        ids = result.get("sequences") if isinstance(result, dict) else result
        whole = running.prompt is not None and not running.before
        if isinstance(ids, Tensor) and whole and len(ids) == len(bits) and ids.shape[1] >= length:
            chunk = records.Chunk(length, ids[:, :length], bits)
        else:
            chunk = records.Chunk(length, None, bits)
        records.write_record(cache, records.CacheRecord(0, owner.key, (chunk,), starts))


def check_batching(owner: Acceleration) -> None:
    """Refuse continuous batching where it would run other adapters, or an activated one.

    It packs tokens of many sequences into each forward, over a cache in pages that does not tell
    where a sequence began, and runs in a thread of its own, which no scope reaches.
    """
    request = current_request(owner)
    if request is not None and (request.chosen or request.generation is None):
        raise NotImplementedError(
            "generate_batch: continuous batching runs in a thread of its own, which adapter_scope "
            "and adapter_names do not reach; choose the adapter by model.set_adapter or "
            "disable_adapter(), or use generate"
        )
    for name in owner.active_names():
        if _invocation(owner, name) is not None:
            raise NotImplementedError(
                f"generate_batch: adapter {name!r} is an Activated LoRA, and a forward of "
                "continuous batching packs tokens of many sequences over a paged cache, so where "
                "each one's invocation began is not known; use generate with a padded batch, "
                "Session.ask, or vLLM (`alora_kernels.vllm`); or make a plain LoRA active, or "
                "disable_adapter()"
            )


def begin(
    owner: Acceleration, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Generation, Request]:
    """A generation of these arguments, and the request under which it runs."""
    outer = current_request(owner)
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
    request = Request(owner, chosen, picked, generation=running)
    rows = embeds if ids is None else ids
    if outer is not None and outer.starts is not None and names is None and offsets is None:
        running.every = list(outer.starts)
    elif outer is not None and outer.activation is not None and names is None and offsets is None:
        running.every = _starts_in(outer.activation, rows)
    if rows is not None:
        _find(request, running, rows, kwargs, offsets)
    return running, request


def _adapters(request: Request, batch: int) -> tuple[tuple[str, ...], list[str | None] | None]:
    if request.chosen:
        return rows_of(request.names, batch)
    return request.owner.active_names(), None


def _invocation(owner: Acceleration, name: str) -> list[int] | None:
    return invocation_of(owner.configs.get(name))


def _find(
    request: Request,
    running: Generation,
    rows: Tensor,
    kwargs: dict[str, Any],
    offsets: Sequence[int | None] | None,
) -> None:
    """Find where the adapters of the prompt `rows` begin."""
    owner, ids = request.owner, running.prompt
    batch, width = rows.shape[:2]
    names, row_names = _adapters(request, batch) if running.every is None else ((), None)
    invocations = {n: t for n in names if (t := _invocation(owner, n)) is not None}
    if not invocations:
        return
    cache = caches.among(kwargs)
    length = caches.length_of(cache)
    record = None
    if length is None or int(length):
        record = records.recall(cache, None if length is None else int(length), owner.key)
    if length is None and record is None:
        raise owner.sequences.lengthless(next(iter(invocations)), cache)
    past = record.length if length is None else int(length)  # type: ignore[union-attr]
    mask = kwargs.get("attention_mask")
    longer = isinstance(mask, Tensor) and mask.shape[1] != width
    if past and (longer or width <= past or length is None):
        running.before = running.position = past  # only what is new was given
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
            starts = records.continued_starts(name, tokens, ids, past, record, batch)
        else:
            starts = [None if s < 0 else s for s in find_invocation_starts(ids, tokens).tolist()]
            if past:
                starts = records.kept_starts(name, starts, past, record, row_names, assistant)
            else:
                owner.sequences.look(row_names, name, starts)
        running.starts[name] = starts


def _starts_in(activation: Activation, rows: Tensor | None) -> Starts:
    """The starts that say the same as `activation`."""
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
