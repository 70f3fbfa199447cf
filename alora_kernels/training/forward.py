"""prefix_forward: a training step whose frozen prefix costs one forward pass, or none.

    no_grad   prefix, once, without gradient:  tokens -> K, V of every layer   (read-only)
              suffix, with gradient:           tokens, K, V -> logits, loss
    cached    as no_grad, but K, V of a known prefix come from a PrefixStore
    full      the whole row with gradient, as a plain call of the model

The adapter is off before the invocation. So the keys and values of the prefix are the base model's,
and no gradient of a trained parameter flows through them: all three modes give the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..invocation import invocation_of
from ..once import warn_once
from .foreign import foreign_code
from .guard import PrefixError, attention_windows, check_prefix, text_config, unwrap
from .kv import KeyValue, PrefixCollector, ReadOnlyPrefix
from .layout import IGNORE, Layout, plan_layout, take
from .passes import ModelCall, prefix_pass, stop_in_last_layer
from .store import PrefixStore

MODES = ("no_grad", "cached", "full")


@dataclass
class PrefixOutput(ModelOutput):
    """The result of `prefix_forward`.

    Attributes:
        loss: scalar, or None without labels.
        logits: `[B, S, V]` for the left-aligned suffixes (`[B, T, V]` with `full`).
        labels: `[B, S]` (`[B, T]` with `full`), the token that each row of logits predicts; −100
            where no loss is taken. None without labels.
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
    """Run an aLoRA model on a batch, without computing gradients of the frozen prefix.

        loss = Σ_{suffix labels} −log p(label) / N,   N = num_items_in_batch, else all labels

    Labels up to and including the first invocation token belong to the prefix: their loss does not
    depend on the adapter. `no_grad` and `cached` leave that loss out, because it would only add a
    constant. But they count these labels in N, so the gradients are those of the whole row.

    Args:
        model: a PEFT model with one active aLoRA adapter, accelerated or not; also under DDP, or
            with FSDP2's `fully_shard` applied to it.
        input_ids: int64 `[B, T]`.
        attention_mask: `[B, T]`, left or right padding; None: no padding.
        labels: int64 `[B, T]`, −100 where no loss is taken; shifted here, as in transformers.
        prefix: "no_grad", "cached" or "full".
        starts: for each row the column of its first invocation token. None or −1: the row has no
            invocation and runs the base model. By default the last occurrence counts, as in PEFT.
        position_ids: `[B, T]`; by default each token's distance from the first real token.
        num_items_in_batch: N, if the loss is normalised over more than this batch.
        store: the `PrefixStore` in which `cached` keeps the prefixes.
        prefix_loss: also take the loss over the prefix; only `full` can.
        chunk_size: a pass over prefixes runs at most `chunk_size` × (number of prefixes to compute)
            tokens, which bounds memory.
        store_extra: text for anything else that decides keys and values, e.g. an autocast setting
            that is applied inside `model`.
        **inputs: other model inputs. `no_grad` and `cached` refuse them.

    Returns:
        A `PrefixOutput`.

    Raises:
        PrefixError: leaving out the prefix's gradient would be wrong; the message lists all
            reasons.
        TypeError: the model is not a PeftModel.
        ValueError: the mode, a shape, a start or a label is wrong.
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
    if not hasattr(unwrap(model), "active_peft_config"):
        raise TypeError(
            f"prefix_forward: model must be a PeftModel, got {type(unwrap(model)).__name__}"
        )
    layout = plan_layout(input_ids, attention_mask, labels, starts, _invocation(model))
    if layout.inactive and labels is not None:
        _warn_inactive(layout)
    call = ModelCall(model)
    positions = _positions(layout, input_ids) if position_ids is None else position_ids
    if positions.shape[0] != input_ids.shape[0]:
        positions = positions.expand(input_ids.shape[0], -1)

    rows: list[list[KeyValue]] | None = None
    if prefix != "full":
        _check_positions(call, layout)
        if layout.prefix_labels:
            _warn_prefix_labels(layout)
        kept = store if prefix == "cached" and not _runs_foreign_code(call) else None
        rows = _lend(call, layout, input_ids, positions, kept, chunk_size, store_extra)
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
            everywhere=not layout.inactive,
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

    If the model has its own loss function, that is called. transformers' default is not called: it
    would round float64 logits to float32.

    Args:
        base: the transformers model.
        logits: `[B, S, V]`.
        targets: int64 `[B, S]`, already shifted.
        count: the number N that the sum is divided by.
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


# ---------------------------------------------------------------------- the prefix


def _lend(
    call: ModelCall,
    layout: Layout,
    input_ids: Tensor,
    positions: Tensor,
    store: PrefixStore | None,
    chunk_size: int,
    extra: str,
) -> list[list[KeyValue]] | None:
    """Keys and values of every row's prefix, from the store or computed; None if no row has one."""
    device = input_ids.device
    found: dict[int, list[KeyValue]] = {}
    keys: dict[int, str] = {}
    missing = [b for b, row in enumerate(layout.rows) if row.prefix]
    any_prefix = bool(missing)
    if store is not None and (missing or call.sharded):
        name = store.name(call.model, extra)
        ids, places = input_ids.cpu(), positions.cpu()
        for b in missing:
            span = slice(layout.rows[b].lo, layout.rows[b].begin)
            keys[b] = store.key(name, ids[b, span], places[b, span])
            layers = store.get(keys[b], device)
            if layers is not None:
                found[b] = layers
        missing = [b for b in missing if b not in found]
    # Rows with the same prefix compute it once.
    twins = {b: next(a for a in missing if keys.get(a) == keys[b]) for b in missing if keys}
    missing = [b for b in missing if twins.get(b, b) == b]
    call.windows = attention_windows(call.model)
    tokens = chunk_size * len(missing)
    groups = layout.prefix_groups(missing, tokens)
    # For each group: its rows, the length of its longest prefix, the tokens of a row in each pass.
    plan = [(rows, layout.rows[rows[0]].prefix, tokens // len(rows)) for rows in groups]
    passes = sum(-(-longest // chunk) for _, longest, chunk in plan)
    total = _most_passes(passes, device) if call.sharded else passes
    if total:
        with torch.no_grad(), prefix_pass(call.peft, device):
            for rows, longest, chunk in plan:
                index, _ = layout.prefix_index(rows, device)
                ids, places = take(input_ids[rows], index), take(positions[rows], index)
                lengths = [layout.rows[b].prefix for b in rows]
                collector = PrefixCollector(call.windows, lengths)
                with stop_in_last_layer(call.peft, collector):
                    for begin in range(0, longest, chunk):
                        span = slice(begin, begin + chunk)
                        call.collect(ids[:, span], places[:, span], collector)
                _check_collected(call.peft, collector, longest)
                found.update(zip(rows, collector.rows()))
            for _ in range(total - passes):  # every rank must run the same number of passes
                call.collect(input_ids[:1, :1], positions[:1, :1], None)
    if not any_prefix:
        return None
    if store is not None:
        for b in missing:
            store.put(keys[b], found[b])
    found.update({b: found[a] for b, a in twins.items()})
    some = next(iter(found.values()))
    empty = [(k.new_empty(k.shape[0], 0, k.shape[2]), v.new_empty(v.shape[0], 0, v.shape[2]))
             for k, v in some]  # fmt: skip
    return [found.get(b, empty) for b in range(len(layout.rows))]


def _check_collected(peft: Any, collector: PrefixCollector, tokens: int) -> None:
    missing = [i for i, layer in enumerate(collector.collected) if layer.seen != tokens]
    if missing:
        raise PrefixError(
            f"{type(peft.get_base_model()).__name__} stored no keys and values of the prefix for "
            f"layers {missing} in the cache it was handed; use prefix='full'"
        )


def _most_passes(passes: int, device: torch.device) -> int:
    count = torch.tensor([passes], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


# ---------------------------------------------------------------------- small parts


def _runs_foreign_code(call: ModelCall) -> bool:
    """Whether foreign code runs inside the base. Then no prefix is kept; a warning says so once."""
    found = foreign_code(
        call.peft.get_base_model(), getattr(text_config(call.peft), "_attn_implementation", None)
    )
    if found is not None:
        warn_once(
            f"prefix='cached': {found} runs inside the model. What it computes has no name, so "
            "prefixes are computed anew in every step and not kept",
            stacklevel=3,
        )
    return found is not None


def _check_positions(call: ModelCall, layout: Layout) -> None:
    """Refuse rows whose positions would be wrong in a model that takes no `position_ids`."""
    lengths = sorted({row.prefix for row in layout.rows})
    if call.takes_positions or (len(lengths) == 1 and not any(row.lo for row in layout.rows)):
        return
    raise PrefixError(
        f"{type(call.peft.get_base_model()).__name__} takes no position_ids and counts them from "
        f"the length of its cache, but the rows of this batch have prefixes of {lengths[0]} to "
        f"{lengths[-1]} tokens, or padding on the left; batch rows of one length, or use "
        "prefix='full'"
    )


def _invocation(model: nn.Module) -> list[int] | None:
    peft: Any = unwrap(model)
    return invocation_of(peft.active_peft_config)


def _positions(layout: Layout, input_ids: Tensor) -> Tensor:
    lo = torch.tensor([row.lo for row in layout.rows], device=input_ids.device).unsqueeze(1)
    return (torch.arange(layout.seq_len, device=input_ids.device) - lo).clamp(min=0)


def _next_labels(labels: Tensor, layout: Layout) -> Tensor:
    """`[B, T]`: the label that each column predicts. No column predicts the first real token."""
    after = torch.full_like(labels, IGNORE)
    after[:, :-1] = labels[:, 1:]
    for b, row in enumerate(layout.rows):
        if row.lo:
            after[b, : row.lo] = IGNORE
    return after


def _warn_inactive(layout: Layout) -> None:
    warn_once(
        f"rows {layout.inactive} of this batch hold no invocation: they run the base model and "
        "train nothing (was the invocation truncated away?). Further ones are not reported",
        "prefix_forward: inactive rows",
        stacklevel=3,
    )


def _warn_prefix_labels(layout: Layout) -> None:
    warn_once(
        f"{layout.prefix_labels} of {layout.num_labels} labels stand at or before the invocation: "
        "they give no gradient, count in the normalisation and are left out of the loss. Mask "
        f"them with {IGNORE} to take the loss after the invocation alone",
        "prefix_forward: labels in the prefix",
        stacklevel=3,
    )
