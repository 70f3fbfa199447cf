"""Which backend and which strategy run a problem; every refusal has a reason.

The choice is a pure function of the problem, made once per problem and logged.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .backends.cpu import CpuBackend
from .backends.cuda import CudaBackend
from .backends.reference import ReferenceBackend
from .backends.triton import TritonBackend
from .contract import STRATEGIES, Backend, Call, Problem, Projection
from .cost import seconds
from .once import warn_once

logger = logging.getLogger("alora_kernels")

# os.environ raises and catches two errors for a name that is not set, in every call: 2 µs.
BACKEND_VARIABLE, STRATEGY_VARIABLE = "ALORA_BACKEND", "ALORA_STRATEGY"
_environ: Any = getattr(os.environ, "_data", None)
_encode: Any = getattr(os.environ, "encodekey", str)
_KEYS = {name: _encode(name) for name in (BACKEND_VARIABLE, STRATEGY_VARIABLE)}

# In the order of preference where the cost model sees no difference.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}


def problem_of(
    call: Call,
    x: Tensor,  # [M, K]
    projections: Sequence[Projection],
    base_given: bool,
    backward: bool,
) -> Problem:
    """What the choice depends on."""
    (rows, depth), device = x.shape, x.device
    kind = device.type
    return Problem(
        rows,
        depth,
        tuple([p.lora_b.shape[0] for p in projections]),
        tuple([p.lora_a.shape[0] for p in projections]),
        call.activation.planned_active,
        x.dtype,
        projections[0].lora_a.dtype,
        kind,
        _arch(device) if kind == "cuda" else 0,
        backward,
        base_given,
        call.options.dropout_p > 0.0,
        call.options.adapter_precision,
        call.options.strict_inactive,
    )


@functools.cache
def _arch(device: torch.device) -> int:
    if torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(problem: Problem, backend: str, strategy: str) -> tuple[Backend, str]:
    """The backend and strategy for `problem`.

    "auto" picks the pair with the least expected time among those that have no reason to refuse:
    the cost model's estimate, corrected by measurements where this GPU was tuned.
    `ALORA_BACKEND` and `ALORA_STRATEGY` stand in for an "auto". A backend that is asked for by name
    never falls back.

    Raises:
        ValueError: an unknown name.
        RuntimeError: nothing that was asked for can run; lists every reason.
    """
    return _choose(problem, *asked_for(backend, strategy))


def asked_for(backend: str, strategy: str) -> tuple[str, str]:
    """What the user asks for: the environment stands in for an "auto"."""
    if backend == "auto":
        backend = _variable(BACKEND_VARIABLE)
    if strategy == "auto":
        strategy = _variable(STRATEGY_VARIABLE)
    return backend, strategy


def _variable(name: str) -> str:
    """What the environment says in place of "auto"."""
    if _environ is not None and _KEYS[name] not in _environ:
        return "auto"
    return os.environ.get(name, "auto")


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, backend: str, strategy: str) -> tuple[Backend, str]:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}; the backends are auto, {', '.join(BACKENDS)}"
        )
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ValueError(
            f"unknown strategy {strategy!r}; the strategies are auto, {', '.join(STRATEGIES)}"
        )
    names = list(BACKENDS) if backend == "auto" else [backend]
    strategies = STRATEGIES if strategy == "auto" else (strategy,)
    able: list[tuple[float, str, str]] = []
    reasons: list[str] = []
    for name in names:
        for wanted in strategies:
            # The problem first: a CPU tensor need not wake a GPU's driver.
            reason = BACKENDS[name].why_not(problem, wanted) or BACKENDS[name].why_not_here()
            if reason is None:
                able.append((expected_seconds(name, problem, wanted), name, wanted))
            else:
                reasons.append(f"{name}/{wanted}: {reason}")
    # The reference is the definition, not a contender: it serves what nothing else can.
    contenders = [a for a in able if a[1] != "reference"] or able
    if not contenders:
        raise RuntimeError(
            f"no backend can run this call (backend={backend!r}, strategy={strategy!r}):\n  "
            + "\n  ".join(reasons)
        )
    if problem.device == "cpu" and backend == "auto":
        contenders = [a for a in contenders if a[1] == "cpu"] or contenders
    _, name, picked = min(contenders, key=lambda a: a[0])
    if name == "reference" and backend == "auto" and problem.device not in ("cpu", "meta"):
        text = "tensors run the plain PyTorch reference, because\n  " + "\n  ".join(reasons)
        warn_once(f"alora_kernels: {problem.device} {text}")
    logger.info("%s: %s/%s", problem, name, picked)
    return BACKENDS[name], picked


def expected_seconds(backend: str, problem: Problem, strategy: str) -> float:
    """The cost model's time with the backend's own tiles, corrected by what was measured here.

    Lengths that are near each other share a result: batches of text are all of different lengths.
    """
    if problem.device != "cuda":
        return seconds(problem, strategy)
    rows = _bucket(problem.rows)
    return _expected_seconds(
        backend, problem._replace(rows=rows, active=min(rows, _bucket(problem.active))), strategy
    )


@functools.lru_cache(maxsize=4096)
def _expected_seconds(backend: str, problem: Problem, strategy: str) -> float:
    own = model_seconds(BACKENDS[backend], problem, strategy)
    return own * tuning.correction(problem, backend, strategy)


def _bucket(count: int) -> int:
    """`count` rounded up to one of eight steps between two powers of two."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def model_seconds(backend: Backend, problem: Problem, strategy: str) -> float:
    """The cost model's time with the backend's own tiles."""
    schedules = getattr(backend, "schedules", None)
    known = () if schedules is None else schedules(problem, strategy)
    return seconds(problem, strategy, known or None)


def forget_choices() -> None:
    """Choose anew: what the choice depends on besides the problem has changed."""
    _choose.cache_clear()
    _expected_seconds.cache_clear()
    tuning.read.cache_clear()
    tuning.key_here.cache_clear()
