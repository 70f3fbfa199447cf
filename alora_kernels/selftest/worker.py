"""The process that runs cases. It may crash or hang: whoever started it knows where it was.

It reads one line of json on standard input (`Order`), and writes a line for every step: that it is
ready, that a case begins, what became of it. Standard output is kept for those lines alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, NamedTuple

CANNOT_GO_ON = 77  # exit status: the device refuses everything since the last case


class Order(NamedTuple):
    """What a worker is to do."""

    implementation: str  # "module:Class" of the backend
    device: str
    cases: list[dict[str, Any]]
    numbers: list[int]  # by which to speak of the cases


def main() -> int:
    """Run the cases of the order, in order."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print goes to standard error

    def tell(**message: Any) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    order = Order(**json.loads(sys.stdin.readline()))

    import torch

    from .cases import received
    from .check import WrongResult, check, made

    backend, launched = made(order.implementation)
    torch.zeros(1, device=order.device)  # a context, or the reason why there is none
    tell(ready=True)
    for number, case in zip(order.numbers, received(order.cases)):
        tell(begin=number)
        launched.clear()
        began = time.perf_counter()
        result, detail = "passed", ""
        try:
            check(backend, case, order.device)
        except WrongResult as error:
            result, detail = "wrong", str(error)
        except torch.OutOfMemoryError as error:
            result, detail = "no memory", str(error)
        except Exception as error:
            result, detail = "raised", f"{type(error).__name__}: {error}"
        well = _answers(order.device)
        if not well:
            result, detail = "crashed", detail or "the device refuses every call since"
        tell(
            end=number, result=result, detail=detail, seconds=time.perf_counter() - began,
            kernels=sorted(launched),
        )  # fmt: skip
        if not well:
            return CANNOT_GO_ON
    return 0


def _answers(device: str) -> bool:
    """Whether the device still works: an illegal access makes every later call fail."""
    import torch

    try:
        return bool(torch.ones(1, device=device).item() == 1.0)
    except RuntimeError:
        return False
