"""Measured times of this GPU, which correct the cost model where they exist.

`bench/run.py --tune` writes them; dispatch reads them. One json file holds the measurements of
several GPUs, each under its name with the versions of this package and of torch, so that figures of
another GPU or another version are never used.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .contract import STRATEGIES, Problem
from .files import cache_folder, write_whole

FORMAT = 1
VARIABLE = "ALORA_TUNING_FILE"


@dataclass(frozen=True)
class Measurement:
    """One strategy of one backend on one layer; `seconds` was measured, `model_seconds` expected.

    With `backward` both are of forward + backward.
    """

    backend: str
    strategy: str
    rows: int
    in_features: int
    out_features: int
    rank: int
    active: int
    dtype: str
    backward: bool
    seconds: float
    model_seconds: float

    def __post_init__(self) -> None:
        sizes = (self.rows, self.in_features, self.out_features, self.rank, self.active)
        times = (self.seconds, self.model_seconds)
        if (
            not all(type(s) is int and s >= 0 for s in sizes)
            or not all(type(t) is float and math.isfinite(t) and t > 0 for t in times)
            or self.strategy not in STRATEGIES
            or type(self.backend) is not str
            or type(self.dtype) is not str
            or type(self.backward) is not bool
        ):
            raise ValueError(f"no measurement: {self}")

    @property
    def ratio(self) -> float:
        """Measured over expected."""
        return self.seconds / self.model_seconds

    def distance(self, problem: Problem) -> float:
        """How far `problem` is away, in doublings of its sizes."""
        widths, ranks = problem.out_features, problem.ranks
        pairs = (
            (self.rows, problem.rows),
            (self.active, problem.active),
            (self.in_features * self.out_features, problem.in_features * sum(widths)),
            (self.rank, max(ranks)),
        )
        return sum([abs(math.log2((a + 1) / (b + 1))) for a, b in pairs])


def path() -> Path:
    """`ALORA_TUNING_FILE`, or alora_kernels/tuning.json in the user's cache folder."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else cache_folder() / "tuning.json"


def key_of(device_name: str) -> str:
    """Under what the measurements of a GPU stand."""
    from . import __version__

    return f"{device_name} | alora_kernels {__version__} | torch {torch.__version__}"


@functools.cache
def key_here(arch: int) -> str | None:
    """The key of the visible GPU of `arch`; None without one, or with several kinds."""
    if not torch.cuda.is_available():
        return None
    names = {
        torch.cuda.get_device_name(i)
        for i in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(i) == (arch // 10, arch % 10)
    }
    return key_of(names.pop()) if len(names) == 1 else None


def correction(problem: Problem, backend: str, strategy: str) -> float:
    """By what the model's time of `problem` is to be multiplied; 1 where nothing was measured.

    It is the ratio measured / expected of the nearest measured problem of the same backend,
    strategy, dtype and pass. A pair that was not measured gets the mean ratio of those that were,
    so that it is ranked by the model among them.
    """
    key = key_here(problem.arch)
    if key is None:
        return 1.0
    dtype = str(problem.dtype).removeprefix("torch.")
    alike = [
        m for m in read(path()).get(key, ()) if m.backward == problem.backward and m.dtype == dtype
    ]
    own = [m for m in alike if (m.backend, m.strategy) == (backend, strategy)]
    if own:
        return min(own, key=lambda m: m.distance(problem)).ratio
    if not alike:
        return 1.0
    return math.exp(sum([math.log(m.ratio) for m in alike]) / len(alike))


@functools.cache
def read(file: Path) -> dict[str, tuple[Measurement, ...]]:
    """All measurements by key; a file that cannot be understood is ignored with a warning."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
        return {
            str(key): tuple([Measurement(**m) for m in entries])
            for key, entries in content["gpus"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"alora_kernels: {file} is ignored, it holds no tuning of this package "
            f"({type(error).__name__}: {error}); python bench/run.py --tune writes it anew",
            stacklevel=2,
        )
        return {}


def write(file: Path, key: str, measurements: Sequence[Measurement]) -> None:
    """Replace the measurements of `key`; readers never see half a file."""
    read.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be understood is replaced
        gpus = {**read(file), key: tuple(measurements)}
    content = {
        "format": FORMAT,
        "gpus": {k: [asdict(m) for m in entries] for k, entries in sorted(gpus.items())},
    }
    write_whole(file, json.dumps(content, indent=1).encode())
    read.cache_clear()
