"""Finds where the adapters of a forward begin: from the user, the cache's record, or the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    recall,
    record_of,
    write_record,
)
from .requests import Request
from .starts import LonelyRows, packed_mask, restarts
from .state import ForwardState, Note, starts_of

Starts = list[int | None]


class Sequences:
    """Finds the active rows of every forward of one model.

    A forward reads the next part of a sequence. For the forwards of `generate`, the call of
    `generate` knows where the adapters begin. For every other forward, also one that runs during
    `generate`, the record of its cache knows. Without a cache the sequence is new, and the
    invocation is searched for in its tokens.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.recent: dict[Any, Activation] = {}
        self.lonely = LonelyRows()

    def find(
        self,
        state: ForwardState,
        names: Sequence[str],
        request: Request | None,
        arguments: Mapping[str, Any],
        ids: Tensor | None,
        tokens: Tensor,
    ) -> None:
        """Fill `state.activations` for `names`, and note what the cache's record has to take up.

        Args:
            state: the state of the forward.
            names: the adapters to find.
            request: what the user asks of this forward, or None.
            arguments: the arguments of the forward, by name.
            ids: the token ids, or None if only embeddings came.
            tokens: the ids, or the embeddings.

        Raises:
            ValueError: it is not known where an adapter begins.
            NotImplementedError: a compiled forward continues a cache, and nobody gave the starts.
        """
        generation = None if request is None else request.generation
        cache = caches.among(arguments)
        if generation is not None and generation.owns(tokens, ids, cache):
            state.generation = generation
        invocations = {name: self.adapters.invocation(name) for name in names}
        told = {name: self._told(state, name, request) for name in names}
        if all(t is None and told[n] is None for n, t in invocations.items()):
            for name in names:  # only plain LoRAs: nothing to find, so the cache is not asked
                rows = state.starts[name] = starts_of(state, name, [0] * state.batch)
                state.activations[name] = self._from_starts(rows, state, 0, tokens.device)
            self._note(state, Note(ids, plain=True))
            return
        past = self._past(state, arguments, cache)
        compiling = torch.compiler.is_compiling()
        if isinstance(past, Tensor) and not compiling:
            past = int(past)
        record = None
        continued = past is None or isinstance(past, Tensor) or past > 0
        if continued and not compiling and (state.generation is None or past is None):
            record = recall(cache, past, self.adapters.key)
            if past is None and record is not None:
                past = record.length
        starts: dict[str, Starts] = {}
        state.past, state.starts, state.cache = past, starts, cache
        begin_at: Any = _unsearched
        for name in names:
            invocation = invocations[name]
            given = told[name]
            if given is None and request is not None and request.offsets is not None and invocation:
                given = self._counted(state, name, request.offsets, past)
            if given is None and invocation is None:
                given = [0] * state.batch
            if given is None and continued:
                assert invocation is not None
                if compiling:
                    raise NotImplementedError(
                        "a compiled forward that continues a cache has to be told where its "
                        "adapter begins: run it inside generate, or inside "
                        "adapter_scope(model, name, starts=[...])"
                    )
                if past is None:
                    raise self.lengthless(name, cache)
                given = continued_starts(name, invocation, ids, past, record, state.batch)
            if given is not None:
                given = starts_of(state, name, given)
                if past is None and any(given) and told[name] is not None:
                    raise self.lengthless(name, cache)
                starts[name] = given
                state.activations[name] = self._from_starts(given, state, past or 0, tokens.device)
                continue
            if ids is None:
                raise ValueError(
                    f"adapter {name!r}: only inputs_embeds came, in which its invocation cannot "
                    "be found; pass alora_offsets (counted from the end of the row), or input_ids"
                )
            assert invocation is not None
            if begin_at is _unsearched:
                begin_at = restarts(
                    arguments.get("position_ids"),
                    arguments.get("attention_mask"),
                    arguments.get("cu_seq_lens_q"),
                    ids,
                )
            state.activations[name] = self._search(state, name, ids, invocation, begin_at, starts)
        starts = {n: s for n, s in starts.items() if invocations[n] is not None}
        self._note(state, Note(ids, past, record, starts))

    # ------------------------------------------------------------------ what is known beforehand

    def _told(self, state: ForwardState, name: str, request: Request | None) -> Starts | None:
        """The absolute starts that `adapter_scope` or `generate` gives; None if neither does."""
        rows: Sequence[int | None] | None = None
        if request is not None and request.starts is not None:
            rows = request.starts
        elif state.generation is not None:
            rows = state.generation.starts_of(name)
        return None if rows is None else _for_rows(name, rows, state.batch)

    def _counted(
        self, state: ForwardState, name: str, offsets: Sequence[int | None], past: Any
    ) -> Starts:
        """The absolute starts that PEFT's `alora_offsets` give, counted from this forward's end."""
        end = state.seq_len if past is None else past + state.seq_len
        rows = [None if not o or o < 0 else max(end - int(o), 0) for o in offsets]
        return _for_rows(name, rows, state.batch)

    def _past(self, state: ForwardState, arguments: Mapping[str, Any], cache: Any) -> Any:
        """The number of tokens that were read before this forward; None if it is not known."""
        length = caches.length_of(cache)
        if state.generation is not None:
            return state.generation.past(state.seq_len, length, cache)
        position = arguments.get("cache_position")
        if length is None and isinstance(position, Tensor) and position.numel():
            return int(position.flatten()[0])
        return length

    def lengthless(self, name: str, cache: Any) -> ValueError:
        return ValueError(
            f"adapter {name!r}: {type(self.adapters.root).__name__} continues a "
            f"{type(cache).__name__}, of which it is not known how many tokens it has read, so "
            "where the adapter begins is not known either. Use model.generate, continue the very "
            "cache that this model wrote last, or tell the active rows: alora_offsets (counted "
            "from the end of the row), or adapter_scope(model, name, activation)"
        )

    # ------------------------------------------------------------------ activations

    def _from_starts(
        self, starts: Starts, state: ForwardState, past: Any, device: torch.device
    ) -> Activation:
        """The activation of one chunk. Chunks with equal relative starts share one object."""
        seq_len = state.seq_len
        if isinstance(past, Tensor) or torch.compiler.is_compiling():
            values = [-1 if s is None else s for s in starts]
            return Activation.from_starts(torch.tensor(values, device=device), seq_len, past)
        relative = tuple(
            [None if s is None or s - past >= seq_len else max(s - past, 0) for s in starts]
        )
        # Tensors made in inference mode cannot be saved for a backward later.
        key = (relative, seq_len, device, torch.is_inference_mode_enabled())
        found = self.recent.get(key)
        if found is None:
            if len(self.recent) >= 64:
                self.recent.clear()
            found = self.recent[key] = Activation.from_starts(relative, seq_len, device=device)
        return found

    def _search(
        self,
        state: ForwardState,
        name: str,
        ids: Tensor,
        tokens: list[int],
        begin: Tensor | None,
        starts: dict[str, Starts],
    ) -> Activation:
        """The activation of whole rows of tokens, none of them in a cache yet."""
        if begin is not None:
            mask = packed_mask(ids, tokens, begin)
            lonely = ~mask.any(1)
        else:
            found = find_invocation_starts(ids, tokens)
            lonely = found < 0
            position = torch.arange(state.seq_len, device=ids.device)
            mask = (found >= 0).unsqueeze(1) & (position >= found.unsqueeze(1))
        if state.row_names is not None:
            mine = torch.tensor([n == name for n in state.row_names], device=ids.device)
            mask, lonely = mask & mine.unsqueeze(1), lonely & mine
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(ids):
            return Activation.from_mask(mask)
        training = self.adapters.root.training and torch.is_grad_enabled()
        if begin is not None or (self.adapters.root.training and ids.device.type != "cpu"):
            self.lonely.look(name, tokens, lonely, training)
            return Activation.from_mask(mask)
        rows = [None if s < 0 else s for s in found.tolist()]
        starts[name] = starts_of(state, name, rows)
        self.look(state.row_names, name, rows, training)
        if ids.device.type != "cpu":
            return Activation.from_mask(mask)
        return self._from_starts(starts[name], state, 0, ids.device)

    def look(
        self, row_names: list[str | None] | None, name: str, starts: Starts, training: bool = False
    ) -> None:
        """Say once which rows that run `name` have no invocation."""
        tokens = self.adapters.invocation(name)
        mine = [name] * len(starts) if row_names is None else row_names
        lonely = [s is None and n == name for s, n in zip(starts, mine)]
        self.lonely.look(name, tokens or [], lonely, training)

    # ------------------------------------------------------------------ after the forward

    def _note(self, state: ForwardState, note: Note) -> None:
        if not torch.compiler.is_compiling():
            state.note = note

    def remember(self, state: ForwardState, arguments: Mapping[str, Any], output: Any) -> None:
        """Add the tokens of this forward to the record of its cache."""
        note, given = state.note, caches.among(arguments)
        if note is None or not self.adapters.any_activated():
            return
        cache = caches.of_output(output)
        cache = given if cache is None else cache
        if cache is None:
            return
        if state.generation is not None and note.past is not None:
            state.generation.wrote(cache, note.past + state.seq_len)
        bits = caches.fingerprint(cache, state.seq_len)
        if bits is None or (note.past is None and not note.plain):
            forget(cache)  # a record that cannot be compared later is worth nothing
            return
        chunk = Chunk(state.seq_len, note.ids, bits, note.plain)
        record = note.record
        if note.plain and given is not None:
            record = record_of(given) or CacheRecord(None, self.adapters.key)
        elif state.generation is not None and note.past:
            record = record_of(cache)
            if record is not None:
                fits = record.length >= note.past and record.writer == self.adapters.key
                record = record.cut(note.past) if fits else None
        if record is None:
            record = CacheRecord(note.past or 0, self.adapters.key)
        write_record(cache, record.extended(chunk, note.starts))


_unsearched = object()


def _for_rows(name: str, rows: Sequence[int | None], batch: int) -> Starts:
    if not len(rows) or batch % len(rows):
        raise ValueError(
            f"adapter {name!r}: {len(rows)} starts or alora_offsets were given for a batch of "
            f"{batch} rows; give one for each row"
        )
    return [r for r in rows for _ in range(batch // len(rows))]
