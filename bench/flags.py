"""What the values of the benchmark's flags may be."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
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
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected KxN[,KxN...] such as 2048x2048, got {text!r}")
    return [(int(k), int(n)) for k, n in (shape.split("x") for shape in text.split(","))]


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
