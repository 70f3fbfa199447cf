"""warmup: compile a model's Triton kernels before its first step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activation import Activation
from .contract import DEFAULTS, Call, Needs, Options, Projection
from .dispatch import BACKENDS, choose, problem_of
from .nn import AloraLinear

logger = logging.getLogger("alora_kernels")


class Part(NamedTuple):
    """Layers that are computed in one call."""

    projections: list[Projection]
    scalings: list[float]
    options: Options
    training: bool


def warmup(
    model: nn.Module,
    lengths: Iterable[int],
    *,
    active_fractions: Sequence[float] = (0.1, 1.0),
    progress: bool = True,
) -> int:
    """Compile the Triton kernels that a model will need; nothing is launched, no tensor is changed.

    A kernel takes half a second to compile, a first step ten to fifteen of them for each class of
    layers. Triton keeps them on disk, so the next process finds them compiled.

    Args:
        model: an `AloraLinear`, a model with some, or a PEFT model after `accelerate`. Gradients
            are prepared for layers in training mode.
        lengths: tokens of a call (batch × sequence), as many as differ: lengths of 1 to 16, of 17
            to 256, and longer ones have kernels of their own. Those of decoding are 1 (or the
            batch).
        active_fractions: parts of the rows that are active; the strategy depends on them.
        progress: show a bar where `rich` is installed.

    Returns:
        How many kernels these calls consist of. 0 where Triton is not what runs them; the log then
        says what is.

    Raises:
        ValueError: the model has no such layer, or `lengths` is empty or not positive.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 1:
        raise ValueError(f"warmup: lengths must be positive numbers of tokens, got {wanted}")
    parts = list(_parts(model))
    if not parts:
        raise ValueError(
            f"warmup: {type(model).__name__} has no AloraLinear and no accelerated PEFT layer; "
            "call alora_kernels.accelerate(model) first"
        )
    jobs, others = [], set()
    for part in parts:
        for rows in wanted:
            for fraction in active_fractions:
                for job in _jobs(part, rows, fraction):
                    if isinstance(job, str):
                        others.add(job)
                    else:
                        jobs.append(job)
    if not jobs:
        logger.warning("warmup: Triton runs none of these calls: %s", "; ".join(sorted(others)))
        return 0
    kernels: set[Any] = set()
    with torch.no_grad(), _bar(len(jobs), progress) as advance:
        for job in jobs:
            kernels |= job()
            advance()
    return len(kernels)


def _parts(model: nn.Module) -> Iterator[Part]:
    """One part for each class of layers: what differs in no layout is compiled once."""
    seen = set()
    for part in _all_parts(model):
        layouts = [
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
            for p in part.projections
            for t in p
        ]
        key = (part.options, part.training, len(part.projections), *layouts)
        if key not in seen:
            seen.add(key)
            yield part


def _all_parts(model: nn.Module) -> Iterator[Part]:
    for module in model.modules():
        if isinstance(module, AloraLinear):
            options = DEFAULTS._replace(
                dropout_p=module.lora_dropout if module.training else 0.0,
                prefix_grad=module.prefix_grad,
                adapter_precision=module.adapter_precision,
                backend=module.backend,
                strategy=module.strategy,
            )
            tensors = (
                module.weight, module.bias, module.lora_A, module.lora_B, module.lora_bias
            )  # fmt: skip
            yield Part([Projection(*tensors)], [module.scaling], options, module.training)
        elif hasattr(module, "alora_owner"):
            yield from _peft_parts(module)


def _peft_parts(layer: Any) -> Iterator[Part]:
    """The calls of an accelerated PEFT layer: alone, and with those that share its x."""
    from .peft.parts import steps_of

    active = layer._active_adapter
    asked = (active,) if isinstance(active, str) else tuple(active)
    names = [name for name in asked if name in layer.lora_A]
    if not names:
        return
    x = layer.lora_A[names[0]].weight.new_empty(0, layer.in_features)
    base = layer.get_base_layer().weight
    if base.is_floating_point():
        x = x.to(base.dtype)
    group = layer.alora_group
    sets = [[layer]]
    if group is not None and group.enabled and group.members[0] is layer:
        sets.append(list(group.members))
    for layers in sets:
        steps = None
        for fused in (True, False) if layer.alora_fused else (False,):
            steps = steps_of(layers, names, x, fused)
            if steps is not None:
                break
        for step in steps or []:
            options = layer.alora_owner.options._replace(dropout_p=step.dropout_p)
            scalings = [float(s) for s in step.scalings]
            yield Part(step.projections, scalings, options, layer.training)


def _jobs(part: Part, rows: int, fraction: float) -> Iterator[str | Callable[[], set[Any]]]:
    """What compiles forward and, in training, backward; or what runs them instead."""
    weight = part.projections[0].weight
    like = part.projections[0].lora_a if weight is None else weight
    depth, device = part.projections[0].lora_a.shape[1], like.device
    x = like.new_empty(1).expand(rows, depth)  # its shape, without the memory
    count = min(rows, max(1, round(rows * fraction)))
    activation = Activation.from_starts([rows - count], rows, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if part.options.dropout_p else None
    call = Call(activation, tuple(part.scalings), part.options, seed)
    needs: list[Needs | None] = [None]
    trains = any(p.lora_a.requires_grad or p.lora_b.requires_grad for p in part.projections)
    if part.training and trains:
        needs += [_needs(part.projections, dx) for dx in (True, False)]
    for need in needs:
        backward = need is not None
        problem = problem_of(call, x, part.projections, weight is None, backward)
        backend, strategy = choose(problem, part.options.backend, part.options.strategy)
        if backend.name != "triton":
            why = BACKENDS["triton"].why_not(problem, strategy) or "it is expected to be quicker"
            yield f"{backend.name} runs them on {device} ({why})"
            continue
        yield _job(call, strategy, x, part.projections, save=len(needs) > 1, needs=need)


def _job(
    call: Call, strategy: str, x: Tensor, projections: list[Projection], *, save: bool,
    needs: Needs | None,
) -> Callable[[], set[Any]]:  # fmt: skip
    backend: Any = BACKENDS["triton"]
    return lambda: backend.compile(call, strategy, x, projections, save=save, needs=needs)


def _needs(projections: Sequence[Projection], dx: bool) -> Needs:
    """The gradients that a layer's own parameters ask for, and dx unless it is the first layer."""
    return Needs(
        dx,
        tuple([p.lora_a.requires_grad for p in projections]),
        tuple([p.lora_b.requires_grad for p in projections]),
        tuple([p.lora_bias is not None and p.lora_bias.requires_grad for p in projections]),
    )


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], Any]]:
    """A progress bar; what moves it on by one."""
    try:
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda: None
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("compiling Triton kernels", total=total)
        yield lambda: progress.advance(task)
