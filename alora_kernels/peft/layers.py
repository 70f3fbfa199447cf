"""PEFT's LoRA layers with another forward: base and adapter in one op, groups in one call."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..backends import Projection
from ..functional import alora_add, alora_linear, alora_linear_group
from ..prepared import Prepared
from .ambient import ForwardState, Pending, current_state

if TYPE_CHECKING:
    from .acceleration import Acceleration

logger = logging.getLogger("alora_kernels")

# PEFT's layers over a quantised or foreign base: the base's own forward, then the adapter's part.
FOREIGN = (
    "Linear4bit",
    "Linear8bitLt",
    "TorchaoLoraLinear",
    "HqqLoraLinear",
    "GPTQLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "AqlmLoraLinear",
    "IncLoraLinear",
)
# Projections of one input, by their names in the models of transformers.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


def why_not_served(layer: Any) -> str | None:
    """Why this LoRA layer keeps PEFT's forward, or None."""
    kind = type(layer)
    if not isinstance(layer, LoraLayer):
        return "it is not a LoRA layer"
    if kind is not LoraLinear and kind.__name__ not in FOREIGN:
        return f"lora.{kind.__name__} is not a linear layer"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (a dispatch or offload hook)"
    if getattr(layer, "ephemeral_gpu_offload", False):
        return "ephemeral_gpu_offload moves its weights for every call"
    strange = strange_adapters(layer)
    if strange and len(strange) == len(layer.lora_A):
        return "; ".join(f"adapter {name!r}: {reason}" for name, reason in strange.items())
    return None


def strange_adapters(layer: Any) -> dict[str, str]:
    """The adapters of `layer` that keep PEFT's forward, with the reason."""
    reasons = {name: why_not_adapter(layer, name) for name in layer.lora_A}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def why_not_adapter(layer: Any, name: str) -> str | None:
    """Why this adapter of `layer` keeps PEFT's forward, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, ALoraLinearVariant):
        return f"the variant {type(variant).__name__} is not LoRA"
    for part in (layer.lora_A[name], layer.lora_B[name]):
        if not isinstance(part, nn.Linear):
            return f"its weight is held by a {type(part).__name__}"
    drop = layer.lora_dropout[name]
    if not isinstance(drop, nn.Identity | nn.Dropout) or getattr(drop, "p", 0.0) >= 1.0:
        return f"its dropout is {drop}"
    return None


class Group:
    """Layers that read the same x: the first one called computes the outputs of all.

    The outputs wait in the forward's own state, so threads and recomputation do not meet. A group
    whose layers turn out not to share an x is dissolved.
    """

    def __init__(self, members: list[AcceleratedLayer]) -> None:
        self.members = members
        self.enabled = True

    def dissolve(self, why: str) -> None:
        if self.enabled and not torch.compiler.is_compiling():
            logger.info("a group of %d projections is computed one by one: %s", len(self), why)
            self.enabled = False

    def __len__(self) -> int:
        return len(self.members)


class AcceleratedLayer:
    """What the class of a served layer gets; its own attributes begin with `alora_`.

    Copied into a subclass of `alora_kind` (a second base would change the layout of the object, and
    a live layer could not change its class).
    """

    alora_kind: Any  # PEFT's class
    _modules: dict[str, Any]
    _disable_adapters: bool
    _active_adapter: str | list[str]
    merged_adapters: list[str]
    scaling: dict[str, float]

    alora_owner: Acceleration
    alora_group: Group | None
    alora_index: int
    alora_fused: bool  # the class's base may be computed together with the adapter
    alora_ready: dict[str, Ready]  # by adapter: what a call without gradient needs not do again
    alora_strange: dict[str, str]  # adapters that keep PEFT's arithmetic, and why

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return self.alora_kind.forward(self, x, *args, **kwargs)
        state = current_state()
        if state is None:
            state = self.alora_owner.outside(self, x)
        names: Any = state.names
        if names is None:
            names = self._active_adapter
            names = (names,) if isinstance(names, str) else names
        alone = len(names) == 1
        pending = state.pending
        if pending is not None and alone and self.alora_index in pending.outputs:
            waiting = pending.outputs.pop(self.alora_index)
            if not pending.outputs:
                state.pending = None
            if pending.fits(x, names[0]):
                return waiting
            state.pending = None
            pending.group.dissolve("they were given different inputs")
        if alone and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            ready = self.alora_ready.get(names[0])
            if ready is not None:
                quick = self._at_once(x, names[0], state, ready)
                if quick is not None:
                    return quick
        adapters = self._modules["lora_A"]._modules
        if not alone or names[0] not in adapters:
            names = [name for name in names if name in adapters]
        modules = self._modules
        base = modules["base_layer"]
        if not names:
            return base(x)  # type: ignore[misc]
        group = self.alora_group
        if group is not None and group.enabled and alone:
            first = self._first_of_group(x, names[0], state, group)
            if first is not None:
                return first
        y: Tensor | None = None
        options = self.alora_owner.options
        weights = plain_base(self, base) if self.alora_fused else None
        for name in names:
            parts = adapter_parts(self, name, x)
            if parts is None:
                return self._by_peft(x, state, names)
            lora_a, lora_b, lora_bias, dropout_p = parts
            activation = state.activation_for(name, x)
            if y is None and weights is not None:
                if alone and dropout_p == 0.0:
                    self._prepare(name, [self], [Projection(*weights, lora_a, lora_b, lora_bias)])
                y = alora_linear(
                    x,
                    *weights,
                    lora_a,
                    lora_b,
                    activation,
                    self.scaling[name],
                    lora_bias=lora_bias,
                    dropout_p=dropout_p,
                    **options,
                )
                continue
            if y is None:
                y = base(x)  # type: ignore[misc]
            same = y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
            add = alora_add(
                y if same else y.to(x.dtype),
                x,
                lora_a,
                lora_b,
                activation,
                self.scaling[name],
                lora_bias=lora_bias,
                dropout_p=dropout_p,
                **options,
            )
            y = add if same else add.to(y.dtype)
        return y

    def _first_of_group(
        self, x: Tensor, name: str, state: ForwardState, group: Group
    ) -> Tensor | None:
        """Compute all members' outputs and return mine; None when they cannot go together."""
        projections: list[Projection] = []
        members, scalings, probability = [], [], -1.0
        for layer in group.members:
            if layer._disable_adapters or layer.merged_adapters:
                return None
            if state.names is None and layer._active_adapter != self._active_adapter:
                return None
            if name not in layer._modules["lora_A"]._modules:
                continue
            parts = adapter_parts(layer, name, x)
            weights = plain_base(layer, layer._modules["base_layer"])
            if parts is None or weights is None:
                return None
            lora_a, lora_b, lora_bias, dropout_p = parts
            if probability not in (-1.0, dropout_p):
                return None
            probability = dropout_p
            projections.append(Projection(*weights, lora_a, lora_b, lora_bias))
            scalings.append(layer.scaling[name])
            members.append(layer)
        if len(members) < 2:
            return None
        if probability == 0.0:
            self._prepare(name, members, projections)
        outputs = alora_linear_group(
            x,
            [
                (p.weight, p.bias, p.lora_a, p.lora_b, scaling, p.lora_bias)
                for p, scaling in zip(projections, scalings)
            ],
            state.activation_for(name, x),
            dropout_p=probability,
            **self.alora_owner.options,
        )
        return self._hand_out(x, name, state, [m.alora_index for m in members], outputs)

    def _hand_out(
        self,
        x: Tensor,
        name: str,
        state: ForwardState,
        indices: Sequence[int],
        outputs: tuple[Tensor, ...],
    ) -> Tensor:
        """My output; the others wait in the state for their layers."""
        waiting = dict(zip(indices, outputs))
        y = waiting.pop(self.alora_index)
        if waiting:
            assert self.alora_group is not None
            if state.pending is not None:
                state.pending.group.dissolve("not all of them are called")
            state.pending = Pending(self.alora_group, name, x, waiting)
        return y

    def _prepare(
        self, name: str, members: list[AcceleratedLayer], projections: list[Projection]
    ) -> None:
        """Make the next call without gradient a short one."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if not any(p.weight is None or p.weight._is_view() for p in projections):
            # (A transposed weight is a new tensor in every call.)
            self.alora_ready[name] = Ready(name, members, projections, self.alora_owner.options)

    def _at_once(self, x: Tensor, name: str, state: ForwardState, ready: Ready) -> Tensor | None:
        """My output by the short way, or None when something has changed."""
        group = self.alora_group
        if len(ready.indices) > 1 and (group is None or not group.enabled):
            return None
        outputs = ready.run(name, x, state)
        if outputs is None:
            return None
        if len(outputs) == 1:
            return outputs[0]
        return self._hand_out(x, name, state, ready.indices, outputs)

    def _by_peft(self, x: Tensor, state: ForwardState, names: Any) -> Any:
        """PEFT's own arithmetic, for what the op does not take (adapters in a third dtype)."""
        arguments = self.alora_owner.peft_arguments(self, state, tuple(names))
        return self.alora_kind.forward(self, x, **arguments)


class Ready:
    """A layer or group as it was last called without gradient, and whether it still is so.

    What a call would look up in a dozen modules is remembered; the parameters, scalings and
    dropout are compared in every call, hooks by torch's own count of all registrations.
    """

    __slots__ = ("cells", "hooks", "indices", "prepared", "registrations")

    def __init__(
        self, name: str, members: list[Any], projections: list[Projection], options: dict[str, Any]
    ) -> None:
        scalings = [layer.scaling[name] for layer in members]
        self.prepared = Prepared(projections, scalings, options)
        self.indices = tuple([layer.alora_index for layer in members])
        self.registrations = RemovableHandle.next_id
        self.hooks: list[dict[int, Any]] = []
        cells = []
        for layer, p, scaling in zip(members, projections, scalings):
            modules = layer._modules
            adapters, base = modules["lora_A"]._modules, modules["base_layer"]
            a, b = adapters[name], modules["lora_B"]._modules[name]
            drop = modules["lora_dropout"]._modules[name]
            drop = drop if isinstance(drop, nn.Dropout) and drop.p > 0.0 else None
            numbers = (a._parameters, b._parameters, base._parameters)
            self.hooks += [
                d for m in (a, b, base) for d in (m._forward_pre_hooks, m._forward_hooks)
            ]
            cells.append((modules, base, adapters, a, *numbers, drop, layer.scaling, p, scaling))
        self.cells = tuple(cells)

    def run(self, name: str, x: Tensor, state: ForwardState) -> tuple[Tensor, ...] | None:
        """The outputs of all members, or None when one of them has changed."""
        if RemovableHandle.next_id != self.registrations:
            if any(self.hooks):
                return None
            self.registrations = RemovableHandle.next_id  # the new hooks are elsewhere
        for (
            modules,
            base,
            adapters,
            a,
            of_a,
            of_b,
            of_base,
            drop,
            scalings,
            p,
            scaling,
        ) in self.cells:
            weight, bias, lora_a, lora_b, lora_bias = p
            if (
                modules["base_layer"] is not base
                or adapters.get(name) is not a
                or of_a.get("weight") is not lora_a
                or of_b.get("weight") is not lora_b
                or of_b.get("bias") is not lora_bias
                or of_base.get("weight") is not weight
                or of_base.get("bias") is not bias
                or scalings.get(name) != scaling
                or (drop is not None and drop.training)
            ):
                return None
        return self.prepared.run(x, state.activation_for(name, x))


def adapter_parts(
    layer: Any, name: str, x: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, float] | None:
    """lora_a, lora_b, lora_bias and the dropout of this call; None when PEFT must compute it.

    The modules are read, not called: if someone hooked them, PEFT's forward calls them.
    """
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or name in layer.alora_strange:
        return None
    if a._forward_pre_hooks or a._forward_hooks or b._forward_pre_hooks or b._forward_hooks:
        return None
    lora_a = a._parameters.get("weight")
    lora_b = b._parameters.get("weight")
    if lora_a is None or lora_b is None:
        return None
    if (
        lora_a.dtype is not x.dtype
        and lora_a.dtype is not torch.float32
        and not (x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type))
    ) or lora_a.dtype is not lora_b.dtype:
        return None
    drop = modules["lora_dropout"]._modules[name]
    dropout_p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
    return lora_a, lora_b, b._parameters.get("bias"), dropout_p


def plain_base(layer: Any, base: Any) -> tuple[Tensor, Tensor | None] | None:
    """weight `[N, K]` and bias of a base that is a frozen plain linear layer; else None."""
    kind = type(base)
    if kind is nn.Linear:
        weight = base._parameters.get("weight")
    elif kind is Conv1D:
        weight = base._parameters.get("weight")
        weight = None if weight is None else weight.t()
    else:
        return None
    if weight is None or weight.requires_grad or base._forward_pre_hooks or base._forward_hooks:
        return None
    bias = base._parameters.get("bias")
    if (bias is not None and bias.requires_grad) or "forward" in base.__dict__:
        return None
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return None  # quantised or sharded: its own forward knows how to multiply it
    return weight, bias


_classes: dict[type, type] = {}


def accelerated_class(kind: type, methods: type) -> type:
    """A subclass of `kind` under the same name, with the functions of `methods`.

    Code that looks classes up by name (FSDP's wrapping, saved architectures) goes on finding it.
    """
    found = _classes.get(kind)
    if found is None:
        fields = {k: v for k, v in vars(methods).items() if callable(v)}
        fields |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        forward = fields["forward"]  # one function for each kind, for a signature of its own
        forward = types.FunctionType(forward.__code__, forward.__globals__, "forward")
        forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
        fields |= {"forward": forward, "alora_kind": kind}
        found = _classes[kind] = type(kind.__name__, (kind,), fields)
    return found


def is_accelerated(module: Any) -> bool:
    return "alora_kind" in vars(type(module))


def find_groups(model: nn.Module, layers: dict[str, Any]) -> list[Group]:
    """The projections of `layers` (by module name) that read one input, as groups."""
    by_parent: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        parent, _, leaf = path.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = layer
    groups = []
    for children in by_parent.values():
        for names in TOGETHER:
            members = [children[n] for n in names if n in children and children[n].alora_fused]
            widths = {layer.in_features for layer in members}
            if len(members) > 1 and len(widths) == 1:
                groups.append(Group(members))
    return groups
