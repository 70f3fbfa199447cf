"""Measured times of this GPU, which correct the cost model.

`bench/run.py --tune` writes them, and dispatch reads them. One JSON file has the measurements of
several GPUs. The key of each contains the GPU's name and the versions of this package and of torch,
so measurements of another GPU or version are never used.
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

from ..contract import STRATEGIES, Problem
from ..files import cache_folder, write_whole

FORMAT = 1
VARIABLE = "ALORA_TUNING_FILE"


@dataclass(frozen=True)
class Measurement:
    """The time of one strategy of one backend on one layer.

    `seconds` is the measured time, `model_seconds` the cost model's. With `backward`, both are the
    time of forward + backward.
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
        """Measured time / time of the cost model."""
        return self.seconds / self.model_seconds

    def distance(self, problem: Problem) -> float:
        """The distance to `problem`: the number of doublings between their sizes, summed."""
        widths, ranks = problem.out_features, problem.ranks
        pairs = (
            (self.rows, problem.rows),
            (self.active, problem.active),
            (self.in_features * self.out_features, problem.in_features * sum(widths)),
            (self.rank, max(ranks)),
        )
        return sum([abs(math.log2((a + 1) / (b + 1))) for a, b in pairs])


def path() -> Path:
    """The tuning file: `ALORA_TUNING_FILE`, or alora_kernels/tuning.json in the user's cache."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else cache_folder() / "tuning.json"


def key_of(device_name: str) -> str:
    """The key of a GPU's measurements in the file."""
    from .. import __version__

    return f"{device_name} | alora_kernels {__version__} | torch {torch.__version__}"


@functools.cache
def key_here(arch: int) -> str | None:
    """The key of the visible GPU of `arch`; None if there is none, or several different ones."""
    if not torch.cuda.is_available():
        return None
    names = {
        torch.cuda.get_device_name(i)
        for i in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(i) == (arch // 10, arch % 10)
    }
    return key_of(names.pop()) if len(names) == 1 else None


def correction(problem: Problem, backend: str, strategy: str) -> float:
    """The factor that corrects the model's time of `problem`; 1 if nothing was measured.

    It is the ratio measured / model of the nearest measured problem with the same backend,
    strategy, dtype and pass. If this pair of backend and strategy was not measured, it is the
    geometric mean of all measured ratios. So the model still ranks the pair among the others.
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
    """All measurements by key. A file that cannot be parsed is ignored with a warning."""
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
        warnings.simplefilter("ignore")  # a file that cannot be parsed is replaced
        gpus = {**read(file), key: tuple(measurements)}
    content = {
        "format": FORMAT,
        "gpus": {k: [asdict(m) for m in entries] for k, entries in sorted(gpus.items())},
    }
    write_whole(file, json.dumps(content, indent=1).encode())
    read.cache_clear()
