"""Which CUDA kernels the cases launch on a GPU that is not here: plans are pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..backends.cuda import CudaBackend
from ..backends.cuda.steps import Launch
from ..backends.programs import Make, Program, Run, Tensors
from .cases import Case
from .check import make_inputs, run


class Machine(NamedTuple):
    """What plans ask of a GPU."""

    multiprocessors: int
    arch: int  # 80, 90, ...


H100 = Machine(132, 90)


def kernels_of(cases: Sequence[Case], machine: Machine = H100) -> list[set[str]]:
    """The kernels of each case."""
    seen: set[str] = set()

    def planned_only(program: Program) -> Run:
        """Results without values; the launches are written down."""

        def results(tensors: Tensors) -> Tensors:
            made = dict(zip(program.inputs, tensors))
            for step in program.steps:
                if isinstance(step, Launch):
                    seen.add(step.plan.kernel)
                    continue
                view = step.view if isinstance(step, Make) else step.result
                if view is not None:
                    made[view.tensor] = torch.empty(view.shape, dtype=view.dtype, device="meta")
            return [None if name is None else made[name] for name in program.results]

        return results

    backend = CudaBackend(planned_only, machine)
    found = []
    for case in cases:
        seen.clear()
        run(backend, case, make_inputs(case, "meta"))
        found.append(set(seen))
    return found
