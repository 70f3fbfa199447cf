"""Where an adapter begins in a row."""

from __future__ import annotations

import pytest
import torch

from .models import twins


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ([20, 5, 6, 7, 30, 31], 1),
        ([5, 6, 7, 30, 5, 6, 7], 4),  # the last one
        ([20, 21, 5, 6], None),  # cut off
        ([5, 6, 7], 0),  # nothing else
        ([5, 6, 5, 6, 7, 5, 6], 2),  # overlapping beginnings
        ([0, 0, 0, 0, 0], None),  # padding only
        ([0, 0, 5, 6, 7, 20], 2),  # left padding
        ([20, 5, 6, 7, 0, 0], 1),  # right padding
        ([5, 20, 6, 7], None),  # not in one piece
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_where_a_row_begins(row, start, masked):
    model, stock = twins()
    ids = torch.tensor([row])
    keywords = {"attention_mask": (ids != 0).long()} if masked and any(row) else {}
    owner = model.__dict__["_alora_acceleration"]
    mask = owner.state_of((), {"input_ids": ids, **keywords}).activations["ask"].mask
    expected = torch.arange(len(row)) >= (len(row) if start is None else start)
    assert torch.equal(mask, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, **keywords).logits, stock(input_ids=ids, **keywords).logits
        )


def test_token_ids_are_matched_not_text():
    """The same text in other tokens is no invocation: only the ids count."""
    model, _ = twins()
    owner = model.__dict__["_alora_acceleration"]
    merged = torch.tensor([[20, 40, 41]])  # ids that a tokenizer may give the same letters
    assert not owner.state_of((), {"input_ids": merged}).activations["ask"].mask.any()
