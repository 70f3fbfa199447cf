"""The serving benchmark: it refuses to time a wrong answer, and its ratios are its times'."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("peft")

from bench.common.statistics import ratio_interval
from bench.models import serve
from bench.models import serve_report as report

FLAGS = ["--small", "--rounds", "1", "--adapters", "2", "--tokens", "2", "--device", "cpu"]


def test_csv_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "serve.csv", tmp_path / "serve.png"
    flags = ["--context", "20,40", "--csv", str(out), "--plot", str(plot), "--threads", "1"]
    flags += ["--rounds", "2", "--pairs", "5", "--clock", "cpu"]
    assert serve.main([*FLAGS, *flags]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7 and {row["context"] for row in rows} == {"20", "40"}
    rounds = {"aLoRA on the base cache": 6, "base forward of its tokens": 6, "plain LoRA": 2}
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
                long = what == "all answers" and row["variant"] != first
                assert int(row["rounds"]) == rounds.get(row["variant"], 1 if long else 2)
        ours, base = (r for r in rows if r["context"] == context and r["rounds"] == "6")
        over = float(ours["over_base"])
        assert over == pytest.approx(float(ours["median_s"]) / float(base["median_s"]))
        assert float(ours["over_base_low"]) <= over <= float(ours["over_base_high"])
        assert base["over_base"] == ""
    assert plot.stat().st_size > 10000
    assert "cpu time" in capsys.readouterr().out


def test_pairs_alternate_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = object.__new__(serve.Bench)
    order: list[str] = []
    bench.first_alora, bench.first_base = (lambda: order.append("a")), (lambda: order.append("b"))
    monkeypatch.setattr(bench, "_time", lambda call: call() or float(len(order)))
    ours: list[float] = []
    base: list[float] = []
    bench._pairs(3, ours, base)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert (ours, base) == ([3.0, 6.0, 7.0], [4.0, 5.0, 8.0])


def test_long_variants_run_in_the_middle_and_every_adapter_is_checked() -> None:
    assert [serve.spread(n, 3) for n in (1, 2, 3, 9)] == [{1}, {0, 2}, {0, 1, 2}, {0, 1, 2}]
    names = ["a", "b", "c", "d", "e"]
    assert [serve.share(names, i, 3) for i in range(3)] == [["a", "d"], ["b", "e"], ["c"]]
    assert serve.share(names, 0, 1) == names
    assert [serve.share(["a", "b"], i, 3) for i in range(3)] == [["a"], ["b"], ["a"]]


def test_the_tables_say_what_missed_its_target() -> None:
    def row(context: int, what: str, variant: str, ratio: float, *over: float) -> Any:
        return report.Row(context, what, variant, 3, ratio, ratio, ratio, *over)

    def printed(scale: float) -> str:
        rows = [
            row(c, "first token", report.OURS, 1.0, 1.1 * scale, 1.0, 1.3)
            if variant == report.OURS
            else row(c, what, variant, least / scale)
            for c in (1000, 2000)
            for what, variant, least in (
                ("first token", report.OURS, 1.0),
                ("first token", report.PLAIN, 32.0),
                ("all answers", report.PLAIN_ALONE, 10.0),
            )
        ]
        console = Console(file=io.StringIO(), width=150)
        report.print_rows(console, rows)
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert printed(1.0).count("≥") == 2 and "missed" not in printed(1.0)
    assert printed(1.1).count("missed") == 3


def test_an_interval_holds_what_it_is_of() -> None:
    pairs = [(1.1 + 0.01 * (i % 5), 1.0 + 0.01 * (i % 3)) for i in range(30)]
    low, high = ratio_interval(pairs, 0)
    ratio = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
    assert low <= ratio <= high and high - low < 0.03


def test_a_wrong_answer_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


def test_flags_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ["--rounds", "0"],
        ["--long-rounds", "0"],
        ["--pairs", "0"],
        ["--clock", "cpu", "--threads", "2"],
        ["--context", "1"],
    ):
        with pytest.raises(SystemExit):
            serve.main([*FLAGS, *flags])
    assert "needs --threads 1" in capsys.readouterr().err
