"""Progress during training, and a plot of the losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import TrainerCallback


class Display:
    """One bar for each phase, with the losses beside it."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<18}"),  # the whole line fits into 80 columns
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self.progress.add_task(name, total=total, note="")
        yield lambda count: self.progress.advance(task, count)

    def callback(self, name: str) -> TrainerCallback:
        return _Bar(self.progress, f"training, {name}")


class _Bar(TrainerCallback):
    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name
        self.task: Any = None
        self.notes: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.name, total=state.max_steps, note="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        names = {"loss": "loss", "eval_loss": "val"}
        self.notes.update({names[k]: v for k, v in logs.items() if k in names})
        note = "  ".join(f"{k} {float(v):.3f}" for k, v in self.notes.items())
        self.progress.update(self.task, note=note)


def plot_losses(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Training and validation loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for i, (name, log) in enumerate(curves.items()):
        for key, style, label in (("loss", "-", "training"), ("eval_loss", "o--", "validation")):
            points = [(entry["step"], float(entry[key])) for entry in log if key in entry]
            if points:
                axis.plot(*zip(*points), style, color=f"C{i}", ms=3, label=f"{name}, {label}")
    axis.set(xlabel="step", ylabel="loss after the invocation", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.text(0.5, 0.01, _machine(), fontsize=6, ha="center", color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _machine() -> str:
    """Machine, versions and commit, as in the plots of bench/. Empty if bench/ is not there."""
    file = Path(__file__).parents[1] / "bench" / "common" / "machine.py"
    if not file.is_file():
        return ""
    spec = importlib.util.spec_from_file_location("bench_machine", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.describe_machine(torch.device("cpu"))
