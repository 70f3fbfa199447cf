"""What other programs tell: the self-test, the tests for a GPU, compute-sanitizer, ncu.

Each runs in a process group of its own, is ended with all its children when its time is over, and
what it had written by then counts.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from alora_kernels import Activation, alora_linear
from alora_kernels.dispatch import BACKENDS
from bench.gpu_report.context import Context, LeftOut
from bench.gpu_report.environment import ROOT

KEPT = 60  # lines of what a program wrote
TIMED_OUT = -1  # in place of an exit status


class Said(NamedTuple):
    """What a program wrote, and how it ended."""

    status: int
    text: str

    @property
    def tail(self) -> list[str]:
        return self.text.splitlines()[-KEPT:]


def run(command: Sequence[str], seconds: float, **environment: str) -> Said:
    """Run a command for some seconds at most; its output goes through a file, so none is lost."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **environment},
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
            tell_where(process)
        finally:
            end(process)
        file.seek(0)
        return Said(status, file.read().decode(errors="replace"))


def tell_where(process: subprocess.Popen[Any]) -> None:
    """Let a Python process that hangs write where it is: its fault handler hears an abort."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
        process.wait(10)


# ---------------------------------------------------------------------- the self-test


def selftest(context: Context) -> None:
    """Every kernel once. The verdict is kept as the command keeps it: dispatch heeds it."""
    context.save(backends={})
    for name, share in (("cuda", 0.4), ("triton", 1.0)):  # Triton has yet to compile its kernels
        seconds = context.left * share
        command = [sys.executable, "-m", "alora_kernels", "selftest", "--backend", name]
        said = run([*command, "--seconds", f"{max(1.0, seconds - 10):.0f}"], seconds)
        counts = re.search(r"(\d+) of (\d+) cases passed(?:, (\d+) kernels launched)?", said.text)
        found = {
            "status": said.status,
            "passed": int(counts[1]) if counts else 0,
            "cases": int(counts[2]) if counts else 0,
            "kernels": int(counts[3] or 0) if counts else 0,
            "not_tested": "".join(re.findall(rf"^{name}: not tested here: (.*)", said.text, re.M)),
            "said": said.tail,
        }
        context.save(backends={**context.data["backends"], name: found})


# ---------------------------------------------------------------------- tests

# The riskiest first: graphs, streams, flags and threads, then B operands with N inside.
GROUPS = {
    "graphs, streams, threads": ["-m", "gpu", "tests/cuda/test_device.py"],
    "onepass of Hopper": ["-m", "gpu", "tests/cuda/test_gpu.py", "-k", "onepass"],
    "all pairs of factors": ["-m", "gpu", "tests/cuda/test_gpu.py", "-k", "not onepass"],
    "Triton": ["tests/triton/test_linear.py", "tests/triton/test_numerics.py"],
}
REHEARSED = {"files": ["-m", "", "tests/core/test_files.py"]}
RESULT = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.M)


def gpu_tests(context: Context) -> None:
    """pytest, group by group; a group has half of the time that is left."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    groups = REHEARSED if context.rehearsal else GROUPS
    context.save(groups={})
    for number, (name, arguments) in enumerate(groups.items()):
        seconds = context.left / (1 if number == len(groups) - 1 else 2)
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
        said = run([*command, *arguments], seconds, ALORA_SELFTEST="0", PYTHONUNBUFFERED="1")
        results = RESULT.findall(said.text)
        bad = [test for test, result in results if result in ("FAILED", "ERROR")]
        found = {
            "status": said.status,
            "counts": dict(Counter(result.lower() for _, result in results)),
            "failed": sorted(set(bad)),
            "said": [] if said.status == 0 else said.tail,
        }
        context.save(groups={**context.data["groups"], name: found})


# ---------------------------------------------------------------------- compute-sanitizer

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = (
    "bfloat16, two tiles",
    "bfloat16, few rows",
    "onepass/bfloat16, decode, one row",
    "tail/bfloat16, many tiles (",
    "onepass/bfloat16, right with N inside, 240",
)


def sanitizers(context: Context) -> None:
    """The self-test's cases under each tool; memory is not cached, so that its ends are seen."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise LeftOut("compute-sanitizer is not installed")
    here = [sys.executable, "-m", "alora_kernels", "selftest", "--inside", "--backend", "cuda"]
    context.save(tools={})
    for number, tool in enumerate(TOOLS):
        seconds, errors = context.left / (len(TOOLS) - number), []
        said = None
        for only in SANITIZED:
            share = seconds / len(SANITIZED)
            command = [program, "--tool", tool, "--error-exitcode", "9", *here, "--only", only]
            said = run(command, share, PYTORCH_NO_CUDA_MEMORY_CACHING="1", ALORA_SELFTEST="0")
            summary = re.findall(r"={9} (?:\w+ )?SUMMARY: (.*)", said.text)
            errors.append(
                {"cases": only, "status": said.status, "summary": summary[-1:],
                 "said": [] if said.status == 0 else said.tail}
            )  # fmt: skip
            context.save(tools={**context.data["tools"], tool: errors})


# ---------------------------------------------------------------------- ncu

# What ncu calls it, for older and newer GPUs; the first that it knows is asked for.
METRICS = {
    "us": ("gpu__time_duration.sum",),
    "bandwidth %": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor %": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
    ),
    "l2 %": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed",),
}
UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}


def main_kernels(context: Context) -> None:
    """The six main kernels once each, for a profiler: this part writes nothing."""
    device = context.device
    for m, strategies in ((8192, ("tail", "onepass", "delta")), (1, ("onepass",))):
        activation = Activation.from_offsets([m], m, device=device)
        x = torch.randn(m, 4096, device=device).bfloat16().requires_grad_(m > 1)
        weight = torch.randn(4096, 4096, device=device).bfloat16()
        a = torch.randn(16, 4096, device=device).requires_grad_(m > 1)
        b = torch.randn(4096, 16, device=device).requires_grad_(m > 1)
        for strategy in strategies:
            with torch.set_grad_enabled(m > 1):
                y = alora_linear(
                    x, weight, None, a, b, activation, 1.0, backend="cuda", strategy=strategy
                )
                if m > 1:
                    y.backward(torch.randn_like(y))
    context.wait()


def counters(context: Context) -> None:
    """Bandwidth and tensor-core use of each kernel, where ncu may read counters."""
    program = shutil.which("ncu")
    if program is None:
        raise LeftOut("ncu is not installed")
    if BACKENDS["cuda"].why_not_here() is not None:
        raise LeftOut(f"no CUDA kernels: {BACKENDS['cuda'].why_not_here()}")
    known = run([program, "--query-metrics"], min(30.0, context.left)).text
    names = {
        what: next((n for n in choice if re.search(rf"^{n.split('.')[0]}\b", known, re.M)), "")
        for what, choice in METRICS.items()
    }
    asked = ",".join(name for name in names.values() if name)
    with tempfile.TemporaryDirectory() as folder:
        said = run(
            [
                program, "--csv", "--page", "raw", "--metrics", asked, "--kernel-name",
                "regex:masked_lora", sys.executable, "bench/run.py", "--mode", "gpu-report",
                "--part", "main-kernels", "--device", str(context.device), "--out",
                f"{folder}/none.json",
            ],
            context.left,
        )  # fmt: skip
    if "ERR_NVGPUCTRPERM" in said.text:
        raise LeftOut("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    context.save(kernels=parsed(said.text, names), status=said.status)
    if not context.data["kernels"]:
        context.save(said=said.tail)
        raise RuntimeError(f"ncu ended with exit status {said.status} and told of no kernel")


def parsed(text: str, names: dict[str, str]) -> dict[str, dict[str, float]]:
    """The medians of ncu's csv, by kernel and what was asked for."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    units = rows[0] if rows else {}
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows[1:]:
        own = values.setdefault(row["Kernel Name"].partition("(")[0], {})
        for what, name in names.items():
            try:
                value = float(row[name].replace(",", ""))
            except (KeyError, ValueError):
                continue
            own.setdefault(what, []).append(value * UNITS.get(units.get(name, ""), 1.0))
    return {
        kernel: {what: statistics.median(found) for what, found in own.items()}
        for kernel, own in values.items()
    }
