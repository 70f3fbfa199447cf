"""Acceleration: what an accelerated model carries; the one search per forward happens here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import Activation, current_activation, find_invocation_starts
from . import checkpointing, records
from .ambient import (
    ForwardState,
    Request,
    current_request,
    current_state,
    requesting,
    set_state,
)
from .refusal import invocation_of
from .search import packed_mask, restarts

BASE = "__base__"  # PEFT's word for a row of the base model
ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "cu_seq_lens_q",
    "logits_to_keep",
)


class Acceleration:
    """Hooks of one accelerated model. Attached to `root`, the model whose forward takes tokens.

    Attributes:
        root: the transformers model (or any module) that holds the LoRA layers.
        options: passed to every op.
        layers: every LoRA layer, by its name in `root`.
        served: the names of those that run our forward.
    """

    def __init__(self, root: nn.Module, options: dict[str, Any]) -> None:
        self.root, self.options = root, options
        self.layers: dict[str, Any] = {}
        self.served: set[str] = set()
        self.refused: dict[str, str] = {}
        self.places = self._argument_places()
        self.handles: list[Any] = []
        self.checkpointing = [m for m in root.modules() if hasattr(m, "gradient_checkpointing")]
        self.warned: set[str] = set()
        self.recent: dict[Any, Activation] = {}
        self.unread: tuple[str, Tensor, Any] | None = None

    def _argument_places(self) -> dict[str, int]:
        names = list(inspect.signature(self.root.forward).parameters)
        return {name: names.index(name) for name in ARGUMENTS if name in names}

    @property
    def configs(self) -> dict[str, Any]:
        return getattr(self.root, "peft_config", {})

    def active_names(self) -> tuple[str, ...]:
        """The active adapters, as the first LoRA layer has them; none when they are disabled."""
        for layer in self.layers.values():
            if layer._disable_adapters:
                return ()
            active = layer._active_adapter
            return (active,) if isinstance(active, str) else tuple(active)
        return ()

    # ------------------------------------------------------------------ one forward

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of `root`: find the active rows and make them the current state."""
        if module.training and not torch.compiler.is_compiling():
            checkpointing.watch(self.checkpointing)
        state = self.state_of(args, kwargs)
        state.outer = current_state()
        set_state(state)

    def after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of `root`, called after an exception as well."""
        state = current_state()
        if state is None or state.owner is not self:
            return  # the pre-hook itself raised
        state.pending = None
        set_state(state.outer)
        if torch.compiler.is_compiling() or output is None:
            return
        cache = self._cache(self._arguments(args, kwargs))
        if cache is None and isinstance(output, dict):
            cache = output.get("cache", output.get("past_key_values"))
        note = getattr(state, "note", None)
        if cache is not None and note is not None:
            record, ids, past, starts = note
            length = past + state.seq_len
            records.write_record(cache, record.extended(ids, length, starts))

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, place in self.places.items():
            found[name] = args[place] if place < len(args) else kwargs.get(name)
        for name in ("past_key_values", "cu_seq_lens_q"):
            if name not in found:
                found[name] = kwargs.get(name)
        return found

    @staticmethod
    def _cache(arguments: dict[str, Any]) -> Any:
        cache = arguments.get("cache")
        return arguments.get("past_key_values") if cache is None else cache

    def state_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardState:
        """The state of a forward with these arguments."""
        arguments = self._arguments(args, kwargs)
        ids = arguments.get("input_ids")
        tokens = ids if ids is not None else arguments.get("inputs_embeds")
        if tokens is None:  # a module of its own making: its first argument is what it has
            tokens = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if tokens is None:
                return ForwardState(self, None, {}, 0, 0)
            ids = None if tokens.is_floating_point() else tokens
        batch, seq_len = self._size(tokens, ids)
        if ids is not None and ids.dim() == 1:
            ids = ids.unsqueeze(0)
        keep = arguments.get("logits_to_keep")
        request = current_request(self)
        chosen = request is not None and request.chosen
        row_names = None
        if chosen:
            assert request is not None
            names, row_names = self._rows_of(request.names, batch)
        else:
            names = self.active_names()
        state = ForwardState(
            self,
            names if chosen else None,
            {},
            batch,
            seq_len,
            0 if keep is None else keep,
            row_names,
        )
        if request is not None and request.activation is not None:
            for name in names:
                state.activations[name] = self._restrict(request.activation, name, state)
            return state
        self._find(state, names, request, arguments, ids, tokens.device)
        return state

    @staticmethod
    def _size(tokens: Tensor, ids: Tensor | None) -> tuple[int, int]:
        shape = tokens.shape if ids is not None else tokens.shape[:-1]
        if len(shape) == 1:
            return 1, shape[0]
        if len(shape) == 0:
            return 1, 1
        return shape[0], shape[1:].numel()

    @staticmethod
    def _rows_of(
        names: str | list[str | None] | None, batch: int
    ) -> tuple[tuple[str, ...], list[str | None] | None]:
        """The adapters that are named, and the one of each of `batch` rows where rows differ."""
        if names is None:
            return (), None
        if isinstance(names, str):
            return (names,), None
        rows = [None if n is None or n == BASE else n for n in names]
        if batch % max(len(rows), 1) or not rows:
            raise ValueError(
                f"{len(rows)} adapter names were given for a batch of {batch} rows; give one for "
                "each row (generate repeats them for beams and return sequences)"
            )
        rows = [n for n in rows for _ in range(batch // len(rows))]
        return tuple(dict.fromkeys(n for n in rows if n is not None)), rows

    def _restrict(self, activation: Activation, name: str, state: ForwardState) -> Activation:
        """The rows of `activation` that run `name`."""
        if state.row_names is None:
            return activation
        mine = [n == name for n in state.row_names]
        rows = activation.num_rows // len(mine)
        mask = torch.tensor(mine).repeat_interleave(rows).to(activation.device)
        return Activation.from_mask(activation.mask & mask)

    def _find(
        self,
        state: ForwardState,
        names: Sequence[str],
        request: Request | None,
        arguments: dict[str, Any],
        ids: Tensor | None,
        device: torch.device,
    ) -> None:
        """Fill `state.activations` for `names`, and note what the cache will have to remember."""
        cache = self._cache(arguments)
        past = records.cache_length(cache)
        continued = isinstance(past, Tensor) or past > 0
        record, starts = None, {}
        if not torch.compiler.is_compiling():
            if isinstance(past, Tensor):
                past = int(past)
                continued = past > 0
            record = records.record_of(cache, past) if continued else None
        begin = None
        searched = False
        for name in names:
            config = self.configs.get(name)
            tokens = invocation_of(config)
            given = self._given(state, name, request, past, tokens is not None)
            if given is None and tokens is None:
                given = self._whole_rows(state, name)
            if given is None:
                assert tokens is not None
                if continued and not torch.compiler.is_compiling():
                    given = records.continued_starts(name, tokens, ids, past, record, state.batch)
                elif continued:
                    raise NotImplementedError(
                        "a compiled forward that continues a cache has to be told where its "
                        "adapter begins: run it inside generate, or inside "
                        "adapter_scope(model, name, starts=[...])"
                    )
            if given is not None:
                given = self._mine(state, name, given)
                starts[name] = given
                state.activations[name] = self._from_starts(given, state, past, device)
                continue
            if ids is None:
                raise ValueError(
                    f"adapter {name!r}: only inputs_embeds came, in which its invocation cannot "
                    "be found; pass alora_offsets (counted from the end of the row), or input_ids"
                )
            assert tokens is not None
            if not searched:
                searched = True
                begin = restarts(
                    arguments.get("position_ids"),
                    arguments.get("attention_mask"),
                    arguments.get("cu_seq_lens_q"),
                    ids,
                )
            state.activations[name] = self._search(state, name, ids, tokens, begin, starts)
        if torch.compiler.is_compiling():
            return
        if cache is not None or not self.root.training:
            state.note = (record or records.CacheRecord(), ids, past, starts)  # type: ignore[attr-defined]

    def _given(
        self, state: ForwardState, name: str, request: Request | None, past: Any, alora: bool
    ) -> list[int | None] | None:
        """Absolute starts that the request tells."""
        if request is None:
            return None
        rows = None
        if request.starts is not None:
            rows = list(request.starts)
        elif request.found is not None and name in request.found:
            rows = list(request.found[name])
        elif request.offsets is not None and alora:
            end = past + state.seq_len
            rows = [None if not o or o < 0 else max(end - int(o), 0) for o in request.offsets]
        if rows is None:
            return None
        if not rows or state.batch % len(rows):
            raise ValueError(
                f"adapter {name!r}: {len(rows)} starts or alora_offsets were given for a batch of "
                f"{state.batch} rows; give one for each row"
            )
        return [r for r in rows for _ in range(state.batch // len(rows))]

    def _whole_rows(self, state: ForwardState, name: str) -> list[int | None]:
        return [0] * state.batch

    @staticmethod
    def _mine(state: ForwardState, name: str, starts: list[int | None]) -> list[int | None]:
        if state.row_names is None:
            return starts
        return [s if n == name else None for s, n in zip(starts, state.row_names)]

    def _from_starts(
        self, starts: list[int | None], state: ForwardState, past: Any, device: torch.device
    ) -> Activation:
        """The activation of one chunk; the same one again while decoding repeats itself."""
        seq_len = state.seq_len
        if isinstance(past, Tensor) or torch.compiler.is_compiling():
            values = [-1 if s is None else s for s in starts]
            return Activation.from_starts(torch.tensor(values, device=device), seq_len, past)
        relative = tuple(
            [None if s is None or s - past >= seq_len else max(s - past, 0) for s in starts]
        )
        key = (relative, seq_len, device)
        found = self.recent.get(key)
        if found is None:
            if len(self.recent) >= 8:
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
        starts: dict[str, list[int | None]],
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
        if torch.compiler.is_compiling():
            return Activation.from_mask(mask)
        if self.root.training and torch.is_grad_enabled():
            self._warn_of_lonely_rows(name, lonely)
        if ids.device.type == "cpu" and begin is None:
            rows = [None if s < 0 else s for s in found.tolist()]
            starts[name] = self._mine(state, name, rows)
            return self._from_starts(starts[name], state, 0, ids.device)
        if begin is None and not self.root.training:
            starts[name] = self._mine(state, name, [None if s < 0 else s for s in found.tolist()])
        return Activation.from_mask(mask)

    def _warn_of_lonely_rows(self, name: str, lonely: Tensor) -> None:
        """Warn once that a training row has no invocation, without waiting for the device."""
        if name in self.warned:
            return
        if lonely.device.type == "cpu":
            rows = lonely.tolist()
        else:  # looked at in the next forward, when the copy has long arrived
            before, self.unread = self.unread, None
            event = torch.cuda.Event() if lonely.device.type == "cuda" else None
            self.unread = (name, lonely.to("cpu", non_blocking=event is not None), event)
            if event is not None:
                event.record()
            if before is None or (before[2] is not None and not before[2].query()):
                return
            name, rows = before[0], before[1].tolist()
        missing = [i for i, flag in enumerate(rows) if flag]
        if missing:
            self.warned.add(name)
            warnings.warn(
                f"adapter {name!r}: training row {', '.join(map(str, missing))} of this batch has "
                "no invocation, so it trains nothing; was it truncated away? (warned once)",
                stacklevel=2,
            )

    def late_activation(self, state: ForwardState, name: str) -> Activation:
        """For an adapter that is active in some layer only: it cannot be searched for now."""
        if state.rows and invocation_of(self.configs.get(name)) is None:
            return Activation.all(state.rows)
        raise RuntimeError(
            f"adapter {name!r} is active in a layer but not in the first LoRA layer of the model, "
            "so its invocation was not searched for; activate adapters through model.set_adapter"
        )

    # ------------------------------------------------------------------ outside a forward

    def outside(self, layer: Any, x: Tensor) -> ForwardState:
        """The state of a layer that is called on its own: by `activate`, or plain LoRA alone."""
        rows = x.shape[:-1].numel()
        batch, seq_len = (x.shape[0], rows // x.shape[0]) if x.dim() > 2 and rows else (1, rows)
        state = ForwardState(self, None, {}, batch, seq_len)
        ambient = current_activation()
        active = layer._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            if invocation_of(self.configs.get(name)) is None:
                state.activations[name] = Activation.all(rows, device=x.device)
            elif ambient is not None:
                state.activations[name] = ambient
            elif name in layer.lora_A:
                raise RuntimeError(
                    f"adapter {name!r}: a layer was called outside the forward of "
                    f"{type(self.root).__name__}, so where its invocation begins is not known; "
                    "call the whole model, or run the layer under adapter_scope(model, name, "
                    "activation) or activate(activation). (A recomputation by a checkpoint that "
                    "is not the model's own gradient_checkpointing comes here too.)"
                )
        return state

    def peft_arguments(
        self, layer: Any, state: ForwardState, names: tuple[str, ...]
    ) -> dict[str, Any]:
        """The keyword arguments with which PEFT's forward does the same for `layer`."""
        offsets: list[int | None] | None = None
        for name in names:
            if invocation_of(self.configs.get(name)) is None or name not in layer.lora_A:
                continue
            mask = state.activations[name].mask.view(state.batch, state.seq_len).cpu()
            counts = mask.sum(1)
            position = torch.arange(state.seq_len)
            if not torch.equal(mask, position >= (state.seq_len - counts).unsqueeze(1)):
                raise NotImplementedError(
                    f"adapter {name!r}: a layer that keeps PEFT's forward cannot run packed rows"
                )
            mine = [int(c) or None for c in counts]
            if offsets is None:
                offsets = mine
            elif state.row_names is not None:
                offsets = [b if a is None else a for a, b in zip(offsets, mine)]
            elif offsets != mine:
                raise NotImplementedError(
                    "two activated LoRAs with different invocations are active in a layer that "
                    "keeps PEFT's forward, which knows one start for each row"
                )
        arguments: dict[str, Any] = {"alora_offsets": offsets}
        if state.names is not None:
            rows = state.row_names or [*(state.names or (None,))] * state.batch
            arguments["adapter_names"] = [BASE if n is None else n for n in rows]
        return arguments

    def before_unserved(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of a layer that keeps PEFT's forward: hand it what PEFT would."""
        state = current_state()
        if state is None or state.owner is not self or layer._disable_adapters:
            return None
        names = state.names
        if names is None:
            active: Any = layer._active_adapter
            names = (active,) if isinstance(active, str) else tuple(active)
        known = getattr(layer, "lora_A", {})
        extra = self.peft_arguments(layer, state, tuple(n for n in names if n in known))
        if extra["alora_offsets"] is None:
            del extra["alora_offsets"]
        return args, {**kwargs, **extra}

    # ------------------------------------------------------------------ generate

    def generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> requesting:
        """The scope of one `generate` call: the starts are found once, in the prompt."""
        outer = current_request(self)
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
            return requesting(Request(self, chosen, picked))
        batch, width = rows.shape[:2]
        mask = kwargs.get("attention_mask")
        fed = 0  # position of the first of `ids`
        if (past and isinstance(mask, Tensor) and mask.shape[1] != width) or (
            past and width <= past
        ):
            fed = past
        if chosen:
            adapters, row_names = self._rows_of(picked, batch)
        else:
            adapters, row_names = self.active_names(), None
        record = records.record_of(cache, past) if past else None
        found: dict[str, list[int | None]] = {}
        for name in adapters:
            tokens = invocation_of(self.configs.get(name))
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
        return requesting(Request(self, chosen, picked, found=found))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`root.generate` with the starts of its prompt."""
        with self.generation(args, kwargs):
            return type(self.root).generate(self.root, *args, **kwargs)  # type: ignore[attr-defined]
