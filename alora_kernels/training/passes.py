"""The passes through a model: how it is called, and what is off while the prefix runs."""

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
    """How this model is called: names of arguments, layers, wrappers."""

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

        `everywhere`: the adapter is on at every token.
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


@contextmanager
def prefix_pass(peft: Any, device: torch.device) -> Iterator[None]:
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
def unmasked_adapter(peft: Any) -> Iterator[None]:
    """PEFT's layers without their search for active tokens, for a pass where every token is.

    PEFT's aLoRA gathers the active rows and scatters them back, serially and for each layer; with
    every row active its plain LoRA computes the same. Layers that are checkpointed run again when
    this is over, so a checkpointed model is left as it is; so are accelerated layers.
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
def stop_in_last_layer(peft: Any, collector: PrefixCollector) -> Iterator[None]:
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
