"""The serving benchmark: it refuses to time a wrong answer, and its ratios are its times'."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
FLAGS = ["--small", "--rounds", "1", "--adapters", "2", "--tokens", "2", "--device", "cpu"]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("serve")
    for name in ("serve", "machine"):
        sys.modules.pop(name, None)


def test_csv_and_plot(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "serve.csv", tmp_path / "serve.png"
    flags = ["--context", "20,40", "--csv", str(out), "--plot", str(plot), "--threads", "1"]
    assert serve.main([*FLAGS, *flags, "--clock", "cpu"]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7 and {row["context"] for row in rows} == {"20", "40"}
    for context in ("20", "40"):
        for what, first in (
            ("first token", "aLoRA on the base cache"),
            ("all answers", "aLoRA, one batch"),
        ):
            group = [r for r in rows if (r["context"], r["what"]) == (context, what)]
            own = next(float(r["median_s"]) for r in group if r["variant"] == first)
            for row in group:
                assert 0 < float(row["min_s"]) <= float(row["median_s"])
                assert float(row["ratio"]) == pytest.approx(float(row["median_s"]) / own)
    assert plot.stat().st_size > 10000
    assert "cpu time" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed(
    serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = serve.Session.ask

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        answers = ask(self, *args, **options)
        tokens = (answers[0].token_ids[0] ^ 1, *answers[0].token_ids[1:])
        return [dataclasses.replace(answers[0], token_ids=tokens), *answers[1:]]

    monkeypatch.setattr(serve.Session, "ask", wrong)
    assert serve.main([*FLAGS, "--context", "20"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "adapter a0: token 0 is" in printed and "nothing was timed" in printed


def test_flags_that_cannot_be_are_refused(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--rounds", "0"], ["--clock", "cpu", "--threads", "2"], ["--context", "1"]):
        with pytest.raises(SystemExit):
            serve.main([*FLAGS, *flags])
    assert "needs --threads 1" in capsys.readouterr().err
