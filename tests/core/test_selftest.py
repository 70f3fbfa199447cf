"""The self-test: workers that crash, hang and are wrong; verdicts, and what dispatch does of them.

Each fault is a backend that breaks in one way in one strategy and dtype (`faulty_backends`), run in
a worker as a GPU's kernels are. Dispatch and the verdicts' file see GPUs that are pretended.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from alora_kernels import dispatch, once
from alora_kernels.__main__ import main
from alora_kernels.contract import Problem
from alora_kernels.dispatch import choice
from alora_kernels.run import forget
from alora_kernels.selftest import command, verdict
from alora_kernels.selftest.cases import Case, cases_of, received, sent
from alora_kernels.selftest.process import Limits, Outcome, Subject, run_cases
from alora_kernels.selftest.verdict import Gpu, Verdict

ROOT = Path(__file__).parents[2]
PATIENT = Limits(start=120.0, case=60.0, total=240.0)


def small(strategy: str, dtype: str, what: str = "small", **changes) -> Case:
    return Case(what, strategy, dtype, 20, 24, 40, 4, **changes)


# Two for each strategy and dtype.
CASES = [
    small(strategy, dtype, what)
    for strategy in ("onepass", "tail", "delta")
    for dtype in ("bfloat16", "float16")
    for what in ("first", "second")
]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The worker has the path of this process: the tests must be on it."""
    monkeypatch.syspath_prepend(str(ROOT))


def outcomes_of(name: str, limits: Limits = PATIENT) -> dict[tuple[str, str, str], Outcome]:
    subject = Subject(name, f"tests.core.faulty_backends:{name}", "cpu")
    told: list[Outcome] = []
    found = run_cases(subject, CASES, limits, told.append)
    assert [o.case for o in found] == CASES
    assert sorted(map(str, told)) == sorted(map(str, found))  # each is told once
    return {(*o.case.pair, o.case.what): o for o in found}


# ---------------------------------------------------------------------- workers


def test_every_fault_is_told_and_the_rest_goes_on() -> None:
    found = outcomes_of("Mild")
    expected = {
        ("onepass", "bfloat16"): ("wrong", "y0: rms error 0.03"),
        ("onepass", "float16"): ("wrong", "y0: rms error nan"),
        ("tail", "bfloat16"): ("wrong", "y0: a second run of the same call gives other bits"),
        ("tail", "float16"): ("raised", "RuntimeError: cuTensorMapEncodeTiled: CUDA_ERROR_INVALID"),
        ("delta", "bfloat16"): ("no memory", "2.00 GiB"),
        ("delta", "float16"): ("passed", ""),
    }
    for (*pair, what), outcome in found.items():
        result, detail = expected[tuple(pair)]
        assert outcome.result == result and detail in outcome.detail, (pair, what, outcome)
    told = Verdict.of(list(found.values()), 1.0)
    assert set(told.failed) == {p for p, (r, _) in expected.items() if r in ("wrong", "raised")}
    assert set(told.unknown) == {("delta", "bfloat16")}


@pytest.mark.slow
def test_after_a_crash_or_a_hang_another_worker_goes_on() -> None:
    began = time.monotonic()
    found = outcomes_of("Grave", Limits(start=120.0, case=4.0, total=300.0))
    results = {key: o.result for key, o in found.items()}
    for pair, result in {
        ("onepass", "bfloat16"): "crashed",
        ("tail", "bfloat16"): "crashed",
        ("tail", "float16"): "hung",
    }.items():
        assert results.pop((*pair, "first")) == result
        assert results.pop((*pair, "second")) == "not run"
        assert f"after this {result}: first" in found[(*pair, "second")].detail
    assert set(results.values()) == {"passed"} and len(results) == 6
    assert found["onepass", "bfloat16", "first"].detail == (
        "ended by SIGSEGV: CUDA error: an illegal memory access was encountered"
    )
    assert found["tail", "bfloat16", "first"].detail == "ended with exit status 5"
    assert "no answer within 4 s; ended by SIGKILL" in found["tail", "float16", "first"].detail
    assert set(Verdict.of(list(found.values()), 1.0).failed) == {
        ("onepass", "bfloat16"), ("tail", "bfloat16"), ("tail", "float16")
    }  # fmt: skip
    assert time.monotonic() - began < 300


@pytest.mark.slow
def test_where_no_worker_can_start_nothing_is_known() -> None:
    found = list(outcomes_of("Unstartable").values())
    assert {o.result for o in found} == {"not run"}
    assert "busy or unavailable" in found[0].detail
    told = Verdict.of(found, 1.0)
    assert not told.failed and set(told.unknown) == {c.pair for c in CASES}


def test_the_limit_for_all_says_nothing_about_kernels() -> None:
    found = list(outcomes_of("Grave", Limits(start=120.0, case=60.0, total=0.5)).values())
    assert {o.result for o in found} == {"not run"}
    assert "the 0 s for all cases were over" in found[0].detail
    assert not Verdict.of(found, 1.0).failed


def test_cases_travel_whole() -> None:
    for backend in ("cuda", "triton"):
        cases = cases_of(backend, 132)
        assert received(json.loads(json.dumps(sent(cases)))) == cases
        assert len(set(cases)) == len(cases) == len({str(c) for c in cases})


def test_the_riskiest_cases_come_first() -> None:
    first = cases_of("cuda", 132)[:4]
    assert [(c.strategy, c.backward, c.rank) for c in first] == [
        ("onepass", True, r) for r in (16, 32, 48, 64)
    ]


# ---------------------------------------------------------------------- verdicts

GPU = Gpu(0, "Imaginary H100", 132)
OTHER = Gpu(1, "Imaginary RTX 5090", 170)


def problem(**changes) -> Problem:
    fields = {
        "rows": 256, "in_features": 4096, "out_features": (4096,), "ranks": (16,),
        "active": 256, "dtype": torch.bfloat16, "adapter_dtype": torch.float32,
        "device": "cuda", "arch": 90,
    }  # fmt: skip
    return Problem(**{**fields, **changes})


class Willing:
    def __init__(self, name: str) -> None:
        self.name = name

    def why_not_here(self) -> None:
        return None

    def why_not(self, problem: Problem, strategy: str) -> None:
        return None


class Pretended:
    """Stands for the processes: says what they would have found."""

    def __init__(self) -> None:
        self.count = 0
        self.results: dict[tuple[str, str], str] = {}

    def __call__(self, subject: Subject, cases: list[Case], *args) -> list[Outcome]:
        self.count += 1
        assert subject.device in ("cuda:0", "cuda:1")
        return [Outcome(c, self.results.get(c.pair, "passed"), "as pretended") for c in cases]


@pytest.fixture
def tested(monkeypatch, tmp_path) -> Pretended:
    """One GPU, two backends, and workers that say what the test wants."""
    table = {name: Willing(name) for name in ("cuda", "triton")}
    table["reference"] = dispatch.BACKENDS["reference"]
    monkeypatch.setenv(verdict.FILE, str(tmp_path / "folder" / "selftest.json"))
    monkeypatch.setenv(verdict.SWITCH, "1")
    monkeypatch.delenv(choice.BACKEND_VARIABLE, raising=False)
    stand_in = Pretended()
    monkeypatch.setattr(verdict, "run_cases", stand_in)
    gpus = {90: (GPU,), 120: (OTHER,)}

    class Gpus:
        def __call__(self, arch: int):
            return gpus.get(arch, ())

        def cache_clear(self) -> None:
            pass

    monkeypatch.setattr(verdict, "_gpus", Gpus())
    monkeypatch.setattr(verdict, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(verdict, "build_of", lambda backend: f"build-of-{backend}")
    forget()
    once.forget()
    with mock.patch.dict(dispatch.BACKENDS, table, clear=True):
        yield stand_in
    monkeypatch.undo()
    forget()
    once.forget()


def picked(**changes) -> tuple[str, str]:
    backend, strategy = dispatch.choose(problem(**changes), "auto", "auto")
    return backend.name, strategy


def test_auto_tests_once_and_says_so(tested, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="alora_kernels"):
        assert picked()[0] == "cuda"
        assert picked(rows=2048)[0] == "cuda"
        forget()  # another process: the file knows
        assert picked()[0] == "cuda"
    assert tested.count == 1
    (said,) = caplog.messages
    assert "testing the cuda kernels on Imaginary H100 once" in said
    assert "ALORA_SELFTEST=0 skips this" in said and "python -m alora_kernels selftest" in said
    assert sorted(p.name for p in verdict.path().parent.iterdir()) == [
        "selftest.json", "selftest.json.lock"
    ]  # fmt: skip


def test_what_failed_is_left_out_with_one_warning(tested) -> None:
    before = picked()
    forget()
    verdict.path().unlink()
    tested.results = {(before[1], "bfloat16"): "crashed"}
    with pytest.warns(UserWarning) as told:
        now = picked()
        picked(rows=2048)
        picked(rows=1, active=1)
    (warning,) = told
    text = str(warning.message)
    assert "the cuda kernels failed the self-test on Imaginary H100" in text
    assert f"{before[1]}/bfloat16: " in text and "crashed: as pretended" in text
    assert "Please report it, with the output of `python -m alora_kernels selftest" in text
    assert now != before
    assert picked(dtype=torch.float16) == ("cuda", before[1])  # another dtype's kernels passed
    forget()
    with warnings.catch_warnings():  # the next process reads it, and has its own warning
        warnings.simplefilter("ignore")
        assert picked() == now
    assert tested.count == 2


def test_where_all_failed_triton_serves(tested) -> None:
    tested.results = {(s, "bfloat16"): "wrong" for s in ("delta", "tail", "onepass")}
    with pytest.warns(UserWarning, match="failed the self-test"):
        assert picked()[0] == "triton"


def test_what_could_not_be_tested_is_left_out_and_tried_again(tested) -> None:
    tested.results = {(s, d): "not run" for s in ("delta", "tail", "onepass")
                      for d in ("bfloat16", "float16")}  # fmt: skip
    with pytest.warns(UserWarning, match="could not be tested on Imaginary H100") as told:
        assert picked()[0] == "triton"
    assert "while the GPU is free, or set ALORA_SELFTEST=0" in str(told[0].message)
    assert not verdict.path().exists()
    tested.results = {}
    forget()
    assert picked()[0] == "cuda" and tested.count == 2


def test_the_switch(tested, monkeypatch) -> None:
    tested.results = {(s, "bfloat16"): "wrong" for s in ("delta", "tail", "onepass")}
    monkeypatch.setenv(verdict.SWITCH, "0")
    assert picked()[0] == "cuda" and tested.count == 0
    monkeypatch.setenv(verdict.SWITCH, "yes")
    forget()
    with pytest.raises(ValueError, match="ALORA_SELFTEST is 'yes': leave it unset, or set it to"):
        picked()


def test_a_named_backend_starts_no_test_and_never_falls_back(tested) -> None:
    assert dispatch.choose(problem(), "cuda", "tail")[1] == "tail" and tested.count == 0
    tested.results = {("tail", "bfloat16"): "wrong"}
    forget()
    with pytest.warns(UserWarning, match="failed the self-test"):
        picked()
    with pytest.raises(RuntimeError) as error:
        dispatch.choose(problem(), "cuda", "tail")
    assert "cuda/tail: it failed the self-test on Imaginary H100" in str(error.value)
    assert "ALORA_SELFTEST=0 runs it all the same" in str(error.value)
    assert dispatch.choose(problem(), "cuda", "auto")[0].name == "cuda"


def test_triton_is_tested_by_the_command_alone_and_its_verdict_heeded(tested) -> None:
    failed = {(s, "bfloat16"): "odd sizes: wrong: by 1" for s in ("delta", "tail", "onepass")}
    verdict.record(verdict.key_of("triton", GPU), Verdict(failed, {}, 3, 1.0))
    with pytest.warns(UserWarning, match="the triton kernels failed"):
        assert picked()[0] == "cuda"
    assert tested.count == 1  # that of cuda


def test_a_verdict_holds_for_one_gpu_driver_and_build(tested, monkeypatch) -> None:
    picked()
    assert tested.count == 1
    for name, value in (("driver_version", "590.1"), ("build_of", "another")):
        monkeypatch.setattr(verdict, name, lambda *args, value=value: value)
        forget()
        picked()
    assert tested.count == 3
    picked(arch=120)
    assert tested.count == 4
    content = json.loads(verdict.path().read_text())
    assert content["format"] == verdict.FORMAT and len(content["verdicts"]) == 4
    assert "cuda build-of-cuda | Imaginary H100 | driver 580.65.06" in content["verdicts"]


def test_the_file_is_read_once_for_a_backend(tested, monkeypatch) -> None:
    reads, real = [], verdict.recorded
    monkeypatch.setattr(verdict, "recorded", lambda key: reads.append(key) or real(key))
    dispatch.choose(problem(), "triton", "auto")
    for rows in range(1025, 1075):
        picked(rows=rows)
    # (cuda: before the test, and again when the lock is held)
    assert sorted(key.split()[0] for key in reads) == ["cuda", "cuda", "triton"]


def test_two_processes_test_once(tested, caplog) -> None:
    slow = tested.__call__

    def slowly(*args):
        time.sleep(0.3)
        return slow(*args)

    verdict.run_cases = slowly
    found: list[Verdict] = []
    threads = [
        threading.Thread(target=lambda: found.append(verdict._test_once("cuda", GPU)))
        for _ in range(3)
    ]
    with caplog.at_level(logging.WARNING, logger="alora_kernels"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tested.count == 1 and len(found) == 3
    assert sum("another process tests the cuda kernels" in m for m in caplog.messages) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 9, "verdicts": {}}', '{"format": 1}',
     '{"format": 1, "verdicts": {"a": {"failed": {"tail": "x"}, "cases": 1, "seconds": 1}}}',
     '{"format": 1, "verdicts": {"a": {"failed": [], "seconds": 1}}}'],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(tested, text) -> None:
    verdict.path().parent.mkdir()
    verdict.path().write_text(text)
    with pytest.warns(UserWarning, match="is ignored, it holds no verdicts") as told:
        assert picked()[0] == "cuda"
    assert len(told) == 1 and tested.count == 1
    assert json.loads(verdict.path().read_text())["format"] == verdict.FORMAT


def test_a_file_that_cannot_be_written_is_said_once(tested, monkeypatch, caplog) -> None:
    def fail(*args):
        raise OSError("read-only file system")

    monkeypatch.setattr(verdict, "write_whole", fail)
    with caplog.at_level(logging.WARNING, logger="alora_kernels"):
        assert picked()[0] == "cuda"
        forget()
        assert picked()[0] == "cuda"
    assert tested.count == 2
    assert sum("read-only file system" in m for m in caplog.messages) == 1


def test_tensors_elsewhere_are_no_business_of_the_selftest(tested) -> None:
    for device in ("cpu", "mps", "meta"):
        assert verdict.why_not("cuda", problem(device=device), "tail", True) is None
    assert verdict.why_not("cpu", problem(), "delta", True) is None
    assert tested.count == 0


def test_the_build_is_known_by_its_contents(monkeypatch, tmp_path) -> None:
    """A copy is the same build, whenever it was written; another byte is another build."""
    package = tmp_path / "backends"
    (package / "triton").mkdir(parents=True)
    file = package / "triton" / "gemm.py"
    file.write_text("one")
    monkeypatch.setattr(verdict.backends, "__file__", str(package / "__init__.py"))
    build = verdict.build_of.__wrapped__
    first = build("triton")
    os.utime(file, (1, 1))
    assert build("triton") == first
    file.write_text("two")
    assert build("triton") != first


# ---------------------------------------------------------------------- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("backend", [None, "cuda", "triton"])
def test_without_a_gpu_the_command_says_what_it_would_run(backend, capsys) -> None:
    assert main(["selftest", *(["--backend", backend] if backend else [])]) == 0
    out = capsys.readouterr().out
    assert ("cuda: not tested here: " in out) == (backend != "triton")
    assert "would run these cases" in out and "selftest.json" in out
    assert ("right with N inside, 240 columns" in out) == (backend != "triton")
    assert ("masked" not in out) and (("  decode_bf16" in out) == (backend != "triton"))


def test_the_command_writes_the_verdict_and_its_status_tells(tested, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verdict, "gpu_of", lambda number: GPU)

    def run(subject, cases, limits, told):
        found = tested(subject, cases)
        for outcome in found:
            told(outcome)
        return found

    monkeypatch.setattr(command, "run_cases", run)

    def status(*arguments: str) -> int:
        p = argparse.ArgumentParser()
        command.add_flags(p)
        return command.main(p.parse_args(["--backend", "cuda", *arguments]), dispatch.BACKENDS)

    assert status() == 0
    count = len(cases_of("cuda", GPU.multiprocessors))
    out = capsys.readouterr().out
    assert f"cuda: {count} of {count} cases passed" in out and str(verdict.path()) in out
    tested.results = {("tail", "float16"): "hung"}
    assert status() == 1
    out = capsys.readouterr().out
    assert "hung: tail/float16" in out and "Please report it" in out
    assert set(verdict.recorded(verdict.key_of("cuda", GPU)).failed) == {("tail", "float16")}
    tested.results = {("tail", "float16"): "not run"}
    assert status() == 2  # and the verdict stays
    assert set(verdict.recorded(verdict.key_of("cuda", GPU)).failed) == {("tail", "float16")}
    verdict.path().unlink()
    tested.results = {}
    assert status("--only", "decode") == 0 and not verdict.path().exists()
    assert status("--only", "nothing has this") == 2
