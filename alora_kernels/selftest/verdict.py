"""What a GPU, driver and build have passed: kept in a file, and asked for by dispatch.

When the test runs. `auto` tests the CUDA kernels once for each GPU, driver and build, the first
time that it could pick them: a line in the log says so, and how long it may take. Triton's compiler
is proven on these GPUs: its kernels are tested by `python -m alora_kernels selftest` alone, and
what that finds is heeded. A backend that is asked for by name starts no test; a verdict against it
is an error that says how to run it all the same. `ALORA_SELFTEST=0` turns all of this off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import backends
from ..contract import Problem
from ..files import cache_folder, write_whole
from ..once import first_time, log_once, warn_once
from .cases import cases_of
from .process import LIMITS, Outcome, Subject, run_cases

logger = logging.getLogger("alora_kernels")

FORMAT = 1
SWITCH, FILE = "ALORA_SELFTEST", "ALORA_SELFTEST_FILE"
IMPLEMENTATIONS = {
    "cuda": "alora_kernels.backends.cuda:CudaBackend",
    "triton": "alora_kernels.backends.triton:TritonBackend",
}
UNASKED = ("cuda",)  # what `auto` tests before its first use
COMMAND = "python -m alora_kernels selftest"
REPORT = f"Please report it, with the output of `{COMMAND} --backend {{}}`"


Pair = tuple[str, str]  # strategy and dtype


class Verdict(NamedTuple):
    """What a self-test has found."""

    failed: dict[Pair, str]  # the pairs that must not run, and why
    unknown: dict[Pair, str]  # the pairs that could not be tested, and why
    cases: int
    seconds: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], seconds: float) -> Verdict:
        failed: dict[Pair, str] = {}
        unknown: dict[Pair, str] = {}
        for outcome in outcomes:
            if outcome.result != "passed":
                kept = failed if outcome.failed else unknown
                kept.setdefault(
                    outcome.case.pair, f"{outcome.case.what}: {outcome.result}: {outcome.detail}"
                )
        unknown = {pair: why for pair, why in unknown.items() if pair not in failed}
        return cls(failed, unknown, len(outcomes), seconds)


class Gpu(NamedTuple):
    """A GPU as verdicts name it."""

    number: int
    name: str
    multiprocessors: int


# ---------------------------------------------------------------------- what dispatch asks


def why_not(backend: str, problem: Problem, strategy: str, automatic: bool) -> str | None:
    """Why the self-test keeps `backend` from running `problem` with `strategy`, or None.

    With `automatic` a backend of `UNASKED` that has no verdict yet is tested now.
    """
    if problem.device != "cuda" or backend not in IMPLEMENTATIONS or not switched_on():
        return None
    pair = strategy, str(problem.dtype).removeprefix("torch.")
    for gpu in _gpus(problem.arch):
        verdict = _verdict(backend, gpu, automatic and backend in UNASKED)
        if verdict is None:
            continue
        if pair in verdict.failed:
            return (
                f"it failed the self-test on {gpu.name}: {verdict.failed[pair]} "
                f"({SWITCH}=0 runs it all the same)"
            )
        if pair in verdict.unknown and automatic:
            return f"it could not be tested on {gpu.name}: {verdict.unknown[pair]}"
    return None


def switched_on() -> bool:
    """What `ALORA_SELFTEST` says."""
    wish = os.environ.get(SWITCH, "1")
    if wish not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {wish!r}: leave it unset, or set it to 0 or 1")
    return wish == "1"


def forget() -> None:
    """Read and test anew."""
    _gpus.cache_clear()
    _known.clear()


_known: dict[tuple[str, str], Verdict | None] = {}  # by backend and GPU; None: not tested yet


@functools.cache
def _gpus(arch: int) -> tuple[Gpu, ...]:
    """The visible GPUs of an arch, one of each name."""
    if not torch.cuda.is_available():
        return ()
    found: dict[str, Gpu] = {}
    for number in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(number) == (arch // 10, arch % 10):
            gpu = gpu_of(number)
            found.setdefault(gpu.name, gpu)
    return tuple(found.values())


def gpu_of(number: int) -> Gpu:
    """A visible GPU."""
    properties = torch.cuda.get_device_properties(number)
    return Gpu(number, properties.name, properties.multi_processor_count)


def _verdict(backend: str, gpu: Gpu, may_test: bool) -> Verdict | None:
    """What is known; the file is read once, and heard of with a warning."""
    which = backend, gpu.name
    if which not in _known:
        _known[which] = recorded(key_of(backend, gpu))
    if _known[which] is None and may_test:
        _known[which] = _test_once(backend, gpu)
    known = _known[which]
    if known is not None and (known.failed or known.unknown):
        _warn(backend, gpu, known)
    return known


def _test_once(backend: str, gpu: Gpu) -> Verdict:
    """Test, unless another process is at it: then wait for its verdict."""
    key = key_of(backend, gpu)
    with _locked(path(), f"another process tests the {backend} kernels; waiting for its verdict"):
        found = recorded(key)
        if found is not None:
            return found
        logger.warning(
            "alora_kernels: testing the %s kernels on %s once, about 20 seconds, at most %.0f "
            "(%s=0 skips this; `%s` does it beforehand)",
            backend, gpu.name, LIMITS.total, SWITCH, COMMAND,
        )  # fmt: skip
        began = time.monotonic()
        cases = cases_of(backend, gpu.multiprocessors)
        try:
            outcomes = run_cases(subject_of(backend, gpu), cases)
        except OSError as error:  # no process can be started here
            outcomes = [Outcome(case, "not run", str(error)) for case in cases]
        found = Verdict.of(outcomes, time.monotonic() - began)
        record(key, found)
        logger.info("self-test of %s: %d cases, %.1f s", backend, found.cases, found.seconds)
        return found


def subject_of(backend: str, gpu: Gpu) -> Subject:
    """What is tested."""
    return Subject(backend, IMPLEMENTATIONS[backend], f"cuda:{gpu.number}")


def _warn(backend: str, gpu: Gpu, verdict: Verdict) -> None:
    """One warning for a backend on a GPU."""
    pairs = verdict.failed or verdict.unknown
    listed = "\n  ".join(f"{s}/{dtype}: {why}" for (s, dtype), why in pairs.items())
    if verdict.failed:
        text = (
            f"the {backend} kernels failed the self-test on {gpu.name}; what failed is left out, "
            f"other backends serve instead. {REPORT.format(backend)}.\n  {listed}\n"
            f"(The verdict is in {path()}; {SWITCH}=0 ignores it.)"
        )
    else:
        text = (
            f"the {backend} kernels could not be tested on {gpu.name} and are left out. Run "
            f"`{COMMAND}` while the GPU is free, or set {SWITCH}=0 to use them untested.\n  "
            f"{listed}"
        )
    warn_once(f"alora_kernels: {text}", "selftest", backend, gpu.name, stacklevel=3)


# ---------------------------------------------------------------------- what a verdict holds for


def key_of(backend: str, gpu: Gpu) -> str:
    """For what a verdict holds: GPU, driver and build."""
    return f"{backend} {build_of(backend)} | {gpu.name} | driver {driver_version()}"


@functools.cache
def driver_version() -> str:
    """As `nvidia-smi` names it, or the CUDA version that the driver serves."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
        if found:
            return found.group()
    with contextlib.suppress(AttributeError, RuntimeError):
        cuda: Any = torch._C
        return f"CUDA {cuda._cuda_getDriverVersion()}"
    return "unknown"


@functools.cache
def build_of(backend: str) -> str:
    """The identity of what runs: the contents of its files, whenever and wherever written."""
    root = Path(str(backends.__file__)).parent / backend
    digest = hashlib.sha256()
    for file in sorted(root.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    digest.update(Path(__file__).with_name("cases.py").read_bytes())
    if backend == "cuda":
        from ..backends.cuda.extension import extension

        digest.update(Path(extension().__file__).read_bytes())
    else:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(importlib.metadata.version("triton").encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------- the file


def path() -> Path:
    """`ALORA_SELFTEST_FILE`, or alora_kernels/selftest.json in the user's cache folder."""
    given = os.environ.get(FILE)
    return Path(given) if given else cache_folder() / "selftest.json"


def recorded(key: str) -> Verdict | None:
    """The verdict of `key`; None where there is none."""
    entry = _content().get(key)
    if entry is None:
        return None
    failed = {tuple(pair.split("/")): str(why) for pair, why in entry["failed"].items()}
    return Verdict(failed, {}, entry["cases"], entry["seconds"])  # type: ignore[arg-type]


def record(key: str, verdict: Verdict) -> None:
    """Keep a verdict, if it is one: what could not be tested is tried again.

    A file that cannot be written is no reason to fail: the next process tests again.
    """
    if verdict.unknown:
        return
    content = {
        "format": FORMAT,
        "verdicts": {
            **_content(),
            key: {
                "failed": {"/".join(pair): why for pair, why in verdict.failed.items()},
                "cases": verdict.cases,
                "seconds": round(verdict.seconds, 1),
                "date": time.strftime("%Y-%m-%d"),
            },
        },
    }
    try:
        write_whole(path(), json.dumps(content, indent=1).encode())
    except OSError as error:
        log_once(
            logger,
            f"alora_kernels: the self-test's verdict cannot be kept in {path()} ({error}): every "
            f"process will test again. {FILE} names another file, {SWITCH}=0 skips the test",
        )


def _content() -> dict[str, Any]:
    """All verdicts; a file that cannot be understood is ignored with a warning, and replaced."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
        verdicts = content["verdicts"]
        for entry in verdicts.values():
            if not all(len(pair.split("/")) == 2 for pair in entry["failed"]):
                raise ValueError("a pair is not strategy/dtype")
            int(entry["cases"]), float(entry["seconds"])
        return verdicts
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if first_time("selftest", path()):
            warnings.warn(
                f"alora_kernels: {path()} is ignored, it holds no verdicts of this package "
                f"({type(error).__name__}: {error}); `{COMMAND}` writes it anew",
                stacklevel=2,
            )
        return {}


@contextlib.contextmanager
def _locked(file: Path, waiting: str) -> Iterator[None]:
    """Held by one process at a time, as far as the file system knows locks."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.with_name(file.name + ".lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("alora_kernels: %s", waiting)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, ImportError):
            pass  # two processes may then test at the same time, and find the same
        yield
