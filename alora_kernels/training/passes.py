"""Calls a model for the prefix and the suffix, and switches off what the prefix must not run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn

from ..peft.adapters import is_adopted
from .checkpointing import lending
from .fingerprint import is_sharded
from .guard import text_config, unwrap
from .kv import LastLayerDone, PrefixCollector, ReadOnlyPrefix


class ModelCall:
    """Calls one model; knows the names of its arguments and what wraps it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.peft: Any = unwrap(model)
        parameters = inspect.signature(type(self.peft.get_base_model()).forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.takes_positions = "position_ids" in parameters
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        self.windows: list[int | None] = []

    @property
    def sharded(self) -> bool:
        """Whether every pass is a collective operation."""
        return is_sharded(self.peft)

    def run(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        *,
        offsets: list[int | None],
        cache: ReadOnlyPrefix | None = None,
        everywhere: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """One pass with gradient through the outermost wrapper; returns the logits.

        `everywhere` says that the adapter is on at every token.
        """
        inputs["use_cache"] = False
        if cache is not None:
            inputs[self.cache_name] = cache
        if self.takes_positions:
            inputs["position_ids"] = positions
        with ExitStack() as stack:
            if everywhere:
                stack.enter_context(unmasked_adapter(self.peft))
            if not torch.is_grad_enabled():
                stack.enter_context(_attribute(self.peft, "gradient_checkpointing", True, False))
            elif cache is not None:
                stack.enter_context(lending(self.peft, cache))
            output = self.model(
                input_ids=input_ids, attention_mask=mask, alora_offsets=offsets, **inputs
            )
        return output.logits if hasattr(output, "logits") else output[0]

    def collect(self, input_ids: Tensor, positions: Tensor, cache: Any) -> None:
        """One pass of the base model without gradient. It writes keys and values into `cache`."""
        inputs: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            inputs[self.cache_name] = cache
        if self.takes_positions:
            inputs["position_ids"] = positions
        if self.takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        # This calls the module inside DDP: DDP's own forward would broadcast buffers, and ranks may
        # run different numbers of passes. FSDP2 gathers its shards in hooks of this module, so they
        # run.
        self.peft(
            input_ids=input_ids,
            attention_mask=None,
            alora_offsets=[None] * input_ids.shape[0],
            **inputs,
        )


@contextmanager
def prefix_pass(peft: Any, device: torch.device) -> Iterator[None]:
    """In the block the base model runs alone: no adapter, no checkpointing. The state of the
    random number generators is restored after it."""
    devices = [device] if device.type not in ("cpu", "meta", "mps") else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=device.type))
        stack.enter_context(_attribute(peft, "_disable_adapters", False, True))
        stack.enter_context(_attribute(peft, "gradient_checkpointing", True, False))
        disabled = peft._adapters_disabled
        peft._adapters_disabled = True  # so that PEFT installs no hooks
        stack.callback(setattr, peft, "_adapters_disabled", disabled)
        yield


@contextmanager
def unmasked_adapter(peft: Any) -> Iterator[None]:
    """Make PEFT's aLoRA layers run as plain LoRA in the block, in which every token is active.

    PEFT's aLoRA gathers the active rows and scatters them back, in every layer. If all rows are
    active, plain LoRA computes the same result faster. Accelerated layers are not changed. Nor is a
    model with gradient checkpointing, because its layers run again after the block.
    """
    modules = list(peft.modules())
    if any(getattr(m, "gradient_checkpointing", None) is True for m in modules):
        yield
        return
    changed = []
    for module in modules:
        variants = getattr(module, "lora_variant", None)
        if variants and not is_adopted(module):
            changed.append((module, variants))
            module.lora_variant = {
                name: v for name, v in variants.items() if not isinstance(v, ALoraLinearVariant)
            }
    try:
        yield
    finally:
        for module, variants in changed:
            module.lora_variant = variants


@contextmanager
def _attribute(model: nn.Module, name: str, old: bool, new: bool) -> Iterator[None]:
    """Set attribute `name` to `new` on every module where it is `old`; undo it after the block."""
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
def stop_in_last_layer(peft: Any, collector: PrefixCollector) -> Iterator[None]:
    """Leave the last decoder layer as soon as its keys and values are stored.

    The rest of that layer (attention, output projection, MLP) only leads to logits that nobody
    reads. The collector raises an exception inside the layer, and a wrapper around the layer's
    `forward` catches it. So all hooks around the layer (those of FSDP2, of accelerate) run as
    usual.
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
        plain = isinstance(output, Tensor)  # a layer returns hidden states alone, not a tuple

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
    """The list of decoder layers; None if it is not clear which list it is, or has one layer."""
    count = int(text_config(peft).num_hidden_layers)
    lists = [
        m
        for m in peft.get_base_model().modules()
        if isinstance(m, nn.ModuleList) and len(m) == count and count > 1
    ]
    return lists[0] if len(lists) == 1 else None
