"""The report of a GPU: its whole path on a CPU with a made-up clock, and parts that break.

What other programs say (the self-test, pytest, compute-sanitizer, ncu) stands here as they say it,
so that reading it is tested without them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from bench import run
from bench.gpu_report import command, commands, page
from bench.gpu_report.command import LEFT_OUT, PARTS, Part, Report
from bench.gpu_report.commands import Said
from bench.gpu_report.context import Context, LeftOut, MadeUpClock

CPU = torch.device("cpu")

SELFTEST = """Imaginary H100, driver 580.65
cuda    onepass  bfloat16   19 of  20 cases    1.2 s  failed
cuda: 107 of 108 cases passed, 40 kernels launched, 14.0 s
"""
PYTEST = """tests/cuda/test_device.py::test_streams[tail-4096] PASSED [ 33%]
tests/cuda/test_device.py::test_a_graph[onepass - 1] FAILED [ 66%]
tests/cuda/test_device.py::test_another_device SKIPPED (there is one GPU) [100%]
"""
SANITIZER = """========= COMPUTE-SANITIZER
tail/bfloat16, two tiles (M=130 K=264 N=136 R=16)
========= ERROR SUMMARY: 0 errors
"""
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
QUERY = """gpu__time_duration   Counter nsecond
dram__throughput     Throughput %
sm__inst_executed_pipe_tensor  Counter inst
"""
NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed"
"","","nsecond","%","%"
"0","masked_lora_decode_bf16_kernel(DecodeParams)","12,000.00","81.5","3.0"
"1","masked_lora_decode_bf16_kernel(DecodeParams)","14,000.00","82.5","3.0"
"2","masked_lora_fused_bf16_sm90nk_kernel(FusedSm90Params)","512,000","20","88.25"
"""  # noqa: E501


class Programs:
    """Stands for `commands.run`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, command, seconds, **environment) -> Said:
        assert seconds > 0
        self.asked.append(tuple(map(str, command)))
        text = " ".join(map(str, command))
        if "racecheck" in text:
            return Said(9, RACES)
        if "compute-sanitizer" in text:
            return Said(0, SANITIZER)
        if "--query-metrics" in text:
            return Said(0, QUERY)
        if "ncu" in text:
            return Said(0, NCU)
        if "pytest" in text:
            return Said(1, PYTEST)
        return Said(1, SELFTEST)


def inside(part: Part, seconds: float):
    """Runs a part in this process."""
    folder = Path(os.environ["PART_FOLDER"])
    context = Context(CPU, seconds, folder / "part.json", rehearsal=True)
    try:
        part.run(context)
    except LeftOut as reason:
        context.save(left_out=str(reason))
        return LEFT_OUT, "", context.data
    return 0, "", json.loads((folder / "part.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a whole report, and what was asked of other programs."""
    folder, parts = tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("parts")
    programs = Programs()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PART_FOLDER", str(parts))
        patch.setattr(commands, "run", programs)
        patch.setattr(commands.shutil, "which", lambda name: f"/usr/bin/{name}")
        patch.setattr(commands.BACKENDS["cuda"], "why_not_here", lambda: None)
        Report(folder, PARTS, 240.0, inside, rehearsal=True).run()
    return folder, programs


@pytest.fixture
def content(whole) -> page.Report:
    return json.loads((whole[0] / "report.json").read_text())


def test_the_folder_holds_the_report_and_no_more_than_eight_files(whole) -> None:
    names = {p.name for p in whole[0].iterdir()}
    assert names == {
        "report.md", "report.json", "layers.png", "model.png", "whole.png", "log.txt"
    }  # fmt: skip
    assert all((whole[0] / n).stat().st_size > 10_000 for n in names if n.endswith(".png"))


def test_every_part_has_run(content) -> None:
    parts = content["parts"]
    assert list(parts) == [p.name for p in PARTS]
    assert {n: p["status"] for n, p in parts.items()} == {
        **dict.fromkeys(parts, "done"), "build": "left out"
    }  # fmt: skip
    assert parts["build"]["detail"] == "there is no GPU to build for"


def test_layers_hold_every_variant_size_and_pass(content) -> None:
    for name in ("layers Mistral-7B", "layers Llama-3.2-3B"):
        data = content["parts"][name]["data"]
        assert data["wrong"] == data["errors"] == data["notes"] == [] and data["left"] == 0
        results = data["results"]
        assert {r["variant"] for r in results} == set(data["variants"])
        assert {"base linear", "PEFT", "by hand", "alora cpu/delta"} == set(data["variants"])
        assert len(results) == 3 * 2 * 4  # sizes, passes, variants
        assert {r["over_base"] for r in results if r["variant"] == "base linear"} == {1.0}


def test_what_other_programs_say_is_read(content, whole) -> None:
    cuda = content["parts"]["self-test"]["data"]["backends"]["cuda"]
    assert (cuda["passed"], cuda["cases"], cuda["kernels"]) == (107, 108, 40)
    (group,) = content["parts"]["gpu-tests"]["data"]["groups"].values()
    assert group["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert group["failed"] == ["tests/cuda/test_device.py::test_a_graph[onepass - 1]"]
    tools = content["parts"]["sanitizers"]["data"]["tools"]
    assert list(tools) == list(commands.TOOLS)
    assert tools["memcheck"][0]["summary"] == ["0 errors"]
    assert tools["racecheck"][0]["summary"] == ["2 hazards displayed (2 errors, 0 warnings)"]
    kernels = content["parts"]["counters"]["data"]["kernels"]
    assert kernels == {
        "masked_lora_decode_bf16_kernel": {"us": 13.0, "bandwidth %": 82.0, "tensor %": 3.0},
        "masked_lora_fused_bf16_sm90nk_kernel": {
            "us": 512.0, "bandwidth %": 20.0, "tensor %": 88.25
        },
    }  # fmt: skip
    (asked,) = [a for a in whole[1].asked if "--csv" in a]
    metrics = asked[asked.index("--metrics") + 1]
    assert "sm__inst_executed_pipe_tensor.avg" in metrics and "lts__" not in metrics


def test_the_page_is_one_page_with_verdicts_first(content, whole) -> None:
    text = (whole[0] / "report.md").read_text()
    assert text == page.write(content)
    lines = text.splitlines()
    assert lines[0].startswith("# GPU report:") and len(lines) < 130
    assert "A rehearsal: sizes and times mean nothing." in text
    first = lines.index("| " + " | ".join(("", "verdict", "")) + " |")
    assert first < 8 < next(i for i, line in enumerate(lines) if line.startswith("## "))
    assert "| self-test cuda | **BAD** | 107 of 108 cases passed, 40 kernels |" in text
    assert "| racecheck | **BAD** | 5 of 5 sets of cases ended in time; bfloat16, two tiles" in text
    assert "| memcheck | ok |" in text
    assert "1 passed, 1 failed, 1 skipped: test_a_graph[onepass - 1]" in text
    assert "| training, cached | ok |" in text and "## Session" in text
    for heading in ("Layers", "Ceilings", "Training step", "What the GPU counts", "Parts"):
        assert f"## {heading}" in text


def test_training_and_session_hold_every_way(content) -> None:
    training = content["parts"]["training"]["data"]
    assert list(training["variants"]) == ["PEFT", "accelerated", "no_grad", "cached"]
    losses = [v["loss"] for v in training["variants"].values()]
    assert max(losses) - min(losses) < 1e-3 * losses[0] and training["errors"] == []
    rows = content["parts"]["session"]["data"]["rows"]
    assert {r["what"] for r in rows} == {"first token", "all answers"} and len(rows) == 7


# ---------------------------------------------------------------------- parts that break


def with_results(part: Part, seconds: float):
    return 0, "all went well", {"answer": 42}


def crashing(part: Part, seconds: float):
    if part.name == "b":
        return -11, "CUDA error: an illegal memory access", {"half": True}
    return with_results(part, seconds)


def parts(*names: str) -> list[Part]:
    return [Part(name, 10, lambda context: None) for name in names]


def test_a_part_that_crashes_leaves_what_it_had_and_the_next_goes_on(tmp_path) -> None:
    seen: list[list[str]] = []

    def looking(part: Part, seconds: float):
        file = tmp_path / "report.json"
        seen.append(list(json.loads(file.read_text())["parts"]) if file.exists() else [])
        return crashing(part, seconds)

    Report(tmp_path, parts("a", "b", "c"), 60, looking, rehearsal=True).run()
    assert seen == [[], ["a"], ["a", "b"]]  # written after each part
    content = json.loads((tmp_path / "report.json").read_text())
    assert [p["status"] for p in content["parts"].values()] == ["done", "failed", "done"]
    assert content["parts"]["b"]["data"] == {"half": True}
    assert "illegal memory access" in (tmp_path / "log.txt").read_text()
    assert (
        "| part b | **BAD** | failed: exit status -11: CUDA error: an illegal memory access |"
        in (tmp_path / "report.md").read_text()
    )


def test_time_that_a_part_leaves_goes_to_those_after_it(tmp_path) -> None:
    given: list[float] = []

    def run_part(part: Part, seconds: float):
        given.append(seconds)
        return with_results(part, seconds)

    Report(tmp_path, parts("a", "b", "c"), 90, run_part, rehearsal=True).run()
    assert given == pytest.approx([30, 45, 90], rel=0.2)
    given.clear()
    Report(tmp_path, parts("a", "b"), 0.1, run_part, rehearsal=True).run()
    assert given == [command.LEAST] * 2


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path) -> None:
    child = (  # that hears no abort
        "import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN); time.sleep(4)\n"
        f"open({str(tmp_path / 'alive')!r}, 'w')"
    )
    code = (
        "import subprocess, sys, time; print('begun', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    began = time.monotonic()
    said = commands.run([sys.executable, "-c", code], 2.0)
    assert said.status == commands.TIMED_OUT and said.tail[0] == "begun"
    assert "Fatal Python error: Aborted" in said.text  # and where it was
    assert time.monotonic() - began < 15
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


def test_counters_that_may_not_be_read_are_left_out(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(commands.shutil, "which", lambda name: name)
    monkeypatch.setattr(commands.BACKENDS["cuda"], "why_not_here", lambda: None)
    refused = Said(1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    monkeypatch.setattr(commands, "run", lambda *given, **environment: refused)
    with pytest.raises(LeftOut, match="ERR_NVGPUCTRPERM"):
        commands.counters(Context(CPU, 9.0, tmp_path / "x.json", rehearsal=True))


def test_without_a_gpu_it_says_what_to_do(tmp_path, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stop:
        run.main(["--mode", "gpu-report", "--out", str(tmp_path / "report")])
    assert stop.value.code == 2 and "--rehearsal shows the whole path" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_the_made_up_clock_runs_each_call_once() -> None:
    clock, calls = MadeUpClock(), []
    times = {clock.sample(lambda: calls.append(1), 50) for _ in range(7)}
    assert len(calls) == 7 and len(times) == 7 and all(1e-3 <= t < 1.1e-3 for t in times)


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(tmp_path, capsys) -> None:
    flags = ["--mode", "gpu-report", "--rehearsal", "--minutes", "4", "--out", str(tmp_path)]
    assert run.main([*flags, "--only", "environment,self-test,gpu-tests,tuning"]) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    statuses = {name: part["status"] for name, part in content["parts"].items()}
    assert statuses == dict.fromkeys(("environment", "self-test", "gpu-tests", "tuning"), "done")
    group = content["parts"]["gpu-tests"]["data"]["groups"]["files"]
    assert group["status"] == 0 and group["counts"]["passed"] >= 3
    assert content["parts"]["tuning"]["data"]["lines"]
    if not torch.cuda.is_available():
        assert content["parts"]["self-test"]["data"]["backends"]["cuda"]["not_tested"]
    assert "written:" in capsys.readouterr().out
