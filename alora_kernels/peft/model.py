"""The functions that a user calls: accelerate, restore and adapter_scope."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..activation import Activation
from ..contract import Options
from .acceleration import Acceleration
from .adapters import OURS, Adapters
from .adoption import check_configs, refusals, table
from .requests import Names, Request, requesting, rows_of
from .state import BlockState, ForwardState, current_state, restrict, set_state
from .wrappers import root_of, unwrap, wrap


def accelerate(
    model: Any,
    strict: bool = False,
    *,
    adapter_precision: str = "fp32",
    backend: str = "auto",
    strategy: str = "auto",
    prefix_grad: bool = True,
) -> Any:
    """Make a live PEFT model run its LoRA layers through this package; returns the same object.

    All functions of PEFT keep working: saving, loading, adding, choosing and deleting adapters,
    mixed batches by `adapter_names`, `alora_offsets=`, generation, training. The invocation is
    searched for once per forward, and all layers share the result. Layers that cannot be served
    keep PEFT's forward, and a warning names each of them with the reason. `restore` undoes all of
    this.

    Args:
        model: a `PeftModel`, or a model whose adapters came from `add_adapter` or
            `inject_adapter_in_model`, with any number of LoRA and aLoRA adapters.
        strict: raise an error if a layer cannot be served.
        adapter_precision, backend, strategy, prefix_grad: options of `alora_linear`. The default
            precision is PEFT's own arithmetic; "compute" rounds adapters to the base's dtype.

    Raises:
        TypeError: the model has no LoRA layer.
        ValueError: an adapter would give wrong results without an error (see `check_config`).
        RuntimeError: with `strict`, a layer cannot be served; the message lists every such layer.
    """
    root = root_of(model)
    layers = {path: m for path, m in root.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise TypeError(
            f"accelerate: {type(model).__name__} has no LoRA layer; expected a PeftModel, or a "
            "model with an adapter from add_adapter or inject_adapter_in_model"
        )
    check_configs(root, layers)
    refused = refusals(layers)
    if strict and refused:
        raise RuntimeError("accelerate: layers that cannot be served:\n" + table(refused))
    options = Options(
        dropout_p=0.0,  # every layer sets its own
        prefix_grad=prefix_grad,
        adapter_precision=adapter_precision,
        strict_inactive=False,
        backend=backend,
        strategy=strategy,
    )
    wrappers = [unwrap(model)]
    if OURS in root.__dict__:
        wrappers += root.__dict__[OURS].wrappers
        root.__dict__[OURS].detach()
    owner = Acceleration(root, options)
    owner.attach()
    owner.look_again()
    for wrapper in wrappers:
        wrap(wrapper, owner)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`; returns the same object."""
    owner = root_of(model).__dict__.get(OURS)
    if owner is not None:
        owner.detach()
    return model


@contextmanager
def adapter_scope(
    model: nn.Module,
    adapter: Names,
    activation: Activation | None = None,
    *,
    starts: Sequence[int | None] | None = None,
) -> Iterator[None]:
    """Choose the adapter of every forward in the block, without changing the model.

    with adapter_scope(model, "summary", starts=[812]):
        model(input_ids, past_key_values=cache)

    Each thread and each asyncio task sees its own scopes only. A scope overrides the active
    adapters, but not `disable_adapter`.

    Args:
        model: an accelerated model.
        adapter: None for the base model, a name for all rows, or a list with one name (or None)
            for each row of the batch.
        activation: the active rows of the forwards in the block, `[B·T]`. Layers that are called
            on their own use it too. By default each forward searches its own tokens.
        starts: the absolute start in each row (None = base model), counted in tokens from the
            beginning of the row's cache. The same starts serve prefill, chunks and decoding.

    `starts` and `activation` hold for every forward in the block. Around `generate` they hold for
    its own sequence alone, not for a negative prompt or for forwards of a logits processor.

    Raises:
        ValueError: the model is not accelerated, an adapter is unknown, or both `activation` and
            `starts` are given.
    """
    owner = root_of(model).__dict__.get(OURS)
    if owner is None or not owner.refresh():
        raise ValueError("adapter_scope: the model is not accelerated; call accelerate(model)")
    if activation is not None and starts is not None:
        raise ValueError("adapter_scope: give activation or starts, not both")
    names = [adapter] if adapter is None or isinstance(adapter, str) else list(adapter)
    owner.check_names([n for n in names if n is not None], "adapter_scope")
    chosen = adapter if adapter is None or isinstance(adapter, str) else names
    request = Request(owner.adapters, True, chosen, starts=starts, activation=activation)
    outer, state = current_state(), None
    if activation is not None or adapter is None:
        state = _fixed_state(owner.adapters, chosen, activation)
        set_state(state)
    try:
        with requesting(request):
            yield
    finally:
        if state is not None:
            set_state(outer)


def _fixed_state(adapters: Adapters, chosen: Names, activation: Activation | None) -> ForwardState:
    """The state for layers that are called on their own inside a scope."""
    rows = 0 if activation is None else activation.num_rows
    batch = len(chosen) if isinstance(chosen, list) else 1
    if rows % batch:
        raise ValueError(
            f"adapter_scope: the activation has {rows} rows, which is no multiple of the {batch} "
            "adapter names"
        )
    names, row_names = rows_of(chosen, batch)
    if row_names is None:
        batch = 0  # one adapter for all rows, so their layout does not matter
    state = BlockState(adapters, names, {}, batch, rows // max(batch, 1), row_names=row_names)
    for name in names:
        assert activation is not None
        state.activations[name] = restrict(state, name, activation)
    return state
