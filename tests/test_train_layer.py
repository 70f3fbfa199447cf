"""examples/train_layer.py learns its task."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_layer.py"


def test_the_example_learns_and_leaves_the_prefix_alone(capsys):
    spec = importlib.util.spec_from_file_location("train_layer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, last = module.main(steps=100)
    assert first > 1.0
    assert last < first / 100
    assert "equal the base layer bit for bit: True" in capsys.readouterr().out
