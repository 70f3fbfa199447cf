"""The record of a KV cache: which tokens it holds, and from which position on an adapter ran.

The record is an attribute of the cache object, so a copy of the cache takes it along. Caches change
without our knowledge: rows are reordered, repeated and dropped, tokens are cropped, another model
writes. So a record keeps some bits of what the cache held for each token. It is believed only as
far as the cache still holds those bits. Rows that moved are found again by their bits.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..activation import find_invocation_starts
from .caches import carrier_of, fingerprint

logger = logging.getLogger("alora_kernels")
ATTRIBUTE = "_alora_kernels_record"
LONGEST = 64  # a record with more chunks joins neighbours


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward.

    Attributes:
        count: tokens per row.
        ids: the token ids `[B, count]`, or None if they were not known.
        bits: `fingerprint` of the last n ≤ count tokens, `[B, n, C]`; None if it could not be read.
        plain: no activated adapter was active, so the cache was not asked for its length.
    """

    count: int
    ids: Tensor | None
    bits: Tensor | None
    plain: bool = False

    def first(self, count: int) -> Chunk:
        """The chunk's first `count` tokens."""
        if count >= self.count:
            return self
        bits = self.bits
        if bits is not None:
            kept = bits.shape[1] - (self.count - count)
            bits = bits[:, :kept] if kept > 0 else None
        return replace(self, count=count, ids=_take(self.ids, slice(count)), bits=bits)

    def rows(self, rows: Tensor) -> Chunk:
        """The chunk with only these rows, in this order."""
        ids, bits = (
            t if t is None else t.index_select(0, rows.to(t.device)) for t in (self.ids, self.bits)
        )
        return replace(self, ids=ids, bits=bits)


def _take(ids: Tensor | None, part: slice) -> Tensor | None:
    return None if ids is None else ids[:, part]


@dataclass(frozen=True)
class CacheRecord:
    """The history of one cache. Never changed in place: copies of a cache share it.

    Attributes:
        begin: the number of tokens in the cache before the first chunk; nothing else is known of
            them. None: the cache was not asked for its length.
        writer: the key of the accelerated model that `starts` belongs to.
        chunks: the forwards that followed.
        starts: for each activated adapter that has run, the absolute start in each row (None = it
            has not begun).
    """

    begin: int | None
    writer: str
    chunks: tuple[Chunk, ...] = ()
    starts: dict[str, list[int | None]] = field(default_factory=dict)

    @property
    def known(self) -> int:
        """The number of tokens in the chunks."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def length(self) -> int:
        return (self.begin or 0) + self.known

    @property
    def whole(self) -> bool:
        """Whether every token of the cache is known."""
        return not self.begin and all(chunk.ids is not None for chunk in self.chunks)

    def extended(self, chunk: Chunk, starts: dict[str, list[int | None]]) -> CacheRecord:
        """The record after a forward."""
        chunks = (*self.chunks, chunk)
        if len(chunks) > LONGEST:
            chunks = _joined(chunks)
        return replace(self, chunks=chunks, starts={**self.starts, **starts})

    def cut(self, length: int) -> CacheRecord:
        """The record of the same cache after it was cropped to `length` tokens."""
        room, chunks = length - (self.begin or 0), []
        for chunk in self.chunks:
            if room <= 0:
                break
            chunks.append(chunk.first(room))
            room -= chunk.count
        starts = {
            name: [s if s is not None and s < length else None for s in rows]
            for name, rows in self.starts.items()
        }
        begin = min(self.begin or 0, length)
        return replace(self, begin=begin, chunks=tuple(chunks), starts=starts)

    def latest(self, length: int) -> CacheRecord | None:
        """The record of the last forwards alone, if no activated adapter ran in them; else None.

        Those forwards did not ask how many tokens the cache held, and somebody may have emptied it
        before them. So the tokens before them count as unknown.

        Args:
            length: the number of tokens that the cache holds now.
        """
        chunks: list[Chunk] = []
        room = length
        for chunk in reversed(self.chunks):
            if not chunk.plain or chunk.count > room:
                break
            chunks.insert(0, chunk)
            room -= chunk.count
        return replace(self, begin=room, chunks=tuple(chunks), starts={}) if chunks else None

    def of_rows(self, rows: list[int]) -> CacheRecord:
        """The record of a cache that holds only these rows, in this order."""
        place = torch.tensor(rows)
        starts = {name: [s[r] for r in rows] for name, s in self.starts.items()}
        return replace(self, chunks=tuple(c.rows(place) for c in self.chunks), starts=starts)

    def ids(self, batch: int, device: torch.device) -> Tensor | None:
        """The ids of the last tokens of the cache, as far back as all are known, `[B, t]`."""
        tail: list[Tensor] = []
        for chunk in reversed(self.chunks):
            if chunk.ids is None or chunk.ids.shape[0] != batch:
                break
            tail.append(chunk.ids.to(device))
        return torch.cat(tail[::-1], 1) if tail else None

    def bits(self) -> Tensor | None:
        """The bits of the last tokens, as far back as all are known, `[B, n, C]`."""
        tail: list[Tensor] = []
        for chunk in reversed(self.chunks):
            fits = chunk.bits is not None and (
                not tail or chunk.bits.shape[::2] == tail[0].shape[::2]
            )
            if not fits or chunk.bits is None:
                break
            tail.append(chunk.bits)
            if chunk.bits.shape[1] < chunk.count:
                break
        return torch.cat([t.to(tail[0].device) for t in tail[::-1]], 1) if tail else None


def _joined(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """The chunks, with neighbours joined if both have the same known parts (ids, bits)."""
    result: list[list[Chunk]] = []
    for chunk in chunks:
        last = result[-1][-1] if result else None
        alike = (
            last is not None
            and last.plain == chunk.plain
            and (last.ids is None) == (chunk.ids is None)
            and (last.ids is None or last.ids.shape[0] == chunk.ids.shape[0])  # type: ignore[union-attr]
            and last.bits is not None
            and chunk.bits is not None
            and chunk.bits.shape[1] == chunk.count
            and last.bits.shape[::2] == chunk.bits.shape[::2]
        )
        result[-1].append(chunk) if alike else result.append([chunk])
    return tuple(_one(group) for group in result)


def _one(group: list[Chunk]) -> Chunk:
    if len(group) == 1:
        return group[0]
    ids = None if group[0].ids is None else torch.cat([c.ids for c in group], 1)  # type: ignore[misc]
    bits = torch.cat([c.bits for c in group], 1)  # type: ignore[misc]
    return Chunk(sum(c.count for c in group), ids, bits, group[0].plain)


# ---------------------------------------------------------------------- on the cache


def record_of(cache: Any) -> CacheRecord | None:
    """The record on `cache`. The cache may have changed since; `recall` checks that."""
    record = getattr(carrier_of(cache), ATTRIBUTE, None)
    return record if isinstance(record, CacheRecord) else None


def write_record(cache: Any, record: CacheRecord) -> None:
    try:
        setattr(carrier_of(cache), ATTRIBUTE, record)
    except AttributeError:  # a class with slots; the next forward says that nothing is known
        logger.debug("a %s cannot carry a record of its tokens", type(cache).__name__)


def forget(cache: Any) -> None:
    """Remove the record from `cache`."""
    getattr(carrier_of(cache), "__dict__", {}).pop(ATTRIBUTE, None)


def recall(cache: Any, length: int | None, reader: str) -> CacheRecord | None:
    """The record of the tokens that `cache` holds now, with the rows in their present order.

    Args:
        length: the number of tokens in the cache; None if it is not known.
        reader: the key of the accelerated model that asks. Starts that another model wrote are
            left out: its adapters may have the same names, but they are other adapters.

    Returns:
        None if there is no record, or the cache no longer holds what was recorded.
    """
    record = record_of(cache)
    if record is None:
        return None
    if record.writer != reader:
        record = replace(record, writer=reader, starts={})
    cut = record.cut(record.length if length is None else length)
    for candidate in (cut, None if length is None else record.latest(length)):
        if candidate is None or length not in (None, candidate.length):
            continue
        rows = _rows_now(cache, candidate)
        if rows is not None:
            return candidate.of_rows(rows) if rows != list(range(len(rows))) else candidate
    return None


def _rows_now(cache: Any, record: CacheRecord) -> list[int] | None:
    """For each row of the cache, its row in `record`; None if one of them is not in `record`."""
    then = record.bits()
    now = None if then is None else fingerprint(cache, then.shape[1])
    if then is None or now is None or now.shape[2] != then.shape[2] or now.dtype != then.dtype:
        return None
    count = min(now.shape[1], then.shape[1])
    now, then = now[:, -count:].to(then.device), then[:, -count:]
    if torch.equal(now, then):
        count = then.shape[0]
        return list(range(count))
    before, after = ([row.numpy().tobytes() for row in t.cpu().contiguous()] for t in (then, now))
    rows = []
    for place, row in enumerate(after):
        same = [i for i, known in enumerate(before) if known == row]
        if not same or (place not in same and not _began_alike(record, same)):
            return None
        rows.append(place if place in same else same[0])
    return rows


def _began_alike(record: CacheRecord, rows: list[int]) -> bool:
    return all(len({s[r] for r in rows}) == 1 for s in record.starts.values())


# ---------------------------------------------------------------------- where an adapter begins


def continued_starts(
    name: str,
    tokens: Sequence[int],
    input_ids: Tensor | None,
    past: int,
    record: CacheRecord | None,
    rows: int,
) -> list[int | None]:
    """Absolute starts of `name` for a chunk that continues a cache of `past` tokens.

    A row in which the adapter has begun stays active. In any other row the adapter begins at the
    last invocation that is completely in the chunk.

    Raises:
        ValueError: tokens of the invocation are in the cache, and the base model wrote them there;
            or the chunk has no invocation, and what the cache holds is not known.
    """
    kept: list[int | None] = [None] * rows
    ran = record is not None and name in record.starts
    if ran:
        assert record is not None
        known = record.starts[name]
        if rows % len(known):
            raise ValueError(
                f"adapter {name!r}: the cache was written by {len(known)} rows and is continued "
                f"by {rows}, so where each row begins is not known; pass alora_offsets"
            )
        kept = [s for s in known for _ in range(rows // len(known))]
        _check_whole(name, tokens, kept, past, record.ids(rows, torch.device("cpu")), input_ids)
    if all(s is not None for s in kept):
        return kept
    if input_ids is None:
        raise ValueError(
            f"adapter {name!r}: only inputs_embeds came, in which an invocation cannot be found; "
            "pass alora_offsets (counted from the end of the row), or input_ids"
        )
    before = None if record is None else record.ids(rows, input_ids.device)
    if before is not None and ran:
        tail = len(tokens) - 1  # earlier tokens were searched when they came
        before = before[:, before.shape[1] - tail :] if tail and before.shape[1] > tail else before
        before = before if tail else None
    lead = 0 if before is None else before.shape[1]
    whole = input_ids if before is None else torch.cat([before, input_ids], 1)
    found = find_invocation_starts(whole, tokens).tolist()
    told = ran or (record is not None and record.whole)
    result: list[int | None] = []
    for row, (old, start) in enumerate(zip(kept, found)):
        if old is None and start < 0 and not told:
            raise unknown(name, row, past)
        if old is not None or start < 0:
            result.append(old)
        elif start >= lead:
            result.append(past + start - lead)
        elif input_ids.shape[1] == 1 and start + len(tokens) > lead:
            # The model ran without the adapter and has just generated the invocation itself.
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


def _check_whole(
    name: str,
    tokens: Sequence[int],
    starts: list[int | None],
    past: int,
    before: Tensor | None,
    input_ids: Tensor | None,
) -> None:
    """Refuse a cache that was cropped inside an invocation and continues with other tokens."""
    for row, start in enumerate(starts):
        if start is None or start + len(tokens) <= past or before is None or input_ids is None:
            continue
        kept = past - start
        if kept > before.shape[1] or before[row, -kept:].tolist() != list(tokens[:kept]):
            continue  # no invocation begins there: the user gave this start
        rest = list(tokens[kept:])[: input_ids.shape[1]]
        if input_ids[row, : len(rest)].tolist() != rest:
            raise ValueError(
                f"adapter {name!r}: in row {row} the cache was cropped to {past} tokens, inside "
                f"the invocation that begins at {start}, and goes on with other tokens, so the "
                f"adapter wrote tokens that are the base model's; crop to at most {start} tokens"
            )


def kept_starts(
    name: str,
    starts: list[int | None],
    past: int,
    record: CacheRecord | None,
    row_names: list[str | None] | None,
    assistant: bool,
) -> list[int | None]:
    """Absolute starts of `name` in whole rows; a cache holds the first `past` tokens of each.

    Args:
        starts: the start of the last invocation in each row.
        record: what is known of the cache. It may repeat each row of the prompt several times.
        row_names: the adapter of each row; None if all rows run the same.
        assistant: this is the assistant model of assisted decoding. The main model wrote the
            tokens and may have generated an invocation.

    Raises:
        ValueError: an invocation is in the cache, and the base model wrote it there.
    """
    old = record.starts.get(name) if record is not None else None
    times = max(1, len(old) // max(1, len(starts))) if old is not None else 1
    result: list[int | None] = []
    for place in range(len(starts) * times):
        row, start = place // times, starts[place // times]
        mine = row_names is None or row_names[row] == name
        known = old[place] if old is not None and place < len(old) else None
        if mine and start is not None and start < past and known is None and not assistant:
            raise unknown(name, row, past) if record is None else covered(name, row, start, past)
        late = start if start is not None and start >= past else None
        result.append(late if known is None else known)
    return result


def covered(name: str, row: int, start: int, past: int) -> ValueError:
    return ValueError(
        f"adapter {name!r}: in row {row} the invocation begins at position {start}, but the cache "
        f"already covers {past} tokens, written without this adapter; crop the cache to at most "
        f"{start} tokens, or prefill only what comes before the invocation"
    )


def unknown(name: str, row: int, past: int) -> ValueError:
    return ValueError(
        f"adapter {name!r}: row {row} continues a cache of {past} tokens, and it is not known "
        "whether the adapter has begun in it: this model did not write it, or its contents were "
        "changed since (another model, copies of the tensors, rows that were written in place). "
        "Pass alora_offsets (counted from the end of the row), or run it under adapter_scope(model,"
        " name, starts=[...]); under adapter_scope(model, None) or disable_adapter() for the base "
        "model"
    )
