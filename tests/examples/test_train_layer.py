"""examples/train_layer.py learns its task."""

from __future__ import annotations

import train_layer


def test_the_example_learns_and_leaves_the_prefix_alone(capsys):
    first, last = train_layer.main(steps=100)
    assert first > 1.0
    assert last < first / 100
    assert "equal the base layer bit for bit: True" in capsys.readouterr().out
