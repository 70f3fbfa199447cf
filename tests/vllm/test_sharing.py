"""Which blocks are shared, counted exactly, with answers that equal PEFT's."""

from __future__ import annotations

import dataclasses

import pytest

from . import tiny
from .engines import BLOCK, full

pytestmark = pytest.mark.vllm
INVOCATION = list(tiny.INVOCATION)


@pytest.mark.parametrize("start", [1, 31, 32, 33, 64, 95, 100])
def test_adapter_takes_the_base_turns_blocks_before_its_start(engine, words, start):
    context = words(start)
    assert engine.one(None, [*context, *words(40)]) == 0
    prompt = [*context, *INVOCATION, *words(7)]
    assert engine.one("first", prompt) == full(start)
    # The second time its own blocks are there too; the last token is always computed.
    assert engine.one("first", prompt) == full(len(prompt) - 1)


def test_base_turn_takes_the_adapter_turns_blocks_up_to_the_start(engine, words):
    context = words(80)
    prompt = [*context, *INVOCATION, *words(30)]
    assert engine.one("first", prompt) == 0
    assert engine.one(None, [*prompt, 99]) == full(80)
    assert engine.one(None, [*prompt, 99]) == full(len(prompt))


def test_two_adapters_share_the_context_alone(engine, words):
    context = words(64)
    prompt = [*context, *INVOCATION, *words(70)]
    assert engine.one("first", prompt) == 0
    assert engine.one("second", prompt) == 64
    assert engine.one("other", [*context, 60, 61, *words(30)]) == 64
    assert engine.one("first", prompt) == full(len(prompt) - 1)


def test_first_token_of_the_last_invocation_is_the_start(engine, words):
    context = words(60)
    prompt = [*context, *INVOCATION, *words(60), *INVOCATION, *words(5)]
    start = 60 + 3 + 60
    assert engine.one(None, prompt) == 0
    assert engine.one("first", prompt) == full(start)


def test_plain_lora_of_the_same_tensors_shares_with_nobody(engine, words):
    prompt = [*words(70), *INVOCATION, *words(50)]
    assert engine.one(None, prompt) == 0
    assert engine.one("first", prompt) == 64
    assert engine.one("plain", prompt) == 0
    assert engine.one("plain", prompt) == full(len(prompt) - 1)
    assert engine.one("first", prompt) == full(len(prompt) - 1)


def test_salts_are_kept_apart(engine, words):
    prompt = [*words(70), *INVOCATION, *words(5)]
    assert engine.one(None, prompt, salt="alice") == 0
    assert engine.one("first", prompt, salt="bob") == 0
    assert engine.one("first", prompt) == 0
    assert engine.one("second", prompt, salt="alice") == 64
    assert engine.one("second", prompt, salt="bob") == 64


def test_without_invocation_the_base_model_answers_and_shares(engine, words):
    prompt = words(100)
    assert engine.one(None, prompt) == 0
    assert engine.one("first", prompt) == 96


def test_missing_invocation_is_an_error_if_asked_for(engine, words, monkeypatch):
    from vllm.exceptions import VLLMValidationError

    monkeypatch.setenv("ALORA_VLLM_MISSING", "error")
    with pytest.raises(VLLMValidationError, match="has no invocation of 'first'"):
        engine.ask(["first"], [words(20)])
    engine.one("first", [*words(20), *INVOCATION])


def test_reloaded_adapter_with_another_invocation_does_not_share(engine, words, tmp_path):
    """The same name and path, loaded again in place."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    path = tiny.with_tokens(engine.model.adapters["second"], tmp_path / "hot", INVOCATION)
    folder = {**engine.model.adapters, "hot": path}
    before = dataclasses.replace(engine.model, folder=engine.model.folder, adapters=folder)
    prompt = [*words(66), *INVOCATION, *words(70), 50, *words(8)]
    want = {tuple(INVOCATION): before.answer("hot", prompt, 10)}
    loaded = LoRARequest("hot", 77, str(path))
    engine.loras["hot"] = loaded
    got = engine.ask(["hot"], [prompt])[0]
    assert (got.tokens, got.cached) == (want[tuple(INVOCATION)], 0)

    tiny.with_tokens(engine.model.adapters["second"], path, [50])
    with pytest.raises(VLLMValidationError, match="have changed"):
        engine.ask(["hot"], [prompt])
    tiny.peft_model.cache_clear()
    tiny.answer.cache_clear()
    after = dataclasses.replace(before)
    engine.loras["hot"] = LoRARequest("hot", 77, str(path), load_inplace=True)
    got = engine.ask(["hot"], [prompt])[0]
    # Nothing from the first invocation on is taken from the cache, though it is there.
    assert (got.tokens, got.cached) == (after.answer("hot", prompt, 10), 64)
    del engine.loras["hot"]


def test_start_in_the_first_block_shares_nothing(engine, words):
    tail = words(2 * BLOCK)
    assert engine.one(None, [*INVOCATION, *tail]) == 0
    assert engine.one("first", [*INVOCATION, *tail]) == 0
