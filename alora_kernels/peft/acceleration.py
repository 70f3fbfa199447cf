"""Acceleration: what an accelerated model carries; the one search per forward happens here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

from ..activation import Activation, current_activation, find_invocation_starts
from ..contract import Options
from . import checkpointing, records
from .ambient import ForwardState, Request, current_request, current_state, set_state
from .live import LiveModel
from .lonely import LonelyRows
from .refusal import invocation_of
from .rows import restrict, rows_of, starts_of
from .search import packed_mask, restarts

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


class Acceleration(LiveModel):
    """Hooks of one accelerated model. Attached to `root`, the model whose forward takes tokens."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        super().__init__(root, options)
        self.places = self._argument_places()
        self.recent: dict[Any, Activation] = {}
        self.lonely = LonelyRows()

    def _argument_places(self) -> dict[str, int]:
        names = list(inspect.signature(self.root.forward).parameters)
        return {name: names.index(name) for name in ARGUMENTS if name in names}

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
        if torch.compiler.is_compiling():
            self._enter(args, kwargs)
        else:
            self._enter_eagerly(module, args, kwargs)

    def after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of `root`, called after an exception as well."""
        if torch.compiler.is_compiling():
            self._leave(args, kwargs, output)
        else:
            self._leave_eagerly(args, kwargs, output)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state_of(args, kwargs)
        state.outer = current_state()
        set_state(state)

    @torch.compiler.disable
    def _enter_eagerly(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.refresh():
            return  # all its adapters were merged or unloaded
        if module.training:
            checkpointing.watch(self.checkpointing)
        self._enter(args, kwargs)

    def _leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
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

    _leave_eagerly = torch.compiler.disable(_leave)

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
            names, row_names = rows_of(request.names, batch)
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
                state.activations[name] = restrict(state, name, request.activation)
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
                given = starts_of(state, name, given)
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
            self.lonely.look(name, lonely)
        if ids.device.type == "cpu" and begin is None:
            rows = [None if s < 0 else s for s in found.tolist()]
            starts[name] = starts_of(state, name, rows)
            return self._from_starts(starts[name], state, 0, ids.device)
        if begin is None and not self.root.training:
            starts[name] = starts_of(state, name, [None if s < 0 else s for s in found.tolist()])
        return Activation.from_mask(mask)

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


# torch.compile of `root` itself runs its hooks outside the graph, and would compile each of them as
# a graph of its own; of a model around `root` it takes them into the graph.
for _hook in (Acceleration.before_forward, Acceleration.after_forward):
    skip_code(_hook.__code__)
