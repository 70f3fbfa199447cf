"""prefix_forward: a training step whose frozen prefix costs one forward pass, or none.

    no_grad   prefix, once, without gradient:  tokens -> K, V of every layer   (read-only)
              suffix, with gradient:           tokens, K, V -> logits, loss
    cached    as no_grad, but K, V of a prefix seen before come from a PrefixStore
    full      the whole row with gradient, as a plain model call does it

The adapter is off before the invocation, so keys and values of the prefix are the base model's and
no gradient of a trained parameter passes through them: loss and gradients are the same.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .guard import attention_windows, check_prefix, text_config, unwrap
from .kv import KeyValue, LastLayerDone, PrefixCollector, ReadOnlyPrefix
from .layout import IGNORE, Layout, plan_layout, take
from .store import PrefixStore

MODES = ("no_grad", "cached", "full")


@dataclass
class PrefixOutput(ModelOutput):
    """What `prefix_forward` returns.

    Attributes:
        loss: scalar, or None without labels.
        logits: `[B, S, V]` for the left-aligned suffixes (`[B, T, V]` with `full`).
        labels: `[B, S]`, the token that each row of logits predicts, −100 where none counts.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None


def prefix_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    prefix: str = "no_grad",
    *,
    starts: Sequence[int | None] | Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    store: PrefixStore | None = None,
    prefix_loss: bool = False,
    chunk_size: int = 1024,
    store_extra: str = "",
    **inputs: Any,
) -> PrefixOutput:
    """Run an aLoRA model on a batch; spend nothing on gradients of the frozen prefix.

        loss = Σ_{suffix labels} −log p(label) / N,   N = num_items_in_batch, else all labels

    Labels up to and including the first invocation token belong to the prefix: their loss does not
    depend on the adapter. `no_grad` and `cached` leave it out of the loss (it would only add a
    constant) and count them in N, so the gradients are those of the whole row.

    Args:
        model: a PEFT model with one active aLoRA adapter, accelerated or not; also under DDP, or
            with FSDP2's `fully_shard` applied to it.
        input_ids: int64 `[B, T]`.
        attention_mask: `[B, T]`, left or right padding; None: no padding.
        labels: int64 `[B, T]`, −100 where no loss is taken; shifted here, as transformers does.
        prefix: "no_grad", "cached" or "full".
        starts: for each row the column of its first invocation token (None or −1: the row has
            none and runs the base model). Without it the last occurrence counts, as in PEFT.
        position_ids: `[B, T]`; by default the count of real tokens before each.
        num_items_in_batch: N, when the loss is normalised over more than this batch.
        store: where `cached` keeps the prefixes.
        prefix_loss: ask for the loss over the prefix as well: only `full` has it.
        chunk_size: tokens of the prefix that run at once; bounds its memory.
        store_extra: anything else that decides keys and values, e.g. an autocast setting that is
            applied inside of `model`.
        **inputs: other model inputs. `no_grad` and `cached` refuse them.

    Returns:
        A `PrefixOutput`.

    Raises:
        PrefixError: when the shortcut would be wrong, with every reason.
        ValueError: for a bad mode, shapes, starts or labels.
    """
    if prefix not in MODES:
        raise ValueError(f"prefix_forward: prefix must be one of {MODES}, got {prefix!r}")
    if prefix == "cached" and store is None:
        raise ValueError("prefix_forward: prefix='cached' needs store=PrefixStore(...)")
    if chunk_size < 1:
        raise ValueError(f"prefix_forward: chunk_size must be at least 1, got {chunk_size}")
    if prefix != "full":
        asked = {"prefix_loss": True} if prefix_loss else {}
        check_prefix(model, {**inputs, **asked})
    layout = plan_layout(input_ids, attention_mask, labels, starts, _invocation(model))
    if layout.inactive and labels is not None:
        _warn_inactive(layout)
    call = _Call(model)
    positions = _positions(layout, input_ids) if position_ids is None else position_ids
    if positions.shape[0] != input_ids.shape[0]:
        positions = positions.expand(input_ids.shape[0], -1)

    rows: list[list[KeyValue]] | None = None
    if prefix != "full":
        if layout.prefix_labels:
            _warn_prefix_labels(layout)
        rows = _lend(call, layout, input_ids, positions, store, chunk_size, store_extra)
    if rows is None:  # `full`, or no row has a prefix
        logits = call.run(
            input_ids,
            attention_mask,
            positions,
            offsets=layout.offsets(),
            **inputs,
        )
        targets = None if labels is None else _next_labels(labels, layout)
    else:
        device = input_ids.device
        index, real = layout.suffix_index(device)
        cache = ReadOnlyPrefix(call.windows, layout.prefix_len, rows)
        del rows
        logits = call.run(
            take(input_ids, index),
            layout.cache_mask(device),
            take(positions, index),
            offsets=layout.suffix_offsets(),
            cache=cache,
        )
        targets = None
        if labels is not None:
            after = take(_next_labels(labels, layout), index)
            targets = after.masked_fill(~real, IGNORE)
    loss = None
    if targets is not None:
        count = layout.num_labels if num_items_in_batch is None else num_items_in_batch
        loss = causal_loss(unwrap(model).get_base_model(), logits, targets, count)
    return PrefixOutput(loss=loss, logits=logits, labels=targets)


def causal_loss(base: nn.Module, logits: Tensor, targets: Tensor, count: Tensor | int) -> Tensor:
    """Σ −log p(target) / count over the targets that are not −100.

    A model's own loss function is used when it has one; transformers' usual one would round
    float64 logits to float32.

    Args:
        base: the transformers model.
        logits: `[B, S, V]`.
        targets: int64 `[B, S]`, already shifted.
        count: the N of the mean.
    """
    function = getattr(base, "loss_function", None)
    if function is not None and getattr(function, "__name__", "") != "ForCausalLMLoss":
        return function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=count,
            shift_labels=targets,
        )
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    total = nn.functional.cross_entropy(
        wide.flatten(0, 1), targets.flatten().to(wide.device), reduction="sum", ignore_index=IGNORE
    )
    if isinstance(count, Tensor):
        return total / count.to(total.device).clamp(min=1)
    return total / max(count, 1)


# ---------------------------------------------------------------------- the two passes


class _Call:
    """How this model is called: names of arguments, layers, wrappers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.peft: Any = unwrap(model)
        parameters = inspect.signature(self.peft.get_base_model().forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.takes_positions = "position_ids" in parameters
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        self.windows: list[int | None] = []

    @property
    def sharded(self) -> bool:
        """Whether every pass is a collective operation (FSDP2)."""
        from torch.distributed.fsdp import FSDPModule

        return dist.is_initialized() and any(isinstance(m, FSDPModule) for m in self.peft.modules())

    def run(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        *,
        offsets: list[int | None],
        cache: ReadOnlyPrefix | None = None,
        **inputs: Any,
    ) -> Tensor:
        """One pass with gradient through the outermost wrapper; returns the logits."""
        inputs["use_cache"] = False
        if cache is not None:
            inputs[self.cache_name] = cache
        if self.takes_positions:
            inputs["position_ids"] = positions
        with ExitStack() as stack:
            if not torch.is_grad_enabled():
                stack.enter_context(_attribute(self.peft, "gradient_checkpointing", True, False))
            elif cache is not None:
                stack.enter_context(
                    _attribute(self.peft, "_can_checkpoint_with_cache", False, True)
                )
            output = self.model(
                input_ids=input_ids, attention_mask=mask, alora_offsets=offsets, **inputs
            )
        return output.logits if hasattr(output, "logits") else output[0]

    def collect(self, input_ids: Tensor, positions: Tensor, cache: Any) -> None:
        """One pass of the base model without gradient; keys and values land in `cache`."""
        inputs: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            inputs[self.cache_name] = cache
        if self.takes_positions:
            inputs["position_ids"] = positions
        if self.takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        # DDP's own forward would broadcast buffers, and ranks need not run equally many passes;
        # FSDP2 gathers its shards in the hooks of the wrapped module, so that one is entered.
        self.peft(
            input_ids=input_ids,
            attention_mask=None,
            alora_offsets=[None] * input_ids.shape[0],
            **inputs,
        )


def _lend(
    call: _Call,
    layout: Layout,
    input_ids: Tensor,
    positions: Tensor,
    store: PrefixStore | None,
    chunk_size: int,
    extra: str,
) -> list[list[KeyValue]] | None:
    """Keys and values of every row's prefix: from the store, else computed. None: no prefix."""
    device = input_ids.device
    found: dict[int, list[KeyValue]] = {}
    keys: dict[int, str] = {}
    missing = [b for b, row in enumerate(layout.rows) if row.prefix]
    any_prefix = bool(missing)
    if store is not None and missing:
        name = store.name(call.model, extra)
        ids, places = input_ids.cpu(), positions.cpu()
        for b in missing:
            span = slice(layout.rows[b].lo, layout.rows[b].begin)
            keys[b] = store.key(name, ids[b, span], places[b, span])
            layers = store.get(keys[b], device)
            if layers is not None:
                found[b] = layers
        missing = [b for b in missing if b not in found]
    call.windows = attention_windows(call.model)
    longest = max((layout.rows[b].prefix for b in missing), default=0)
    passes = -(-longest // chunk_size)
    total = _most_passes(passes, device) if call.sharded else passes
    if total:
        with torch.no_grad(), _prefix_pass(call.peft, device):
            if missing:
                index, _ = layout.prefix_index(missing, device)
                tokens, places = take(input_ids, index), take(positions, index)
                lengths = [layout.rows[b].prefix for b in missing]
                collector = PrefixCollector(call.windows, lengths)
                with _stop_in_last_layer(call.peft, collector):
                    for begin in range(0, longest, chunk_size):
                        span = slice(begin, begin + chunk_size)
                        call.collect(tokens[:, span], places[:, span], collector)
                for b, layers in zip(missing, collector.rows()):
                    found[b] = layers
            for _ in range(total - passes):  # keep in step with the other ranks
                call.collect(input_ids[:1, :1], positions[:1, :1], None)
    if not any_prefix:
        return None
    if store is not None:
        for b in missing:
            store.put(keys[b], found[b])
    some = next(iter(found.values()))
    empty = [(k.new_empty(k.shape[0], 0, k.shape[2]), v.new_empty(v.shape[0], 0, v.shape[2]))
             for k, v in some]  # fmt: skip
    return [found.get(b, empty) for b in range(len(layout.rows))]


def _most_passes(passes: int, device: torch.device) -> int:
    count = torch.tensor([passes], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


@contextmanager
def _prefix_pass(peft: Any, device: torch.device) -> Iterator[None]:
    """The base model alone: no adapter, no checkpointing, no random number drawn."""
    devices = [device] if device.type not in ("cpu", "meta", "mps") else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=device.type))
        stack.enter_context(_attribute(peft, "_disable_adapters", False, True))
        stack.enter_context(_attribute(peft, "gradient_checkpointing", True, False))
        disabled = peft._adapters_disabled
        peft._adapters_disabled = True  # PEFT then installs no hooks
        stack.callback(setattr, peft, "_adapters_disabled", disabled)
        yield


@contextmanager
def _attribute(model: nn.Module, name: str, old: bool, new: bool) -> Iterator[None]:
    """Set `name` to `new` on every module where it is `old`; undo on leaving."""
    changed = [m for m in model.modules() if getattr(m, name, None) is old]
    inherited = [name not in m.__dict__ for m in changed]
    for module in changed:
        setattr(module, name, new)
    try:
        yield
    finally:
        for module, was_inherited in zip(changed, inherited):
            if was_inherited:
                delattr(module, name)
            else:
                setattr(module, name, old)


@contextmanager
def _stop_in_last_layer(peft: Any, collector: PrefixCollector) -> Iterator[None]:
    """End the last decoder layer once its keys and values are stored.

    Its attention, output projection and MLP feed only logits that nobody reads. The collector
    raises from inside the layer and the layer's own `forward` catches it, so every hook around
    the layer (FSDP2's, accelerate's) runs as usual.
    """
    layers = _decoder_layers(peft)
    if layers is None:
        yield
        return
    last = layers[-1]
    index = len(layers) - 1
    plain = False

    def see(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal plain
        plain = isinstance(output, Tensor)  # the layer's contract: hidden states in, and out

    forward = last.forward

    def stop(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not plain or hidden is None:
            return forward(*args, **kwargs)
        collector.stop_in = index
        try:
            return forward(*args, **kwargs)
        except LastLayerDone:
            return hidden
        finally:
            collector.stop_in = None

    had_own = "forward" in last.__dict__
    handle = layers[-2].register_forward_hook(see)
    last.forward = stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        handle.remove()
        if had_own:
            last.forward = forward  # type: ignore[method-assign]
        else:
            del last.forward


def _decoder_layers(peft: Any) -> nn.ModuleList | None:
    """The list of decoder layers, when it can be told; None with fewer than two."""
    count = int(text_config(peft).num_hidden_layers)
    lists = [
        m
        for m in peft.get_base_model().modules()
        if isinstance(m, nn.ModuleList) and len(m) == count and count > 1
    ]
    return lists[0] if len(lists) == 1 else None


# ---------------------------------------------------------------------- small parts


def _invocation(model: nn.Module) -> list[int] | None:
    peft: Any = unwrap(model)
    return getattr(peft.active_peft_config, "alora_invocation_tokens", None)


def _positions(layout: Layout, input_ids: Tensor) -> Tensor:
    lo = torch.tensor([row.lo for row in layout.rows], device=input_ids.device).unsqueeze(1)
    return (torch.arange(layout.seq_len, device=input_ids.device) - lo).clamp(min=0)


def _next_labels(labels: Tensor, layout: Layout) -> Tensor:
    """`[B, T]`: the label that each column predicts; the first real token is predicted by none."""
    after = torch.full_like(labels, IGNORE)
    after[:, :-1] = labels[:, 1:]
    for b, row in enumerate(layout.rows):
        if row.lo:
            after[b, : row.lo] = IGNORE
    return after


_warned: set[str] = set()


def _warn_once(kind: str, text: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(text, stacklevel=4)


def _warn_inactive(layout: Layout) -> None:
    _warn_once(
        "inactive",
        f"rows {layout.inactive} of this batch hold no invocation: they run the base model and "
        "train nothing (was the invocation truncated away?). Further ones are not reported",
    )


def _warn_prefix_labels(layout: Layout) -> None:
    _warn_once(
        "prefix_labels",
        f"{layout.prefix_labels} of {layout.num_labels} labels stand at or before the invocation: "
        "they give no gradient, count in the normalisation and are left out of the loss. Mask "
        f"them with {IGNORE} to take the loss after the invocation alone",
    )
