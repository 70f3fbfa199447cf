"""`python -m alora_kernels selftest`: run every kernel once, and write the verdict down."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from ..contract import Backend
from . import verdict
from .cases import Case, cases_of
from .check import WrongResult, check, made
from .planned import H100, kernels_of
from .process import LIMITS, Limits, Outcome, run_by_dtype, run_cases
from .verdict import COMMAND, IMPLEMENTATIONS, Gpu, Verdict


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add = p.add_argument
    add("--backend", choices=IMPLEMENTATIONS, help="one backend (default: all that can run here)")
    add("--device", type=int, default=0, metavar="N", help="the GPU cuda:N (default: 0)")
    add("--seconds", type=float, default=LIMITS.total, help="limit for a backend's cases")
    add(
        "--inside",
        action="store_true",
        help="run in this process, without a verdict: for compute-sanitizer and debuggers",
    )
    about = "the cases whose description has this text; may be given several times"
    add("--only", action="append", default=[], metavar="TEXT", help=about)


def main(o: argparse.Namespace, backends: dict[str, Backend]) -> int:
    """Test the backends that can run here. Returns 1 when one failed, 2 when none could tell."""
    names = [o.backend] if o.backend else list(IMPLEMENTATIONS)
    reasons = {name: backends[name].why_not_here() for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name}: not tested here: {reason}")
    able = [name for name, reason in reasons.items() if reason is None]
    if not torch.cuda.is_available() or not able:
        print("\n".join(would_run([n for n in names if reasons[n] is not None], o.only)))
        return 0
    gpu = verdict.gpu_of(o.device)
    print(f"{gpu.name}, driver {verdict.driver_version()}")
    return max(_test(name, gpu, o) for name in able)


def _test(name: str, gpu: Gpu, o: argparse.Namespace) -> int:
    cases = _wanted(name, gpu.multiprocessors, o.only)
    if not cases:
        print(f"{name}: no case has {o.only!r} in its description")
        return 2
    subject = verdict.subject_of(name, gpu)
    if o.inside:
        return _inside(subject.implementation, subject.device, cases)
    began = time.monotonic()
    way = run_by_dtype if name == "triton" else run_cases
    outcomes = way(subject, cases, Limits(total=o.seconds), told=_tell)
    found = Verdict.of(outcomes, time.monotonic() - began)
    print("\n".join(summary(name, outcomes, found)))
    if o.only:
        print("(no verdict is kept: some cases were left out)")
    else:
        verdict.record(verdict.key_of(name, gpu), found)
        verdict.forget()
        if not found.unknown:
            print(f"written: {verdict.path()}")
    return 1 if found.failed else 2 if found.unknown else 0


def _tell(outcome: Outcome) -> None:
    """What went wrong, as soon as it is known."""
    if outcome.result != "passed":
        print(f"  {outcome.result}: {outcome.case}\n    {outcome.detail}", flush=True)


def summary(name: str, outcomes: Sequence[Outcome], found: Verdict) -> list[str]:
    """A line for each strategy and dtype, and what became of the backend."""
    lines = []
    for pair in dict.fromkeys(outcome.case.pair for outcome in outcomes):
        mine = [o for o in outcomes if o.case.pair == pair]
        passed = sum(o.result == "passed" for o in mine)
        told = "failed" if pair in found.failed else "not known" if pair in found.unknown else "ok"
        seconds = sum(o.seconds for o in mine)
        lines.append(
            f"{name:<7} {pair[0]:<8} {pair[1]:<9} {passed:>3} of {len(mine):>3} cases  "
            f"{seconds:5.1f} s  {told}"
        )
    kernels = {kernel for o in outcomes for kernel in o.kernels}
    passed = sum(o.result == "passed" for o in outcomes)
    launched = f", {len(kernels)} kernels launched" if kernels else ""
    lines.append(
        f"{name}: {passed} of {len(outcomes)} cases passed{launched}, {found.seconds:.1f} s"
    )
    if found.failed:
        lines.append(
            f'What failed is left out of backend="auto". {verdict.REPORT.format(name)}, the GPU '
            "and the driver."
        )
    return lines


def _inside(implementation: str, device: str, cases: Sequence[Case]) -> int:
    """The cases in this process: a crash is a crash. Memory is not filled, so that a sanitizer
    sees what nobody wrote."""
    backend, _ = made(implementation)
    wrong = 0
    for case in cases:
        print(case, flush=True)
        try:
            check(backend, case, device, poison=False)
        except WrongResult as error:
            wrong += 1
            print(f"  wrong: {error}", flush=True)
    return 1 if wrong else 0


def would_run(names: Sequence[str], only: Sequence[str] = ()) -> list[str]:
    """What the command would do on a GPU."""
    lines = [f"On a machine with a GPU, `{COMMAND}` would run these cases, twice each,"]
    lines += ["in a process of its own (sizes are those for an H100):"]
    for name in names:
        cases = _wanted(name, H100.multiprocessors, only)
        lines.append(f"\n{name}: {len(cases)} cases")
        alike: dict[tuple[object, ...], list[Case]] = {}
        for c in cases:
            alike.setdefault((c.what, c.rows, c.depth, c.width, c.rank, c.strategy), []).append(c)
        for case, *others in alike.values():
            dtypes = "/".join(c.dtype for c in [case, *others])
            sizes = f"M={case.rows} K={case.depth} N={case.width} R={case.rank}"
            lines.append(f"  {case.strategy:<8} {case.what:<36} {sizes:<29} {dtypes}")
        if name == "cuda":
            kernels = sorted(set().union(*kernels_of(cases)))
            lines.append(f"\n{len(kernels)} kernels:")
            lines += [f"  {_short(kernel)}" for kernel in kernels]
    if not only:
        lines.append(f"\nThe verdict would be kept in {verdict.path()}.")
    return lines


def _wanted(name: str, multiprocessors: int, only: Sequence[str]) -> list[Case]:
    """The cases of a backend whose description has one of the texts, or all."""
    cases = cases_of(name, multiprocessors)
    return [c for c in cases if not only or any(text in str(c) for text in only)]


def _short(kernel: str) -> str:
    return kernel.removeprefix("masked_lora_").removesuffix("_kernel")
