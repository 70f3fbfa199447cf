"""bench/layer/host.py: the host's part of a call is measured with launches stubbed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import alora_kernels
from alora_kernels import dispatch

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import run
from bench.layer import host


def test_the_command_prints_a_line_for_each_call(capsys) -> None:
    backend, built = dispatch.BACKENDS["cuda"], importlib.util.find_spec("alora_kernels._cuda")
    assert run.main(["--mode", "host", "--rounds", "2", "--calls", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert [tuple(c[:4]) for c in cells] == [
        (c.backend, c.strategy, str(c.rows), c.direction) for c in host.cells(host.BACKENDS)
    ]
    for c in cells:
        launches, median, least = int(c[4]), float(c[5]), float(c[6])
        assert (launches > 0) == (c[0] == "cuda") and median >= least > 0
        assert float(c[9]) == pytest.approx(median - float(c[8]), abs=0.11)
    # What was stubbed is as it was.
    assert dispatch.BACKENDS["cuda"] is backend
    if built is None:
        assert not hasattr(alora_kernels, "_cuda") and "alora_kernels._cuda" not in sys.modules


@pytest.mark.parametrize("cell", list(host.cells(["cuda"])), ids=str)
def test_every_launch_of_a_call_is_counted_and_nothing_is_planned_anew(cell, monkeypatch) -> None:
    with host.stubbed() as stub:
        backend = dispatch.BACKENDS["cuda"]
        made, real = [], backend._make_ready
        monkeypatch.setattr(backend, "_make_ready", lambda p: made.append(p) or real(p))
        cost = host.measure(cell, rounds=2, calls=1, stub=stub)
        passes = 2 if cell.direction == "forward + backward" else 1
        assert len(made) == passes
        both = cell.direction == "forward + backward"
        assert cost.launches == sum(len(program.launches) for program in made)
        assert cost.launches >= (6 if both else 2 if cell.strategy == "delta" else 1)
        assert cost.beyond == pytest.approx((cost.call.median - cost.outputs.median) * 1e6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "rocm"], "unknown name 'rocm'; the names are cuda, cpu"),
        (["--rounds", "1"], "--rounds: expected a whole number above 1"),
    ],
)
def test_wrong_flags_are_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        host.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
