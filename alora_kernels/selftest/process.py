"""Runs cases in a worker, and starts another where one crashed or hung."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

from .cases import Case, sent
from .worker import CANNOT_GO_ON, Order

# What became of a case. Those of `INCONCLUSIVE` say nothing about the kernels.
RESULTS = ("passed", "wrong", "raised", "crashed", "hung", "no memory", "not run")
INCONCLUSIVE = ("no memory", "not run")
TAIL = 1500  # characters of a worker's standard error that are told


class Subject(NamedTuple):
    """What is tested."""

    name: str  # of the backend
    implementation: str  # "module:Class"
    device: str  # "cuda:0"


class Limits(NamedTuple):
    """Seconds."""

    start: float = 90.0  # importing torch and making a context, on a busy machine
    case: float = 60.0  # with what a first call loads or compiles
    total: float = 180.0


LIMITS = Limits()


class Outcome(NamedTuple):
    """What became of one case."""

    case: Case
    result: str  # one of RESULTS
    detail: str = ""
    seconds: float = 0.0
    kernels: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.result not in ("passed", *INCONCLUSIVE)


Told = Callable[[Outcome], None]


def run_cases(
    subject: Subject,
    cases: Sequence[Case],
    limits: Limits = LIMITS,
    told: Told = lambda _: None,
) -> list[Outcome]:
    """The outcome of every case, in order; `told` hears each as soon as it is known.

    After a crash or a hang the other cases of the same strategy and dtype are left out: what they
    would say is known, and every crash costs a new process.
    """
    found: dict[int, Outcome] = {}
    ends = time.monotonic() + limits.total

    def settle(number: int, result: str, detail: str = "", **more: Any) -> None:
        if number not in found:
            found[number] = Outcome(cases[number], result, detail, **more)
            told(found[number])

    while len(found) < len(cases):
        left = [i for i in range(len(cases)) if i not in found]
        before, words = len(found), ""
        with _worker(subject, [cases[i] for i in left], left) as worker:
            _listen(worker, limits, ends, settle)
            if len(found) == before:
                words = worker.last_words()
        for number, outcome in list(found.items()):
            if outcome.result in ("crashed", "hung"):
                for i in left:
                    if cases[i].pair == cases[number].pair:
                        settle(i, "not run", f"after this {outcome.result}: {outcome.case.what}")
        if len(found) == before or time.monotonic() > ends:
            reason = f"the {limits.total:.0f} s for all cases were over"
            if time.monotonic() <= ends:
                reason = f"the process did not get as far: {words}"
            for i in left:
                settle(i, "not run", reason)
    return [found[i] for i in range(len(cases))]


def run_by_dtype(
    subject: Subject, cases: Sequence[Case], limits: Limits = LIMITS, told: Told = lambda _: None
) -> list[Outcome]:
    """The same, with a worker for each dtype side by side: for kernels that are yet to compile."""
    shares: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        shares.setdefault(case.dtype, []).append(number)
    found: dict[int, Outcome] = {}
    with ThreadPoolExecutor(max_workers=max(1, len(shares))) as pool:

        def run(numbers: list[int]) -> list[Outcome]:
            return run_cases(subject, [cases[i] for i in numbers], limits, told)

        for numbers, outcomes in zip(shares.values(), pool.map(run, shares.values())):
            found.update(zip(numbers, outcomes))
    return [found[i] for i in range(len(cases))]


def _listen(worker: _Worker, limits: Limits, ends: float, settle: Callable[..., None]) -> None:
    """Hear what the worker tells until it ends, or until it is over with it."""
    current: int | None = None
    patience = limits.start
    while True:
        left = ends - time.monotonic()
        try:
            message = worker.hear(max(0.0, min(patience, left)))
        except TimeoutError:
            worker.kill()
            if left < patience:
                return  # no verdict: what had not begun long ago might still have ended
            if current is not None:
                settle(current, "hung", f"no answer within {patience:g} s; {worker.last_words()}")
            return
        if message is None:
            if current is not None:
                settle(current, "crashed", worker.last_words())
            return
        patience = limits.case
        if "begin" in message:
            current = message["begin"]
        elif "end" in message:
            current = None
            settle(
                message["end"], message["result"], message["detail"], seconds=message["seconds"],
                kernels=tuple(message["kernels"]),
            )  # fmt: skip


class _Worker:
    """A process, and a thread that reads what it writes."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # half of a line, as a crash leaves it
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None at the end. Raises TimeoutError."""
        try:
            return self._messages.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None

    def kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
            self._process.wait(10)

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote to standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        status = self._process.poll()
        if status is None:
            how = "it does not end"
        elif status < 0:
            how = f"ended by {signal.Signals(-status).name}"
        elif status == CANNOT_GO_ON:
            how = "the device refused to go on"
        else:
            how = f"ended with exit status {status}"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - TAIL))
        text = self._errors.read().decode(errors="replace").strip()
        return f"{how}: {text}" if text else how


@contextlib.contextmanager
def _worker(subject: Subject, cases: Sequence[Case], numbers: list[int]) -> Iterator[_Worker]:
    """A running worker, which is gone at the end of the block."""
    if not sys.executable:
        raise OSError("this Python does not know its own program (sys.executable)")
    code = (  # this process's own packages, wherever they come from
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from {__package__}.worker import main; sys.exit(main())"
    )
    order = Order(subject.implementation, subject.device, sent(cases), numbers)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "ALORA_SELFTEST": "0"},
        )  # fmt: skip
        worker = _Worker(process, errors)
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: listening tells how
                process.stdin.write(json.dumps(order._asdict()) + "\n")
                process.stdin.close()
            yield worker
        finally:
            worker.kill()
