"""generate: the starts are found once, in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..activation import find_invocation_starts
from . import records
from .ambient import Request, current_request, requesting
from .refusal import invocation_of
from .rows import rows_of

if TYPE_CHECKING:
    from .acceleration import Acceleration

CHUNKING = "_prefill_chunking"  # where transformers 4.57 prefills in chunks


class Called:
    """A model whose `forward` is its call, hooks included."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward = model, model.__call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def skips_hooks(chunking: Any) -> bool:
    """Whether `chunking` calls the model's `forward`, past its hooks."""
    return "forward" in getattr(getattr(chunking, "__code__", None), "co_names", ())


def generation(owner: Acceleration, args: tuple[Any, ...], kwargs: dict[str, Any]) -> requesting:
    """The scope of one `generate` call: the starts are found once, in the prompt."""
    outer = current_request(owner)
    names = kwargs.pop("adapter_names", None)
    offsets = kwargs.pop("alora_offsets", None)
    if outer is not None and outer.decided and names is None and offsets is None:
        return requesting(outer)
    chosen, picked = names is not None, names
    if outer is not None and not chosen:
        chosen, picked = outer.chosen, outer.names
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids.unsqueeze(0)
    embeds = kwargs.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.shape[1] == 0 and embeds is not None:
        ids = None
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    past = int(records.cache_length(cache))
    rows = ids if isinstance(ids, Tensor) else embeds
    if rows is None:
        return requesting(Request(owner, chosen, picked))
    batch, width = rows.shape[:2]
    mask = kwargs.get("attention_mask")
    fed = 0  # position of the first of `ids`
    if (past and isinstance(mask, Tensor) and mask.shape[1] != width) or (past and width <= past):
        fed = past
    if chosen:
        adapters, row_names = rows_of(picked, batch)
    else:
        adapters, row_names = owner.active_names(), None
    record = records.record_of(cache, past) if past else None
    found: dict[str, list[int | None]] = {}
    for name in adapters:
        tokens = invocation_of(owner.configs.get(name))
        if tokens is None:
            continue
        if offsets is not None:
            if len(offsets) != batch:
                raise ValueError(
                    f"alora_offsets has {len(offsets)} items for {batch} prompts; give one "
                    "for each prompt (None for the base model)"
                )
            end = fed + width
            found[name] = [None if not o or o < 0 else max(end - int(o), 0) for o in offsets]
            continue
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"adapter {name!r}: generate got inputs_embeds alone, in which its invocation "
                "cannot be found; pass input_ids, or alora_offsets (from the end of the row)"
            )
        if fed:
            found[name] = records.continued_starts(name, tokens, ids, past, record, batch)
            continue
        starts = find_invocation_starts(ids, tokens).tolist()
        old = [None] * batch if record is None else record.starts.get(name, [None] * batch)
        if len(old) != batch:
            old = [None] * batch
        kept: list[int | None] = []
        for row, start in enumerate(starts):
            mine = row_names is None or row_names[row] == name
            if mine and 0 <= start < past and old[row] is None:
                raise records.covered(name, row, start, past)
            kept.append(old[row] if old[row] is not None else None if start < 0 else start)
        found[name] = kept
    return requesting(Request(owner, chosen, picked, found=found))
