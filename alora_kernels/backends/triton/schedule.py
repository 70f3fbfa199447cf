"""What the backend would launch for a problem, by its table of configs."""

from __future__ import annotations

from ...contract import Problem, Schedule
from ...hardware import rates_of
from . import configs, target


def schedules(
    problem: Problem, strategy: str, processors: int | None = None
) -> tuple[Schedule, ...]:
    """The GEMM of each projection; empty where the vendor's serves (`delta`, a given base)."""
    if strategy == "delta" or problem.base_given:
        return ()
    processors = processors or rates_of(problem.arch).sms
    found = []
    for width, rank in zip(problem.out_features, problem.ranks):
        depth = problem.in_features
        if problem.backward:
            width, depth = depth, width
        config = configs.gemm_config(
            problem.arch, problem.rows, problem.dtype, target.float32_precision(), lora=strategy,
            rank=rank, dropout=problem.dropout,
        )  # fmt: skip
        splits = configs.gemm_splits(problem.rows, width, depth, config, processors)
        found.append(Schedule("gemm", config.block_m, config.block_n, splits=splits))
    return tuple(found)
