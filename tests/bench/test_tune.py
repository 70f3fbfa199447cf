"""Tuning: what is measured goes to a file, and dispatch prefers it to the cost model."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from alora_kernels import dispatch, files
from alora_kernels.contract import Problem
from alora_kernels.dispatch import measured
from alora_kernels.dispatch.measured import Measurement
from alora_kernels.run import forget

pytest.importorskip("peft")

from bench import run
from bench.common import clocks
from bench.common.statistics import Timing
from bench.layer import cases, tune, variants

ARCH = 90
GPU = "Imaginary H100"


class Willing:
    """A backend that runs everything on a GPU."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not_here(self):
        return None

    def why_not(self, problem, strategy):
        return None if problem.device == "cuda" else "the tensors are not on a GPU"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Two backends, one GPU, and a file of its own."""
    table = {name: Willing(name) for name in ("cuda", "triton")}
    table["reference"] = dispatch.BACKENDS["reference"]
    monkeypatch.setenv(measured.VARIABLE, str(tmp_path / "folder" / "tuning.json"))
    forget()
    monkeypatch.setattr(measured, "key_here", Key(measured.key_of(GPU)))
    with mock.patch.dict(dispatch.BACKENDS, table, clear=True):
        yield
    monkeypatch.undo()
    forget()


class Key:
    """Stands for `measured.key_here`, which asks torch for the GPU."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    def __call__(self, arch: int) -> str | None:
        assert arch == ARCH
        return self.key

    def cache_clear(self) -> None:
        pass


def problem(**changes) -> Problem:
    fields = {
        "rows": 8192, "in_features": 4096, "out_features": (4096,), "ranks": (16,),
        "active": 819, "dtype": torch.bfloat16, "adapter_dtype": torch.float32,
        "device": "cuda", "arch": ARCH,
    }  # fmt: skip
    return Problem(**{**fields, **changes})


def picked(**changes) -> tuple[str, str]:
    backend, strategy = dispatch.choose(problem(**changes), "auto", "auto")
    return backend.name, strategy


def small_grid() -> list[cases.Case]:
    rows = ((16, 1.0), (8192, 0.1))
    return tune.grid(torch.device("cpu"), ((4096, 4096),), rows, (16,))


def run_it(
    factors: dict[tuple[str, str], float], spread: float = 0.0
) -> tuple[str, list[tune.Line]]:
    """Tune with a measurer that finds each pair `factor` times as slow as the model expects."""

    def fake(case, given):
        timings = {}
        for v in given:
            pair = (v.backend, v.strategy)
            seconds = factors.get(pair, 1.0) * tune.expected(case, pair, ARCH)
            timings[v.name] = Timing(seconds, spread, seconds, 5)
        return timings

    text = io.StringIO()
    lines = tune.run_tune(
        Console(file=text, width=160), small_grid(), fake, arch=ARCH,
        device_name=GPU, progress=Progress(disable=True),
    )  # fmt: skip
    return text.getvalue(), lines


# ---------------------------------------------------------------------- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--tune"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--tune needs a GPU" in message and "Run it on that machine" in message
    assert not measured.path().exists()


def test_measured_times_overrule_the_model() -> None:
    before = {rows: picked(rows=rows, active=active) for rows, active in ((8192, 819), (16, 16))}
    assert before[8192] == ("cuda", "delta")
    run_it({("triton", "tail"): 0.5})
    assert picked() == ("triton", "tail")
    assert picked(rows=16, active=16) == ("triton", "tail")
    assert picked(backward=True) == ("triton", "tail")
    run_it({("triton", "tail"): 3.0})  # measured anew: written over
    assert picked() == before[8192]


def test_the_file_holds_what_was_measured() -> None:
    _, lines = run_it({("cuda", "tail"): 0.5})
    content = json.loads(measured.path().read_text())
    assert content["format"] == measured.FORMAT and list(content["gpus"]) == [measured.key_of(GPU)]
    entries = content["gpus"][measured.key_of(GPU)]
    assert len(entries) == sum(len(line.measured) for line in lines) == 3 * 2 * 3
    (entry,) = [
        e
        for e in entries
        if (e["backend"], e["strategy"], e["rows"], e["backward"]) == ("cuda", "tail", 8192, True)
    ]
    assert entry["seconds"] == pytest.approx(0.5 * entry["model_seconds"])
    assert (entry["active"], entry["rank"], entry["dtype"]) == (819, 16, "bfloat16")
    assert [p.name for p in measured.path().parent.iterdir()] == ["tuning.json"]  # no leftovers


def test_other_gpus_and_versions_are_kept_and_not_used(monkeypatch) -> None:
    run_it({("cuda", "tail"): 0.5})
    other = {"Other GPU": measured.read(measured.path())[measured.key_of(GPU)]}
    measured.write(measured.path(), "Other GPU", other["Other GPU"])
    assert set(measured.read(measured.path())) == {measured.key_of(GPU), "Other GPU"}
    for key in ("Imaginary H100 | alora_kernels 0.0.9 | torch 1.0", None):
        monkeypatch.setattr(measured, "key_here", Key(key))
        forget()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert picked() == ("cuda", "delta")


def test_a_failed_write_leaves_the_old_file(monkeypatch) -> None:
    run_it({("cuda", "tail"): 0.5})
    before = measured.path().read_text()

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        run_it({})
    assert measured.path().read_text() == before
    assert [p.name for p in measured.path().parent.iterdir()] == ["tuning.json"]


GOOD = {
    "backend": "cuda", "strategy": "tail", "rows": 1, "in_features": 1, "out_features": 1,
    "rank": 1, "active": 1, "dtype": "bfloat16", "backward": False, "seconds": 1.0,
    "model_seconds": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '{"other": 1}', '{"format": 99, "gpus": {}}', '{"format": 1}',
        '{"format": 1, "gpus": []}', '{"format": 1, "gpus": {"a": [1]}}',
        *[
            json.dumps({"format": 1, "gpus": {"a": [{**GOOD, name: value}]}})
            for name, value in (
                ("seconds", -1.0), ("seconds", "fast"), ("model_seconds", 0.0), ("rows", -1),
                ("strategy", "magic"), ("backward", 2), ("unknown", 1), ("rank", None),
            )
        ],
        '{"format": 1, "gpus": {"a": [{"seconds": NaN}]}}',
    ],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(content: str) -> None:
    measured.path().parent.mkdir()
    measured.path().write_text(content)
    with pytest.warns(UserWarning, match="is ignored, it holds no tuning of this package") as told:
        assert picked() == ("cuda", "delta")
        assert picked(rows=4096) == ("cuda", "delta")
    assert len(told) == 1
    run_it({("cuda", "tail"): 0.5})  # and it is written anew, without a word
    assert picked() == ("cuda", "tail")


# ---------------------------------------------------------------------- the correction


def entry(rows: int, seconds: float, **changes) -> Measurement:
    fields = {**GOOD, "rows": rows, "active": rows, "in_features": 4096, "out_features": 4096,
              "rank": 16, "seconds": seconds, **changes}  # fmt: skip
    return Measurement(**fields)


def test_the_nearest_problem_of_the_pair_corrects() -> None:
    entries = [
        entry(16, 2.0), entry(8192, 3.0), entry(8192, 9.0, backward=True),
        entry(8192, 7.0, dtype="float16"), entry(16, 5.0, strategy="delta"),
    ]  # fmt: skip
    measured.write(measured.path(), measured.key_of(GPU), entries)

    def of(strategy: str, **changes) -> float:
        return measured.correction(problem(**changes), "cuda", strategy)

    assert of("tail", rows=32, active=32) == 2.0
    assert of("tail", rows=4096, active=4096) == 3.0
    assert of("tail", rows=32, active=32, backward=True) == 9.0
    assert of("tail", rows=32, active=32, dtype=torch.float16) == 7.0
    assert of("delta", rows=8192, active=8192) == 5.0
    # Not measured: the geometric mean of what was, in this pass and dtype.
    assert of("onepass") == pytest.approx((2.0 * 3.0 * 5.0) ** (1 / 3))
    assert of("onepass", dtype=torch.float32) == 1.0


def test_the_path_is_in_the_users_cache(monkeypatch) -> None:
    monkeypatch.delenv(measured.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert measured.path() == Path("/somewhere/alora_kernels/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert measured.path() == Path.home() / ".cache/alora_kernels/tuning.json"


def test_the_key_is_the_one_gpu_of_the_arch(monkeypatch) -> None:
    from alora_kernels import __version__

    monkeypatch.undo()
    names = ["H100", "H100", "RTX 5090", "RTX 5080"]
    archs = [(9, 0), (9, 0), (12, 0), (12, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: archs[i])
    measured.key_here.cache_clear()
    assert (
        measured.key_here(90) == f"H100 | alora_kernels {__version__} | torch {torch.__version__}"
    )
    assert measured.key_here(120) is None and measured.key_here(80) is None


# ---------------------------------------------------------------------- the table


def test_the_table_shows_where_the_model_was_wrong() -> None:
    text, lines = run_it({("cuda", "tail"): 0.5})
    rows = [line for line in text.splitlines() if line.startswith("│")]
    wrong = [line for line in lines if line.picked != line.fastest]
    assert len(rows) == len(wrong) == 3
    for row, line in zip(rows, wrong):
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[:6] == [
            str(line.case.rows.num_rows), "4096", "4096", "16", str(line.case.rows.num_active),
            line.case.pass_name,
        ]  # fmt: skip
        assert cells[6] == "cuda/tail" and cells[8] == "/".join(line.picked)
        assert float(cells[7]) == pytest.approx(
            line.measured["cuda", "tail"].median * 1e6, abs=0.06
        )
        assert float(cells[10].rstrip("%")) == pytest.approx(100 * (line.loss - 1), abs=0.06)
        assert line.loss > 1
    assert "The model's pick was the fastest in 0 of 3 cases." in text
    assert "cuda/tail: 0.50 × the model's time" in text
    assert str(measured.path()) in text.replace("\n", "")


def test_a_noisy_measurement_is_warned_of() -> None:
    text, _ = run_it({}, spread=0.3)
    assert "warning: 18 of 18 ratios spread by more than 10%" in text and "(30%)" in text
    assert "warning" not in run_it({}, spread=0.05)[0]


def test_a_model_that_is_right_has_no_table() -> None:
    text, lines = run_it({})
    assert "slower strategy" not in text
    assert f"The model's pick was the fastest in {len(lines)} of {len(lines)} cases." in text


# ---------------------------------------------------------------------- the measurer


class Refusing(clocks.CpuClock):
    def prepare(self, call):
        raise clocks.CannotCapture("a synchronisation")


@pytest.mark.parametrize("backward", [False, True])
@mock.patch.dict(dispatch.BACKENDS, dict(dispatch.BACKENDS), clear=True)
def test_the_measurer_checks_and_times_with_the_benchmarks_code(monkeypatch, backward) -> None:
    monkeypatch.undo()
    (case,) = cases.layer_cases(
        [("tune", "24x32", 24, 32)], [cases.rows_from_fraction(1, 16, 0.5)], rank=4,
        dtypes=[torch.float32], adapter_dtype=torch.float32,
    )  # fmt: skip
    case = case.but(backward=backward)
    ours = variants.Package("cpu", "delta")
    times = tune.measurer([Refusing(), clocks.CpuClock()], 0.01, 3)(case, [ours])
    assert list(times) == [ours.name] and 0 < times[ours.name].median < 1

    class Wrong(variants.Package):
        def build(self, case, tensors):
            step = super().build(case, tensors)
            return lambda: {name: t + 1 for name, t in step().items()}

    with pytest.raises(tune.TuningError, match="is wrong"):
        tune.measurer([clocks.CpuClock()], 0.01, 3)(case, [Wrong("cpu", "delta")])


def test_nothing_to_run_is_an_error() -> None:
    alone = mock.patch.dict(
        dispatch.BACKENDS, {"reference": dispatch.BACKENDS["reference"]}, clear=True
    )
    with alone, pytest.raises(tune.TuningError, match="no backend can run here"):
        run_it({})
    assert not measured.path().exists()
