"""bench/models/train.py: what it writes, and that it times nothing that is wrong."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import run
from bench.models import train


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))


def test_a_wrong_loss_or_gradient_is_not_timed():
    model = Model()
    models = dict.fromkeys(("peft", "no_grad"), model)

    def step(loss, gradient):
        def run():
            model.weight.grad = torch.full((4,), gradient)
            return torch.tensor(loss)

        return run

    good = train._check(models, {"peft": step(2.0, 1.0), "no_grad": step(2.0, 1.0)})
    assert good == {"peft": 2.0, "no_grad": 2.0}
    with pytest.raises(SystemExit, match="loss is off"):
        train._check(models, {"peft": step(2.0, 1.0), "no_grad": step(2.001, 1.0)})
    with pytest.raises(SystemExit, match="gradient of weight is off"):
        train._check(models, {"peft": step(2.0, 1.0), "no_grad": step(2.0, 1.01)})
    with pytest.raises(SystemExit, match="loss is off"):
        train._check(models, {"peft": step(2.0, 1.0), "no_grad": step(float("nan"), 1.0)})


@pytest.mark.slow
def test_writes_table_csv_and_plot(tmp_path):
    command = [
        sys.executable, run.__file__, "--mode", "train", "--layers", "2", "--rounds", "1",
        *("--prompt", "48,96", "--suffix", "16", "--batch", "1", "--threads", "1"),
        *("--csv", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "t.png")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "48+16" in done.stdout and "cached" in done.stdout
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [(r["prompt"], r["variant"]) for r in rows] == [
        (p, v) for p in ("48", "96") for v in ("peft", "no_grad", "cached")
    ]
    losses = {r["prompt"]: {round(float(q["loss"]), 4) for q in rows if q["prompt"] == r["prompt"]}
              for r in rows}  # fmt: skip
    assert all(len(values) == 1 for values in losses.values())
    assert all(float(r["peak_mib"]) > 0 and float(r["seconds"]) > 0 for r in rows)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
