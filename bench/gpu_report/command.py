"""All that one wants to know of a GPU, in twelve minutes; send the folder to whom it helps.

    python bench/run.py --mode gpu-report --out DIR [--minutes 12]
    python bench/run.py --mode gpu-report --out DIR --rehearsal    on a CPU: shows that it runs

Works in a fresh clone, without network. Where the CUDA extension is missing and nvcc is there, it
is built in place for this GPU alone. Every part runs in a process of its own with a time limit: one
that fails, crashes or hangs leaves what it had, and the next goes on. After each part the folder
holds the whole report so far: report.md (one page, verdicts first), report.json, three plots and
log.txt.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alora_kernels.files import write_whole
from bench.common import flags, report
from bench.gpu_report import commands, environment, layers, models, page
from bench.gpu_report.context import Context, LeftOut

FORMAT = 1
LEFT_OUT = 3  # exit status of a part that cannot run here
LEAST = 5.0  # seconds of a part, even where those before it took more than their share
GRACE = 30.0  # seconds beyond its budget before a part is ended: it has to start and to stop
LOG = 40_000  # bytes of each part's output that are kept


class Part(NamedTuple):
    """One part; `share` is its seconds in a report of twelve minutes."""

    name: str
    share: float
    run: Callable[[Context], None]


PARTS = (
    Part("environment", 10, environment.environment),
    Part("build", 90, environment.build),
    Part("ceilings", 15, environment.ceilings),
    Part("self-test", 90, commands.selftest),
    Part("gpu-tests", 120, commands.gpu_tests),
    Part("sanitizers", 75, commands.sanitizers),
    Part("layers Mistral-7B", 95, layers.layers_of("Mistral-7B")),
    Part("layers Llama-3.2-3B", 60, layers.layers_of("Llama-3.2-3B")),
    Part("tuning", 60, layers.tuning),
    Part("training", 45, models.training),
    Part("session", 45, models.session),
    Part("counters", 45, commands.counters),
)
INNER = (Part("main-kernels", 30, commands.main_kernels),)  # run by other parts
BY_NAME = {part.name: part for part in (*PARTS, *INNER)}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = flags.make_parser("gpu-report", __doc__)
    add = p.add_argument
    add("--out", type=Path, required=True, help="a folder for the report; it is made")
    add("--minutes", type=flags.seconds, default=12.0, help="for all parts together")
    add("--only", type=flags.names_of([part.name for part in PARTS]), help="parts, comma-separated")
    add("--rehearsal", action="store_true", help="tiny sizes and a made-up clock, on the CPU")
    add("--device", type=flags.device, help="cuda:N (default: cuda)")
    add("--part", choices=BY_NAME, help=argparse.SUPPRESS)
    add("--seconds", type=flags.seconds, default=60.0, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or one. Returns 0 when the report is written, whatever it says."""
    return flags.run(parser(), arguments, _run)


def _run(o: argparse.Namespace) -> int:
    if o.device is None:
        o.device = torch.device("cpu" if o.rehearsal else "cuda")
    if o.part:
        return run_part(o)
    if o.device.type == "cuda" and not torch.cuda.is_available():
        raise flags.UsageError(
            "gpu-report needs a GPU, and torch sees none here; --rehearsal shows the whole path on "
            "the CPU, with figures that mean nothing"
        )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a process with a GPU: many gigabytes
    o.out.mkdir(parents=True, exist_ok=True)
    wanted = [part for part in PARTS if not o.only or part.name in o.only]
    Report(o.out, wanted, o.minutes * 60, in_process(o), o.rehearsal).run()
    return 0


# ---------------------------------------------------------------------- a part's own process


def run_part(o: argparse.Namespace) -> int:
    """The child: one part, whose results go to the file `--out` as they come."""
    context = Context(o.device, o.seconds, o.out, o.rehearsal)
    try:
        BY_NAME[o.part].run(context)
    except LeftOut as reason:
        context.save(left_out=str(reason))
        return LEFT_OUT
    except Exception:
        traceback.print_exc()
        return 1
    return 0


Ran = tuple[int, str, dict[str, Any]]  # exit status, output, data
Runner = Callable[[Part, float], Ran]


def in_process(o: argparse.Namespace) -> Runner:
    """Runs a part in a process of its own."""

    def run(part: Part, seconds: float) -> Ran:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.json"
            command = [
                sys.executable, str(environment.ROOT / "bench" / "run.py"), "--mode", "gpu-report",
                "--part", part.name, "--out", str(file), "--seconds", f"{seconds:.1f}", "--device",
                str(o.device), *(["--rehearsal"] if o.rehearsal else []),
            ]  # fmt: skip
            said = commands.run(command, seconds + GRACE, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
            data = json.loads(file.read_text()) if file.exists() else {}
        return said.status, said.text, data

    return run


# ---------------------------------------------------------------------- all parts


class Report:
    """Runs the parts in turn and keeps the folder's files up to date."""

    def __init__(
        self, folder: Path, parts: Sequence[Part], seconds: float, run: Runner, rehearsal: bool
    ) -> None:
        self._folder, self._parts, self._seconds, self._run = folder, parts, seconds, run
        self._log: list[str] = []
        self.content: page.Report = {
            "format": FORMAT, "rehearsal": rehearsal, "seconds": 0.0, "parts": {}
        }  # fmt: skip

    def run(self) -> None:
        """All parts. What a part does not use of its budget goes to those after it."""
        console = report.make_console()
        began = time.monotonic()
        for number, part in enumerate(self._parts):
            left = self._seconds - (time.monotonic() - began)
            shares = sum(p.share for p in self._parts[number:])
            budget = max(LEAST, left * part.share / shares)
            report.print_lines(console, f"{part.name}: up to {budget:.0f} s")
            self._take(part, budget)
            self.content["seconds"] = time.monotonic() - began
            self._write(part)
            done = self.content["parts"][part.name]
            report.print_lines(console, f"  {done['status']} {done['detail']}".rstrip())
        for verdict in page.verdicts(self.content):
            report.print_lines(
                console, f"{verdict.mark.strip('*'):<4} {verdict.what}: {verdict.text}"
            )
        report.print_lines(console, f"written: {self._folder}")

    def _take(self, part: Part, budget: float) -> None:
        began = time.monotonic()
        status, text, data = self._run(part, budget)
        kinds = {0: "done", LEFT_OUT: "left out", commands.TIMED_OUT: "timed out"}
        kind = kinds.get(status, "failed")
        last = text.strip().splitlines()[-1:]
        detail = {"done": "", "left out": data.get("left_out", "")}.get(kind, " ".join(last))
        if kind == "timed out":
            detail = f"it was ended {GRACE:.0f} s after its budget; log.txt says where it was"
        if kind == "failed":
            detail = f"exit status {status}: {detail}"
        if kind == "done" and data.get("left"):
            detail = f"{data['left']} cases were left when the time was over"
        self.content["parts"][part.name] = {
            "status": kind, "seconds": time.monotonic() - began, "budget": budget,
            "detail": detail, "data": data,
        }  # fmt: skip
        self._log.append(f"=== {part.name}: {kind}\n{text[-LOG:]}\n")

    def _write(self, part: Part) -> None:
        """The whole report so far; a file is the old one or the new one, never half."""
        files = {
            "report.json": json.dumps(self.content, indent=1),
            "report.md": page.write(self.content),
            "log.txt": "".join(self._log),
        }
        for name, text in files.items():
            write_whole(self._folder / name, text.encode())
        try:
            from bench.gpu_report.plots import draw

            draw(self.content, self._folder, part.name)
        except Exception:  # no matplotlib, or data that nobody foresaw: the figures are kept
            self._log.append(f"=== plots\n{traceback.format_exc()}\n")
