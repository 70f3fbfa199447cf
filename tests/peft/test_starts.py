"""Where an adapter begins in a row."""

from __future__ import annotations

import warnings

import pytest
import torch

from alora_kernels.peft import adapter_scope

from .models import ASK, cache_of, cached, prompt, put, twins
from .test_generation import generate


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
    mask = owner.forwards.state_of((), {"input_ids": ids, **keywords}).activations["ask"].mask
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
    assert not owner.forwards.state_of((), {"input_ids": merged}).activations["ask"].mask.any()


@pytest.mark.parametrize("how", ["forward", "generate", "packed", "mixed"])
def test_a_prompt_without_the_invocation_is_said_once(how):
    model, _ = twins()
    ids = put(prompt(2, 12), 0, 3, ASK)

    def run():
        with torch.no_grad():
            if how == "generate":
                return generate(model, ids, max_new_tokens=1)
            extra = {"position_ids": torch.arange(12).expand(2, -1) % 7} if how == "packed" else {}
            extra = {"adapter_names": ["ask", "ask"]} if how == "mixed" else extra
            return model(input_ids=ids, use_cache=False, **extra)

    with pytest.warns(UserWarning, match=r"'ask': row 1 .* invocation, the token ids \[5, 6, 7\]"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run()


def test_the_base_model_on_purpose_is_not_warned_of():
    model, _ = twins()
    ids = put(prompt(2, 12), 0, 3, ASK)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        with adapter_scope(model, None):
            model(input_ids=ids)
            generate(model, ids, max_new_tokens=1)
        with model.disable_adapter():
            model(input_ids=ids)
        model(input_ids=ids, adapter_names=["ask", "__base__"])
        generate(model, ids, max_new_tokens=2, adapter_names=["ask", "__base__"])
        model(input_ids=ids, alora_offsets=[5, None])
        with adapter_scope(model, "ask", starts=[3, None]):
            generate(model, ids, max_new_tokens=2)
        cache = cache_of(model(input_ids=ids[:1], use_cache=True))
        model(input_ids=prompt(1, 2), **cached(model, cache))
