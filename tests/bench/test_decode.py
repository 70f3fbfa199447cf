"""bench/models/decode.py: four models, one token; what is printed follows from what was timed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import run

FLAGS = ["--layers", "1", "--hidden", "16", "--rank", "2", "--seconds", "0.01"]


def test_the_table_and_the_csv_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.csv"
    assert run.main(["--mode", "decode", *FLAGS, "--csv", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [r["model"] for r in rows] == ["base", "PEFT LoRA", "PEFT aLoRA", "alora_kernels"]
    assert {(r["layers"], r["hidden"], r["rank"]) for r in rows} == {("1", "16", "2")}
    assert all(int(r["samples"]) >= 5 for r in rows)
    times = {r["model"]: float(r["seconds_per_token"]) for r in rows}
    printed = capsys.readouterr().out
    for other in ("base", "PEFT LoRA"):
        assert f"alora_kernels / {other}: {times['alora_kernels'] / times[other]:.2f}, " in printed
