"""The flags of the benchmarks: they have one style, and their values are checked here."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from bench.common.clocks import READERS


class UsageError(Exception):
    """The flags ask for something that is not possible here."""


class _Help(argparse.RawTextHelpFormatter):
    """Shows help texts with their own line breaks, each with its flag's default at the end."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def make_parser(mode: str, about: str | None) -> argparse.ArgumentParser:
    """A parser without flags; `about` is the mode's module docstring."""
    prog = f"bench/run.py --mode {mode}"
    return argparse.ArgumentParser(prog=prog, description=about, formatter_class=_Help)


def add_files(p: argparse.ArgumentParser, plot: str) -> None:
    """--csv and --plot; `plot` says what is drawn."""
    p.add_argument("--csv", type=output_file, help="write all figures to this file")
    p.add_argument("--plot", type=output_file, help=f"draw {plot} into this file (png, svg, pdf)")


def add_clock(p: argparse.ArgumentParser, condition: str) -> None:
    """--clock; `condition` is what a measurement of processor time requires."""
    about = f"cpu: processor time, for a machine that others use too; needs {condition}"
    p.add_argument("--clock", choices=READERS, default="wall", help=about)


def add_device(p: argparse.ArgumentParser) -> None:
    """--device: by default a GPU if there is one."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=device, default=here, help="cpu, cuda or cuda:N")


def add_threads(p: argparse.ArgumentParser, count: int | None = None) -> None:
    """--threads: by default `count`, or all cores."""
    count = count or os.cpu_count() or 1
    p.add_argument("--threads", type=positive, default=count, help="of torch on the CPU")


def add_timing(p: argparse.ArgumentParser, seconds_together: float) -> None:
    """--seconds and --seed; `run` draws a seed if the user gives none."""
    about = "for timing, all cases together"
    p.add_argument("--seconds", type=seconds, default=seconds_together, help=about)
    p.add_argument("--seed", type=int, help="of the operands (default: a fresh one, printed)")


def run(
    p: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], int],
) -> int:
    """Parse the flags and measure. A UsageError is reported in the parser's own way."""
    options = p.parse_args(arguments)
    if getattr(options, "seed", 0) is None:
        options.seed = int.from_bytes(os.urandom(3), "little")
    try:
        return measure(options)
    except UsageError as error:
        p.error(str(error))


# ---------------------------------------------------------------------- values


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Comma-separated names among `known`, or all of them."""

    def parse(text: str) -> list[str]:
        names = list(known) if text == "all" else text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown name {name!r}; the names are {', '.join(known)}"
                )
        return names

    return parse


def active_fractions(text: str) -> list[str | float]:
    """'text', or comma-separated fractions between 0 and 1."""
    values: list[str | float] = []
    for part in text.split(","):
        if part == "text":
            values.append(part)
            continue
        try:
            fraction = float(part)
        except ValueError:
            fraction = -1.0
        if not 0.0 <= fraction <= 1.0:
            raise argparse.ArgumentTypeError(
                f"expected 'text' or a fraction between 0 and 1, got {part!r}"
            )
        values.append(fraction)
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    """KxN[,KxN...]."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected KxN[,KxN...] such as 2048x2048, got {text!r}")
    return [(int(k), int(n)) for k, n in (shape.split("x") for shape in text.split(","))]


def above(least: int) -> Callable[[str], int]:
    """A whole number above `least`."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) <= least:
            raise argparse.ArgumentTypeError(f"expected a whole number above {least}, got {text!r}")
        return int(text)

    return parse


positive = above(0)


def numbers_above(least: int) -> Callable[[str], list[int]]:
    """Whole numbers above `least`, comma-separated."""
    return lambda text: [above(least)(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def device(text: str) -> torch.device:
    """The CPU, or a GPU that exists."""
    kind = text.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: this machine has no CUDA GPU that torch sees")
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def output_file(text: str) -> Path:
    """A file in a folder that exists: this is checked before an hour of measuring, not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the folder {path.parent} does not exist")
    return path
