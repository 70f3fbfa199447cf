"""What a KV cache holds: which tokens went in, and from where on an adapter wrote them.

The record lies on the cache object, so a deep copy of a cache takes it along.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activation import find_invocation_starts

logger = logging.getLogger("alora_kernels")
ATTRIBUTE = "_alora_kernels_record"


class CacheRecord:
    """The history of one cache.

    Attributes:
        length: tokens in the cache when the record was written.
        chunks: the token ids, `[B, t]` each, or None where they were not known.
        starts: for each adapter that has run, the absolute start in each row (None = not active).
    """

    def __init__(self) -> None:
        self.length = 0
        self.chunks: list[Tensor | None] = []
        self.starts: dict[str, list[int | None]] = {}

    def extended(
        self, ids: Tensor | None, length: int, starts: dict[str, list[int | None]]
    ) -> CacheRecord:
        """The record after a forward; records are never changed in place (copies share them)."""
        new = CacheRecord()
        new.length = length
        new.chunks = [*self.chunks, ids]
        new.starts = {**self.starts, **starts}
        if len(new.chunks) > 64 and all(c is not None for c in new.chunks):
            new.chunks = [torch.cat([c for c in new.chunks if c is not None], 1)]
        return new

    def ids(self, batch: int, device: torch.device) -> Tensor | None:
        """The last tokens of the cache that are known without a gap, `[B, t]`."""
        tail: list[Tensor] = []
        for chunk in reversed(self.chunks):
            if chunk is None or chunk.shape[0] != batch:
                break
            tail.append(chunk.to(device))
        return torch.cat(tail[::-1], 1) if tail else None


def cache_length(cache: Any) -> Any:
    """Tokens in the cache: an int, or a tensor for caches that count on the device."""
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return cache[0][0].shape[-2] if cache else 0
    return cache.get_seq_length()


def record_of(cache: Any, length: int) -> CacheRecord | None:
    """The record of `cache`, cut to what the cache still holds."""
    record: CacheRecord | None = getattr(cache, ATTRIBUTE, None)
    if record is None or record.length == length:
        return record
    cut = CacheRecord()
    cut.length = length
    if record.length > length:  # cropped: assisted decoding takes rejected tokens back
        room = length
        for chunk in record.chunks:
            if chunk is None or room <= 0:
                break
            cut.chunks.append(chunk[:, :room])
            room -= chunk.shape[1]
    cut.starts = {
        name: [s if s is not None and s < length else None for s in starts]
        for name, starts in record.starts.items()
    }
    return cut


def write_record(cache: Any, record: CacheRecord) -> None:
    try:
        setattr(cache, ATTRIBUTE, record)
    except AttributeError:  # a tuple, or a cache with slots: nothing can be remembered
        logger.debug("a %s cannot carry a record of its tokens", type(cache).__name__)


def continued_starts(
    name: str,
    tokens: Sequence[int],
    input_ids: Tensor | None,
    past: int,
    record: CacheRecord | None,
    rows: int,
) -> list[int | None]:
    """Absolute starts of `name` for a chunk that continues a cache of `past` tokens.

    A row that the adapter has begun in this cache stays active. Otherwise the last invocation that
    lies whole in the chunk begins it.

    Raises:
        ValueError: tokens of the invocation lie in the cache, where the base model wrote them.
    """
    kept: list[int | None] = [None] * rows
    if record is not None and name in record.starts:
        known = record.starts[name]
        if rows % len(known) == 0:
            kept = [s for s in known for _ in range(rows // len(known))]
        elif any(s is not None for s in known):
            raise ValueError(
                f"adapter {name!r}: the cache was written by {len(known)} rows and is continued "
                f"by {rows}, so where each row begins is not known; pass alora_offsets"
            )
    if all(s is not None for s in kept):
        return kept
    if input_ids is None:
        raise ValueError(
            f"adapter {name!r}: only inputs_embeds came, in which an invocation cannot be found; "
            "pass alora_offsets (counted from the end of the row), or input_ids"
        )
    before = None if record is None else record.ids(rows, input_ids.device)
    if before is not None and record is not None and name in record.starts:
        tail = len(tokens) - 1  # the rest was searched when it came
        before = before[:, before.shape[1] - tail :] if tail and before.shape[1] > tail else before
        before = before if tail else None
    lead = 0 if before is None else before.shape[1]
    whole = input_ids if before is None else torch.cat([before, input_ids], 1)
    found = find_invocation_starts(whole, tokens).tolist()
    result: list[int | None] = []
    for row, (old, start) in enumerate(zip(kept, found)):
        if old is not None or start < 0:
            result.append(old)
        elif start >= lead:
            result.append(past + start - lead)
        elif input_ids.shape[1] == 1 and start + len(tokens) > lead:
            # A model that runs without the adapter has just spelled the invocation.
            warnings.warn(
                f"adapter {name!r}: row {row} completed its invocation one token at a time; the "
                "first tokens are in the cache as base tokens, so the adapter stays off. Feed the "
                "invocation in one forward to begin it",
                stacklevel=2,
            )
            result.append(None)
        else:
            raise covered(name, row, past - lead + start, past)
    return result


def covered(name: str, row: int, start: int, past: int) -> ValueError:
    return ValueError(
        f"adapter {name!r}: in row {row} the invocation begins at position {start}, but the cache "
        f"already covers {past} tokens, written without this adapter; crop the cache to at most "
        f"{start} tokens, or prefill only what comes before the invocation"
    )
