"""bench/common: what is said of noise, and plots on which everything can be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from matplotlib.figure import Figure
from matplotlib.text import Text

from bench.common import report
from bench.common.statistics import geometric_mean, ratio_spread, spread_of
from bench.layer import results
from bench.models import serve_report, train_report
from bench.vllm import report as vllm_report

# ---------------------------------------------------------------------- noise


def test_a_machine_that_slows_both_down_does_not_spread_their_ratio() -> None:
    quiet, loud = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]
    assert spread_of(quiet) == pytest.approx(1.5 / 2.5)
    assert ratio_spread(loud, quiet) == 0.0
    # Other rounds, other numbers: every one over every other.
    assert ratio_spread([2.0], [1.0, 2.0, 4.0]) == pytest.approx((1.5 - 0.75) / 1.0)
    assert ratio_spread([3.0], [1.0]) == 0.0
    assert geometric_mean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None


def warned(spreads: dict[str, float]) -> str:
    console = Console(file=io.StringIO(), width=150)
    report.warn_of_spread(console, spreads)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_noise_above_ten_percent_is_warned_of() -> None:
    assert warned({"a": 0.1, "b": 0.0}) == ""
    text = warned({"a": 0.11, "[b]": 0.42, "c": 0.02})
    assert text.startswith("warning: 2 of 3 ratios spread by more than 10%, most of all [b] (42%).")


def test_a_csv_file_holds_tables_one_after_the_other(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Line:
        name: str
        value: float | None

    report.write_csv(
        tmp_path / "a.csv", [Line("a", 0.1 + 0.2), Line("b", None)], [], [Line("c", 1)]
    )
    assert list(csv.reader((tmp_path / "a.csv").open())) == [
        ["name", "value"], ["a", "0.30000000000000004"], ["b", ""], ["name", "value"], ["c", "1"],
    ]  # fmt: skip


# ---------------------------------------------------------------------- plots

MACHINE = (
    "NVIDIA H100 80GB HBM3 | Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 208 cores, 16 "
    "threads | Python 3.11.7 | torch 2.13.0+cu130 | peft 0.21.2 | triton 3.9.0 | commit 0123abc "
    "with changes"
)
SERVED = (
    "Gemma 3 270M, float32, 5 adapters of rank 32 on q_proj,k_proj,v_proj, answers of 16 tokens"
)


def bars(layers: int, variants: int, launches: int) -> list[results.Result]:
    one = results.Result(
        model="Granite-3.3-8B", layer="", batch=8, seq_len=1024, in_features=1, out_features=1,
        rank=32, active="text", active_rows=9, direction="fwd", dtype="bf16",
        adapter_dtype="float32", variant="", adapter_precision="", launch="eager", rounds=5,
        median_us=1.0, spread=0.0, min_us=1.0, tokens_per_s=1.0, gflop_per_s=1.0, gbyte_per_s=1.0,
        over_base=1.0, peft_over=1.0,
    )  # fmt: skip
    return [
        replace(one, layer=f"gate,up{i}", variant=f"alora triton/onepass {j}", launch=launch,
                over_base=0.01 + 30.0 * j)
        for launch in ("eager", "graph")[:launches]
        for i in range(layers)
        for j in range(variants)
    ]  # fmt: skip


def draw_layer(path: Path, small: bool) -> None:
    results.write_plot(path, bars(1, 1, 1) if small else bars(16, 9, 2), MACHINE)


def draw_train(path: Path, small: bool) -> None:
    figures = [
        train_report.Figure(
            prompt=prompt, suffix=64, batch=2, rank=32, variant=variant, accelerated=False,
            seconds=seconds, fastest=seconds, cpu_seconds=seconds, speedup=9.9 / seconds,
            cpu_speedup=1.0, peak_mib=None if small else 1e5 / prompt, peak_ratio=None, loss=1.0,
            rounds=1, threads=1,
        )
        for prompt in ([8] if small else [256, 512, 1024, 2048])
        for variant, seconds in (("peft", 9.9), ("no_grad", 2.0), ("cached", 0.004))
    ]  # fmt: skip
    train_report.write_plot(path, figures, MACHINE)


def draw_serve(path: Path, small: bool) -> None:
    rows = [
        serve_report.Row(context, what, variant, 1, context * 1e-4 * (i + 1), 1.0, 1.0)
        for context in ([20] if small else [500, 1000, 2000])
        for what, variants in (
            (serve_report.FIRST, (serve_report.OURS, serve_report.BASE, serve_report.PLAIN)),
            (serve_report.ALL, tuple(serve_report.LINES)[3:]),
        )
        for i, variant in enumerate(variants)
    ]
    serve_report.write_plot(path, rows, SERVED, MACHINE)


def draw_vllm(path: Path, small: bool) -> None:
    rows = [
        vllm_report.Row(
            block_size=block, start=start, context=context, rounds=1, cached=1, hit_rate=1.0,
            first_alora=1e-5 if small else 0.1, first_plain=context / 300, total_alora=1.0,
            total_plain=1.0, base_turn=1.0, together_alora=None, together_plain=None,
        )
        for block in (128, 32)
        for context in ([128] if small else [1024, 2048, 4096])
        for start in vllm_report.STARTS
    ]  # fmt: skip
    vllm_report.write_plot(path, rows, SERVED, MACHINE)


def texts(figure: Figure) -> Iterator[Text]:
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text.get_window_extent().width:
            yield text


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("draw", [draw_layer, draw_train, draw_serve, draw_vllm])
def test_a_plot_can_be_read(
    draw: Any, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    real = Figure.savefig

    def save(figure: Figure, *arguments: Any, **options: Any) -> None:
        real(figure, *arguments, **options)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    draw(tmp_path / "plot.png", small)
    (figure,) = saved
    assert figure.get_figwidth() == report.WIDTH
    page = figure.bbox
    shown = list(texts(figure))
    for text in shown:
        box = text.get_window_extent()
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{text.get_text()!r} is clipped"
        assert text.get_fontsize() >= report.SMALLEST
    title, below = figure.get_suptitle(), figure.get_supxlabel()
    assert title and MACHINE in " ".join(below.split())
    # Neither the title nor what stands below lies on anything else.
    for name in (title, below):
        (own,) = (t for t in shown if t.get_text() == name)
        others = [t.get_window_extent() for t in shown if t is not own]
        assert not any(own.get_window_extent().overlaps(box) for box in others), name
    for axis in figure.findobj(lambda a: hasattr(a, "get_yticklabels")):
        labels = [t for t in axis.get_yticklabels() if t.get_text()]
        assert not axis.axison or len(labels) >= 2, "a scale without two numbers"
