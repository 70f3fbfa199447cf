"""Opt-in tuning: ALORA_TRITON_AUTOTUNE=1 times the candidates of a launch once and remembers.

Results go to a json file, `ALORA_TRITON_CACHE` or ~/.cache/alora_kernels/triton.json, written to a
temporary file and renamed, so that readers never see half of it. Nothing is timed while a CUDA
graph is captured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...files import write_whole
from .configs import Config

logger = logging.getLogger("alora_kernels")


@functools.cache
def enabled() -> bool:
    return os.environ.get("ALORA_TRITON_AUTOTUNE", "0").lower() in ("1", "true", "yes", "on")


def bucket(rows: int) -> int:
    """M rounded up to a power of two: lengths in between share a result."""
    return 1 << (rows - 1).bit_length()


def capturing() -> bool:
    """Whether a CUDA graph is being captured, so that nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def cache_path() -> Path:
    given = os.environ.get("ALORA_TRITON_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "alora_kernels" / "triton.json"


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20))


@functools.cache
def _host_key(device: int) -> tuple[str, ...]:
    import triton

    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return (name, triton.__version__)


@functools.cache
def _remembered(path: Path) -> dict[str, Config]:
    try:
        raw = json.loads(path.read_text())
        return {k: Config(**v) for k, v in raw.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): tuning starts anew", path, error)
        return {}


def _write(path: Path, entries: dict[str, Config]) -> None:
    text = json.dumps({k: dataclasses.asdict(c) for k, c in sorted(entries.items())}, indent=1)
    write_whole(path, text.encode())


def best(
    problem: tuple[Any, ...], candidates: Sequence[Config], default: Config,
    run: Callable[[Config], None], measure: Callable[[Callable[[], None]], float] = _milliseconds,
) -> Config:  # fmt: skip
    """The remembered or newly found fastest of `candidates`; `default` during graph capture.

    A candidate that does not compile or fit is passed over.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    key = "|".join(map(str, (*_host_key(device), *problem)))
    path = cache_path()
    known = _remembered(path)
    if key in known:
        return known[key]
    if capturing():
        return default
    times: dict[Config, float] = {}
    for config in candidates:
        try:
            times[config] = measure(functools.partial(run, config))
        except Exception as error:  # out of resources, or what the compiler happens to raise
            logger.info("tuning %s: %s cannot run: %s", problem[0], config, error)
    winner = min(times, key=times.__getitem__) if times else default
    known[key] = winner
    # Another process may have written since: keep what it found.
    _remembered.cache_clear()
    merged = {**_remembered(path), **known}
    _write(path, merged)
    _remembered.cache_clear()
    return winner
