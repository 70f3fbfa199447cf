"""Starts, labels and truncation of the data collator."""

from __future__ import annotations

import warnings

import pytest
import torch

from alora_kernels.training import AloraDataCollator

INV = [7, 8]
EOS = 2
PROMPT = [1, 11, 12, 13, *INV]
ANSWER = [21, 22, EOS]


def rows(batch):
    return [
        {k: v[b].tolist() if v.dim() > 1 else int(v[b]) for k, v in batch.items()}
        for b in range(len(batch["input_ids"]))
    ]


@pytest.mark.parametrize(
    "feature",
    [
        {"prompt_ids": PROMPT, "answer_ids": ANSWER},
        {"input_ids": PROMPT + ANSWER, "prompt_length": 6},
        {"input_ids": PROMPT + ANSWER, "invocation_start": 4},
        {"input_ids": torch.tensor(PROMPT + ANSWER)},
    ],
)
def test_start_and_loss(feature):
    """The loss begins after the invocation; EOS is in it even when padding is EOS too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = {"prompt_ids": [1, *range(30, 36), *INV], "answer_ids": ANSWER}
        batch = AloraDataCollator(INV, pad_token_id=EOS)([feature, long])
    row = rows(batch)[0]
    assert row["invocation_starts"] == 4
    assert row["input_ids"] == PROMPT + ANSWER + [EOS] * 3
    assert row["attention_mask"] == [1] * 9 + [0] * 3
    assert row["labels"] == [-100] * 6 + ANSWER + [-100] * 3
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_an_answer_with_the_invocation_does_not_move_the_start():
    feature = {"prompt_ids": PROMPT, "answer_ids": [21, *INV, EOS]}
    collate = AloraDataCollator(INV)
    with pytest.warns(UserWarning, match="answer of feature 0 contains the invocation"):
        row = rows(collate([feature]))[0]
    assert row["invocation_starts"] == 4
    assert row["labels"] == [-100] * 6 + [21, *INV, EOS]
    with pytest.warns(UserWarning, match="contains the invocation"):
        AloraDataCollator(INV)([{"input_ids": PROMPT + INV, "invocation_start": 4}])


def test_a_boundary_inside_of_the_invocation_finds_none():
    """An invocation that ends in the answer is not the prompt's."""
    with pytest.warns(UserWarning, match="no invocation"):
        row = rows(AloraDataCollator(INV)([{"input_ids": PROMPT + ANSWER, "prompt_length": 5}]))[0]
    assert row["invocation_starts"] == -1


def test_the_last_invocation_of_the_prompt_counts():
    row = rows(AloraDataCollator(INV)([{"prompt_ids": [*INV, 5, *INV], "answer_ids": [9]}]))[0]
    assert row["invocation_starts"] == 3


def test_truncation_takes_the_prompt_from_the_left():
    feature = {"prompt_ids": PROMPT, "answer_ids": ANSWER}
    row = rows(AloraDataCollator(INV, max_length=7)([feature]))[0]
    assert row["input_ids"] == [12, 13, *INV, *ANSWER]
    assert row["invocation_starts"] == 2
    assert row["labels"] == [-100] * 4 + ANSWER
    row = rows(AloraDataCollator(INV, max_length=7, keep_first=1)([feature]))[0]
    assert row["input_ids"] == [1, 13, *INV, *ANSWER]
    assert row["invocation_starts"] == 2


def test_truncation_never_takes_the_invocation():
    feature = {"prompt_ids": PROMPT, "answer_ids": [21, 22, 23, 24, EOS]}
    with pytest.warns(UserWarning, match="end of the answer is cut off"):
        row = rows(AloraDataCollator(INV, max_length=5)([feature]))[0]
    assert row["input_ids"] == [*INV, 21, 22, 23]
    assert row["invocation_starts"] == 0
    assert row["labels"] == [-100, -100, 21, 22, 23]


def test_given_labels_keep_their_mask():
    feature = {"input_ids": PROMPT + ANSWER, "labels": [5] * 6 + [21, -100, EOS]}
    assert rows(AloraDataCollator(INV)([feature]))[0]["labels"] == [-100] * 6 + [21, -100, EOS]


def test_padding_to_a_multiple():
    batch = AloraDataCollator(INV, pad_to_multiple_of=8)([{"input_ids": PROMPT + ANSWER}])
    assert batch["input_ids"].shape == (1, 16)
    assert batch["attention_mask"].sum() == 9


def test_errors():
    with pytest.raises(ValueError, match="invocation_tokens is empty"):
        AloraDataCollator([])
    with pytest.raises(ValueError, match="max_length=3 leaves no room"):
        AloraDataCollator(INV, max_length=3, keep_first=1)
    collate = AloraDataCollator(INV)
    with pytest.raises(ValueError, match=r"feature 0 has \['text'\]"):
        collate([{"text": "x"}])
    with pytest.raises(ValueError, match="feature 0 is empty"):
        collate([{"input_ids": []}])
    with pytest.raises(
        ValueError, match=r"invocation_start=1, but the tokens there are \[11, 12\]"
    ):
        collate([{"input_ids": PROMPT, "invocation_start": 1}])
    with pytest.raises(ValueError, match="6 tokens but 1 labels"):
        collate([{"input_ids": PROMPT, "labels": [1]}])
