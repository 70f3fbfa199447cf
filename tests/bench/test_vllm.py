"""The benchmark runs, counts what it should, and says what it measured."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from bench import run
from bench.common.statistics import ratio_interval
from bench.vllm import serving as bench

STAND_IN = Path(__file__).with_name("engine_stand_in")


def row(**changes: object) -> bench.Row:
    values = {
        "block_size": 32, "start": "aligned", "context": 64, "rounds": 1, "cached": 64,
        "hit_rate": 0.9, "first_alora": 0.1, "first_plain": 2.0, "total_alora": 0.5,
        "total_plain": 3.0, "base_turn": 1.0, "together_alora": 1.0, "together_plain": 9.0,
    }  # fmt: skip
    return bench.Row(**{**values, **changes})


def test_ratios_are_plain_over_alora() -> None:
    one = row()
    assert (one.first_ratio, one.total_ratio, one.together_ratio) == (20.0, 6.0, 9.0)
    assert one.pipeline_ratio == 10.0 / 2.0
    assert row(together_plain=None).pipeline_ratio is None


def test_the_interval_holds_the_ratio_and_shrinks_with_the_spread() -> None:
    quiet = [(1.0 + 0.001 * i, 1.0 - 0.001 * i) for i in range(20)]
    noisy = [(1.0 + 0.05 * (i % 7), 1.0 + 0.05 * (i % 5)) for i in range(20)]
    low, high = ratio_interval(quiet, 0)
    assert low <= 1.019 and high >= 1.019 and low > 1.0
    wide = ratio_interval(noisy, 0)
    assert wide[1] - wide[0] > high - low


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--requests", "5"], "at least 20"),
        (["--context", "100"], "multiples of every block size"),
        (["--cores", "9999"], "this machine has"),
        (["--rounds", "0"], "--rounds: expected a whole number above 0"),
        (["--engine-python", "no-python"], "no vLLM in the environment of no-python"),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_stand_in(tmp_path: Path) -> None:
    """The whole mode where there is no vLLM: two processes, tables, csv and plot."""
    pytest.importorskip("transformers")
    path = [str(STAND_IN), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [
            sys.executable, run.__file__, "--mode", "vllm", "--small", "--context", "128,256",
            "--block-size", "64,32", "--adapters", "2", "--tokens", "4", "--rounds", "2",
            "--requests", "20", "--op-rows", "0", "--csv", str(tmp_path / "out.csv"),
            "--plot", str(tmp_path / "out.png"),
        ],
        text=True, capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "vLLM 0.0" in result.stdout and "base requests, 20 to each engine" in result.stdout
    lines = list(csv.reader((tmp_path / "out.csv").open()))
    runs = [dict(zip(lines[0], line)) for line in lines[1:9]]
    assert [(r["block_size"], r["start"], r["context"], r["cached"]) for r in runs] == [
        (str(block), start, str(context), str(context - (block if start == "worst" else 0)))
        for block in (64, 32)
        for context in (128, 256)
        for start in ("aligned", "worst")
    ]
    assert [bool(r["together_alora"]) for r in runs] == [True] * 4 + [False] * 4
    assert lines[9][:2] == ["requests", "with_plugin"] and lines[10][0] == "20"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.vllm
def test_a_small_run(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    core = str(min(os.sched_getaffinity(0)))
    result = subprocess.run(
        [
            sys.executable, run.__file__, "--mode", "vllm", "--small", "--context", "128",
            "--block-size", "32", "--adapters", "2", "--tokens", "4", "--rounds", "1",
            "--requests", "0", "--op-rows", "48", "--cores", core, "--clock", "cpu",
            "--csv", str(tmp_path / "out.csv"),
        ],
        text=True, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"1 threads bound to cores [{core}]" in result.stdout
    lines = list(csv.reader((tmp_path / "out.csv").open()))
    head = lines[0]
    runs = [dict(zip(head, line)) for line in lines[1:3]]
    # 128 tokens before an aligned start; one less, and the last block is computed again.
    assert [(r["start"], int(r["cached"])) for r in runs] == [("aligned", 128), ("worst", 96)]
    assert float(runs[0]["hit_rate"]) == pytest.approx(128 / (128 + bench.INVOCATION_LENGTH))
    assert all(float(r[name]) > 0 for r in runs for name in ("first_alora", "together_plain"))
    assert lines[3][0] == "layer"
    assert [line[0] for line in lines[4:]] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
