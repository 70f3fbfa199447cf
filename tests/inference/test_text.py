"""Text given in pieces has the tokens of the whole, for every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from alora_kernels.inference import Session

from .tiny import base_model, peft_model
from .tokenizers_of_kinds import KINDS, tokenizer_of

TEXT = "The quick brown fox. User: who is there?\n\nAnswer: hello world, the dog"


@pytest.fixture(scope="module")
def model() -> Any:
    return base_model("llama", 1, vocab_size=420)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def prompt_of(session: Session, text: str) -> list[int]:
    """The tokens that a call puts behind the context for its prompt."""
    return session._plan(session._state, None, text).added


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_two_pieces_is_the_text(model: Any, kind: str) -> None:
    """Cut anywhere: equal, or refused where tokens would change that have been read."""
    tokenizer = tokenizer_of(kind)
    whole = ids_of(tokenizer, TEXT)
    refused = 0
    for cut in range(1, len(TEXT)):
        session = Session(model, tokenizer).extend(TEXT[:cut])
        read = list(session.token_ids[: session.cached_length])
        if whole[: len(read)] == read:
            assert list(session.extend(TEXT[cut:]).token_ids) == whole, TEXT[:cut]
            assert session.cached_length == len(whole) - 1
        else:
            refused += 1
            with pytest.raises(ValueError, match="does not go on at a border between tokens"):
                session.extend(TEXT[cut:])
            assert session.token_ids == tuple(ids_of(tokenizer, TEXT[:cut]))
    assert refused < len(TEXT) // 2
    if kind in ("bytes", "gemma"):
        assert refused > 3  # the sentence above could not be tested otherwise


@pytest.mark.parametrize("kind", KINDS)
def test_words_one_by_one_are_the_text(model: Any, kind: str) -> None:
    """A space at the end of a piece is held back, so that it may join the word behind it."""
    tokenizer = tokenizer_of(kind)
    whole = ids_of(tokenizer, TEXT)
    before, after = Session(model, tokenizer), Session(model, tokenizer)
    for i, word in enumerate(TEXT.split(" ")):
        before.extend(" " * bool(i) + word)
        after.extend(word + " ")
    assert list(before.token_ids) == whole
    assert list(after.token_ids) == ids_of(tokenizer, TEXT + " ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_behind_the_context_is_the_text(model: Any, kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    whole = ids_of(tokenizer, TEXT)
    served = 0
    for cut in range(1, len(TEXT)):
        session = Session(model, tokenizer).extend(TEXT[:cut])
        ids = list(session.token_ids)
        if whole[: len(ids)] == ids:
            served += 1
            assert [*ids, *prompt_of(session, TEXT[cut:])] == whole, TEXT[:cut]
        else:
            with pytest.raises(ValueError, match="or give token ids"):
                prompt_of(session, TEXT[cut:])
    assert served > len(TEXT.split())


@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_token_ids_neither_wins_nor_loses_a_space(model: Any, kind: str) -> None:
    """Behind ids of a text, behind a turn's special token, and behind half a word."""
    tokenizer = tokenizer_of(kind)
    pairs = [("The quick", " brown fox"), ("The dog", ", and the fox"), ("Answer:\n", "the fox")]
    for first, second in pairs[:1] if kind == "words" else pairs:
        session = Session(model, tokenizer).extend(ids_of(tokenizer, first)).extend(second)
        assert list(session.token_ids) == ids_of(tokenizer, first + second)
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    session = Session(model, tokenizer).extend([*ids_of(tokenizer, "The fox"), turn])
    session.extend("hello")
    assert list(session.token_ids) == ids_of(tokenizer, "The fox<turn>hello")
    if kind == "words":
        return
    # A generated answer that ends within a word: what follows is not a word of its own.
    half = ids_of(tokenizer, "the lazy")[:-1]
    session = Session(model, tokenizer).extend([*half, half[-1]])
    shown = tokenizer.decode(session.token_ids)
    assert tokenizer.decode(session.extend("ing").token_ids) == shown + "ing"


def test_ids_that_are_only_bos_are_a_beginning(model: Any) -> None:
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        session = Session(model, tokenizer).extend([1]).extend("The fox")
        assert list(session.token_ids) == ids_of(tokenizer, "The fox")


def test_an_end_that_the_tokenizer_adds_is_not_in_the_context(model: Any) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("bytes")
    wanted = ids_of(tokenizer, TEXT)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert ids_of(tokenizer, TEXT) == [*wanted, 2]
    session = Session(model, tokenizer).extend(TEXT[:9]).extend(TEXT[9:])
    assert list(session.token_ids) == wanted


@pytest.mark.slow
def test_gemma_texts_in_pieces() -> None:
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    from alora_kernels.gguf import gemma_270m

    try:
        folder = gemma_270m()
    except ImportError:
        pytest.skip("the extra `model` is not installed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = base_model("llama", 1, vocab_size=len(tokenizer), num_hidden_layers=1)
    text = "A long context … <judge> and\n\nmore of it: 12 345."
    whole = ids_of(tokenizer, text)
    session = Session(model, tokenizer)
    for i, word in enumerate(text.split(" ")):
        session.extend(" " * bool(i) + word)
    assert list(session.token_ids) == whole
    session = Session(model, tokenizer).extend("Answer:")
    assert [*session.token_ids, *prompt_of(session, "\nyes")] == ids_of(tokenizer, "Answer:\nyes")


def test_kept_answers_stay_and_text_goes_on(seed: int) -> None:
    """The context's own tokens before; the continuation's behind; nothing between."""
    tokenizer = tokenizer_of("metaspace always")
    session = Session(peft_model("llama", seed, vocab_size=420), tokenizer).extend(TEXT)
    answer = session.generate("red", keep=True, max_new_tokens=4, min_new_tokens=4)
    before = list(session.token_ids)
    assert before[-4:] == list(answer.token_ids)
    session.extend(" The dog")
    assert list(session.token_ids[: len(before)]) == before
    more = tokenizer.convert_ids_to_tokens(session.token_ids[len(before) :])
    assert "".join(more) == "▁The▁dog"
