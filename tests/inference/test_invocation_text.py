"""The tokens of an invocation are those that prompts have."""

from __future__ import annotations

import warnings

import pytest
from peft import LoraConfig, get_peft_model

from alora_kernels.inference import Session
from alora_kernels.invocation import encode_invocation

from .tiny import base_model
from .tokenizers_of_kinds import KINDS, tokenizer_of

PROMPTS = ("User: why?", "a long text.", "line\n", "12", "hello ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the dog", "<turn>fox", "User:"])
def test_it_stands_in_every_prompt(kind: str, text: str) -> None:
    """As returned, or refused by name where this tokenizer gives it no tokens of its own."""
    tokenizer = tokenizer_of(kind)
    try:
        tokens = encode_invocation(tokenizer, text)
    except ValueError as error:
        assert kind == "words" and "has no tokens of its own" in str(error)
        return
    assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")
    for prompt in PROMPTS:
        assert tokenizer(f"{prompt}\n{text}")["input_ids"][-len(tokens) :] == tokens


def test_alone_it_has_others() -> None:
    """Why `encode` does not serve: a word alone begins with a space in such a tokenizer."""
    tokenizer = tokenizer_of("metaspace always")
    alone = tokenizer.encode("the dog", add_special_tokens=False)
    assert encode_invocation(tokenizer, "the dog") != alone


def test_what_has_no_tokens_of_its_own_is_refused() -> None:
    tokenizer = tokenizer_of("bytes")
    with pytest.raises(ValueError, match="has no text to find an adapter by"):
        encode_invocation(tokenizer, "\n")
    with pytest.raises(ValueError, match="has no tokens of its own in this tokenizer"):
        encode_invocation(tokenizer, "ow", before="l")


def test_a_prompt_that_spells_an_invocation_in_other_tokens_is_told() -> None:
    tokenizer = tokenizer_of("metaspace always")
    tokens = tokenizer.encode("dog", add_special_tokens=False)  # begins with a space
    model = base_model("llama", 2, vocab_size=420)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, alora_invocation_tokens=tokens)
    session = Session(get_peft_model(model, config).eval(), tokenizer).extend("the fox")
    with pytest.warns(UserWarning, match="contains 'dog', but in other tokens than the invocation"):
        answer = session.generate("default", "\ndog", max_new_tokens=1)
    assert list(answer.invocation[-len(tokens) :]) == tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        session.generate("default", " dog", max_new_tokens=1)
