"""Rows that pack several sequences."""

from __future__ import annotations

import itertools

import pytest
import torch

from .models import ASK, prompt, put, twins


def test_packed_rows_run_each_sequence_on_its_own():
    """Two sequences in a row, each with its invocation, equal the sequences alone."""
    model, _ = twins()
    one, two, three = prompt(1, 9), prompt(1, 12), prompt(1, 5)
    put(put(one, 0, 1, ASK), 0, 4, ASK)
    put(two, 0, 6, ASK)
    row = torch.cat([one, two, three], 1)
    position_ids = torch.cat([torch.arange(n) for n in (9, 12, 5)])[None]
    owner = model.__dict__["_alora_acceleration"]
    state = owner.forwards.state_of((), {"input_ids": row, "position_ids": position_ids})
    alone = [owner.forwards.state_of((), {"input_ids": s}) for s in (one, two, three)]
    expected = torch.cat([s.activations["ask"].mask for s in alone])
    assert torch.equal(state.activations["ask"].mask, expected)
    assert expected.sum() == 5 + 6
    borders = {"input_ids": row, "cu_seq_lens_q": torch.tensor([0, 9, 21, 26])}
    by_borders = owner.forwards.state_of((), borders)
    assert torch.equal(by_borders.activations["ask"].mask, expected)
    with torch.no_grad():
        got = model(input_ids=row, position_ids=position_ids, use_cache=False).logits
        logits = torch.cat([model(input_ids=s).logits for s in (one, two, three)], 1)
    torch.testing.assert_close(got, logits)


def test_an_invocation_across_a_border_does_not_count():
    model, _ = twins()
    row = put(prompt(1, 12), 0, 5, ASK)
    position_ids = torch.cat([torch.arange(6), torch.arange(6)])[None]
    owner = model.__dict__["_alora_acceleration"]
    state = owner.forwards.state_of((), {"input_ids": row, "position_ids": position_ids})
    assert not state.activations["ask"].mask.any()
    state = owner.forwards.state_of((), {"input_ids": row})
    assert state.activations["ask"].mask.sum() == 7


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_of_padding_are_no_border(side):
    model, stock = twins()
    real = put(prompt(1, 10), 0, 4, ASK)
    pad = torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([pad, real] if side == "left" else [real, pad], 1)
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    keywords = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        got, expected = model(**keywords).logits, stock(**keywords).logits
        torch.testing.assert_close(got[mask != 0], expected[mask != 0])
        alone = model(input_ids=real).logits[0]
    torch.testing.assert_close(got[mask != 0], alone, atol=1e-4, rtol=1e-4)


def test_random_packings():
    """The packed search against a loop over the sequences."""
    from alora_kernels.peft.starts import packed_mask

    for _ in range(50):
        length, tokens = int(torch.randint(1, 24, ())), [1, 2][: int(torch.randint(1, 3, ()))]
        ids = torch.randint(0, 3, (2, length))
        begin = torch.rand(2, length) < 0.25
        expected = torch.zeros(2, length, dtype=torch.bool)
        for b in range(2):
            edges = sorted({0, length, *begin[b].nonzero().flatten().tolist()})
            for lo, hi in itertools.pairwise(edges):
                own = ids[b, lo:hi].tolist()
                places = [i for i in range(len(own)) if own[i : i + len(tokens)] == tokens]
                if places:
                    expected[b, lo + places[-1] : hi] = True
        assert torch.equal(packed_mask(ids, tokens, begin), expected)
