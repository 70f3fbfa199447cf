"""The CPU's drop masks: both ways to draw them are the reference's keep mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_kernels.backends import philox
from alora_kernels.reference import keep_mask

WAYS = ["int64"] if philox._cpu is None else ["compiled", "int64"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    if request.param == "int64":
        monkeypatch.setattr(philox, "_cpu", None)
    return request.param


def drops(seed: int, p: float, num_columns: int, rows: torch.Tensor) -> torch.Tensor:
    mask = philox.DropMask(seed, p, num_columns)
    mask.rows_per_chunk = min(mask.rows_per_chunk, 3)
    pieces, expected_begin = [], 0
    for begin, end, drop in mask.chunks(rows):
        assert begin == expected_begin and drop.shape == (end - begin, num_columns)
        pieces.append(drop.clone())
        expected_begin = end
    assert expected_begin == len(rows)
    return torch.cat(pieces)


@pytest.mark.parametrize("num_columns", [1, 3, 4, 37, 1024, 1027])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_masks_are_the_references(way, num_columns, p) -> None:
    seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
    keep = keep_mask(torch.tensor([seed]), p, 20, num_columns)
    rows = torch.randperm(20)[:11].sort().values
    assert torch.equal(drops(seed, p, num_columns, rows), ~keep[rows]), seed
    assert torch.equal(drops(seed, p, num_columns, torch.arange(20)[::2]), ~keep[::2]), seed


@pytest.mark.skipif(philox._cpu is None, reason="alora_kernels._cpu was not built here")
@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 20), st.integers(1, 600))
def test_compiled_and_int64_words_agree(seed, first_row, num_columns) -> None:
    rows = torch.arange(first_row, first_row + 5)
    compiled = drops(seed, 0.3, num_columns, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "_cpu", None)
        assert torch.equal(compiled, drops(seed, 0.3, num_columns, rows))
