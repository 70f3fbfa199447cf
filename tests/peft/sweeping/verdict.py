"""How an answer compares with the definition."""

from __future__ import annotations

import dataclasses
import linecache
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alora_kernels

from .definition import RowsUnknown
from .subject import Subject

PACKAGE = str(Path(alora_kernels.__file__).parent)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one check ended, and what was seen.

    equal         as the definition
    refused       an error of this package that names the reason
    as base       transformers itself differs from a forward from scratch here, and the accelerated
                  model does what the base model does, adapter added
    base differs  it differs, and there is nothing to compare with
    base fails    the base model alone fails too
    base          layers outside of the tokens run the base model
    none          there is nothing to check
    WRONG         silently something else
    error         a failure that names no reason
    """

    kind: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.kind in ("WRONG", "error")


def judge(
    way: Callable[[Any], Tensor],
    subject: Subject,
    wanted: Tensor,
    base_wanted: Tensor,
    hooked: Callable[[], Any] | None = None,
) -> Verdict:
    """Run `way` on the accelerated model and say how it compares.

    Args:
        way: gets a model, returns logits.
        wanted: those of the definition, from scratch.
        base_wanted: those of the base model alone, from scratch.
        hooked: a context of the base model with the adapters, to run `way` itself on.
    """
    if (wanted - base_wanted).abs().max() < 0.05:
        return Verdict("error", "the adapters change nothing here, so nothing is tested")
    try:
        with torch.no_grad():
            gap = distance(way(subject.base), base_wanted)
            if gap == float("inf"):
                raise ArithmeticError("it answers with NaN")
            stock = "" if gap <= subject.near else f"the base model alone differs by {gap:.1e}"
    except Exception as error:
        stock = f"the base model alone fails: {describe(error)}"
    try:
        model = subject.accelerated()
        with torch.no_grad():
            got = way(model)
    except Exception as error:
        failed = failure(error)
        if failed.kind == "error" and "fails" in stock:
            return Verdict("base fails", stock)
        return failed
    gap = distance(got, wanted)
    if gap <= subject.near:
        return Verdict("equal", stock)
    if gap == float("inf") and "NaN" in stock:
        return Verdict("base fails", stock)
    if stock and hooked is not None and "fails" not in stock:
        try:
            with torch.no_grad(), hooked() as base:
                same = distance(got, way(base))
        except RowsUnknown as error:
            return Verdict("base differs", f"{stock}; {error}")
        if same <= subject.near:
            return Verdict("as base", stock)
        return Verdict("WRONG", f"by {gap:.1e}; by {same:.1e} from the base's own way ({stock})")
    return Verdict("WRONG", f"by {gap:.1e}" + (f" ({stock})" if stock else ""))


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest value wanted."""
    if got.shape != wanted.shape:
        return float("inf")
    gap = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-3)
    return float(gap) if gap == gap else float("inf")


def failure(error: Exception) -> Verdict:
    """`refused` for an error that this package raises by name, else `error`."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in chain[::-1]:
        last = traceback.extract_tb(one.__traceback__)[-1]
        raised = "raise" in linecache.getline(last.filename, last.lineno or 0)
        named = isinstance(one, ValueError | TypeError | RuntimeError | NotImplementedError)
        if last.filename.startswith(PACKAGE) and raised and named and len(str(one)) > 20:
            return Verdict("refused", describe(one))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(PACKAGE)]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in (*ours[-1:], frames[-1])]
    return Verdict("error", f"{describe(error)} [{' > '.join(dict.fromkeys(places))}]")


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
