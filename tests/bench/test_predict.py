"""bench/layer/predict.py: the estimates that docs/kernels.md shows are what the cost model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_kernels.dispatch import cost
from alora_kernels.hardware import GPUS
from bench.layer import predict

ROOT = Path(__file__).parents[2]


def test_the_guide_shows_the_commands_output(capsys) -> None:
    assert predict.main([]) == 0
    output = capsys.readouterr().out
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    section = page[page.index("## Predicted times (estimate)") :]
    assert output in section, "python bench/run.py --mode predict prints something else: paste it"
    assert output.startswith("ESTIMATE, not measured")
    assert f"{cost.VENDOR_EFFICIENCY:g} of the data sheet" in output


def test_a_cell_is_the_least_of_all_ways() -> None:
    regime = predict.Regime(8192, 1.0, False)
    ratio, names = predict.cell(regime, "H100", 4096, 4096, 32, 0.85)
    (problem,) = predict.problems(regime, 90, 4096, 4096, 32)
    ways = list(predict.ways(problem, GPUS["H100"], 0.85))
    assert len(ways) == 6 and (min(ways)[0], [min(ways)[1]]) == (
        pytest.approx(ratio * cost.base_seconds(problem, GPUS["H100"])),
        names,
    )


def test_a_better_gemm_never_costs_more_and_nothing_costs_less_than_the_base() -> None:
    for regime in predict.REGIMES:
        for gpu in predict.ARCHS:
            ratios = [predict.cell(regime, gpu, 4096, 4096, 32, e)[0] for e in (0.7, 0.85, 1.0)]
            assert ratios == sorted(ratios, reverse=True) and ratios[-1] > 1, (regime, gpu)


@pytest.mark.parametrize("arguments", [["--k", "0"], ["--efficiency", "0"]])
def test_wrong_flags_are_refused(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        predict.main(arguments)
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err
