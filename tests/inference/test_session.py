"""Answers over one cache equal answers computed from scratch by stock PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from alora_kernels.inference import Session
from alora_kernels.inference.views import tensors_of

from .tiny import (
    GREEDY,
    INVOCATIONS,
    WINDOW,
    check,
    context,
    peft_model,
    scratch_logits,
    session_of,
    tokenizer,
)

KINDS = ("llama", "mistral", "gemma3")


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("gemma3", "sdpa"),
        *(
            pytest.param(kind, attention, marks=pytest.mark.slow)
            for kind, attention in (("llama", "sdpa"), ("mistral", "sdpa"), ("gemma3", "eager"))
        ),
    ],
)
def test_answers_equal_those_from_scratch(kind: str, attention: str, seed: int) -> None:
    """Below, at and above the window; one adapter at a time and all in one batch."""
    session, reference = session_of(kind, seed, attention)
    tokens = ties = 0
    for length in (3, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW):
        ids = context(length, seed + length)
        session = Session(session.model, session.tokenizer)
        session.extend(ids)
        before = [t.clone() for t in tensors_of(session.cache)]
        alone = [session.generate(name, **GREEDY) for name in (None, *INVOCATIONS)]
        together = session.ask([None, *INVOCATIONS], **GREEDY)
        again = session.generate("red", **GREEDY)
        for answer in [*alone, *together]:
            assert len(answer.token_ids) == 10 or answer.token_ids[-1] == 2
            ties += check(reference, ids, answer)
            tokens += len(answer.token_ids)
        assert again == alone[1]
        after = tensors_of(session.cache)
        assert len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert ties <= max(1, tokens // 100), f"{ties} of {tokens} tokens differ"


def test_the_adapters_matter(seed: int) -> None:
    """The tests above could not fail if every adapter answered like the base model."""
    reference = peft_model("gemma3", seed)
    ids = context(20, seed)
    base = scratch_logits(reference, None, [*ids, *INVOCATIONS["red"]], None)
    red = scratch_logits(reference, "red", [*ids, *INVOCATIONS["red"]], len(ids))
    early = scratch_logits(reference, "red", [*ids, *INVOCATIONS["red"]], 0)
    assert (base[-1] - red[-1]).abs().max() > 0.1
    assert (early[-1] - red[-1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_kept_turns_are_base_tokens_for_later_ones(kind: str, seed: int) -> None:
    """base → adapter → base → another adapter, each kept, against scratch; PEFT's patterns."""
    session, reference = session_of(kind, seed)
    ids = context(WINDOW - 3, seed)
    session.extend(ids)
    for turn, name in enumerate((None, "red", None, "blue", "red")):
        answer = session.generate(name, keep=True, **GREEDY)
        assert check(reference, ids, answer) == 0
        ids = [*ids, *answer.invocation, *answer.token_ids]
        assert list(session.token_ids) == ids
        more = context(4, seed + turn)[1:]
        session.extend(more)
        ids = [*ids, *more]
    fresh = Session(session.model, session.tokenizer).extend(ids)
    assert session.cached_length == fresh.cached_length == len(ids) - 1
    for kept, scratch in zip(tensors_of(session.cache), tensors_of(fresh.cache)):
        if kept.is_floating_point():
            torch.testing.assert_close(kept, scratch, rtol=0, atol=2e-4)


def test_two_contexts_with_a_common_beginning(seed: int) -> None:
    """Partial overlap: the longer context begins with the shorter one's tokens."""
    session, reference = session_of("gemma3", seed)
    ids = context(2 * WINDOW, seed)
    session.extend(ids[:WINDOW])
    first = session.generate("red", **GREEDY)
    session.extend(ids[WINDOW:])
    second = session.generate("green", **GREEDY)
    assert check(reference, ids[:WINDOW], first) == 0
    assert check(reference, ids, second) == 0


def test_prefill_in_chunks_is_the_same(seed: int) -> None:
    session, _ = session_of("gemma3", seed)
    ids = context(3 * WINDOW, seed)
    session.extend(ids)
    chunked = Session(session.model, session.tokenizer, prefill_chunk=7).extend(ids)
    for a, b in zip(tensors_of(session.cache), tensors_of(chunked.cache)):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_an_invocation_at_the_end_of_the_context_is_run_by_the_adapter(seed: int) -> None:
    session, reference = session_of("llama", seed)
    ids = [*context(12, seed), *INVOCATIONS["blue"]]
    session.extend(ids)
    assert session.cached_length == len(ids) - len(INVOCATIONS["blue"])
    answer = session.generate("blue", **GREEDY)
    assert answer.invocation == () and answer.invocation_start == 12
    assert check(reference, ids, answer) == 0
    base = session.generate(**GREEDY)
    assert check(reference, ids, base) == 0


def test_an_invocation_in_the_prompt_is_not_added_again(seed: int) -> None:
    session, reference = session_of("llama", seed)
    ids = context(12, seed)
    session.extend(ids)
    prompt = [40, *INVOCATIONS["red"], 50, 51]
    answer = session.generate("red", prompt, **GREEDY)
    assert list(answer.invocation) == prompt and answer.invocation_start == 13
    assert check(reference, ids, answer) == 0
    many = session.ask(["red", "green", None], [prompt, [44], None], **GREEDY)
    assert many[0].token_ids == answer.token_ids
    assert [check(reference, ids, a) for a in many] == [0, 0, 0]


def test_an_adapter_that_came_later_cannot_have_its_invocation_back(seed: int) -> None:
    session, _ = session_of("llama", seed)
    config = session.model.peft_config["red"]
    late = type(config)(**{**config.to_dict(), "alora_invocation_tokens": [60, 61]})
    session.extend([*context(8, seed), 60, 61])
    session.model.add_adapter("late", late)
    with pytest.raises(ValueError, match="the base model has read it already"):
        session.generate("late", **GREEDY)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_beams_and_several_samples(kind: str, seed: int) -> None:
    session, reference = session_of(kind, seed)
    ids = context(WINDOW + 2, seed)
    session.extend(ids)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with reference.disable_adapter():
        wanted = reference.get_base_model().generate(torch.tensor([ids]), **options)
    base = session.generate(**options)
    got = [*ids, *base.token_ids]
    assert got == wanted[0, : len(got)].tolist()
    samples = session.generate(
        "red", num_return_sequences=3, do_sample=True, max_new_tokens=6, temperature=2.0
    )
    assert len(samples) == 3 and len({s.token_ids for s in samples}) > 1


def test_sampling_draws_what_transformers_draws(seed: int) -> None:
    session, reference = session_of("llama", seed)
    ids = context(14, seed)
    session.extend(ids)
    options: dict[str, Any] = {"do_sample": True, "top_k": 20, "max_new_tokens": 8}
    torch.manual_seed(seed)
    answer = session.generate("red", **options)
    reference.set_adapter("red")
    whole = torch.tensor([[*ids, *INVOCATIONS["red"]]])
    torch.manual_seed(seed)
    wanted = reference.generate(input_ids=whole, **options)[0, whole.shape[1] :].tolist()
    assert list(answer.token_ids) == wanted[: len(answer.token_ids)]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_prompt_in_chunks_changes_nothing(kind: str, seed: int) -> None:
    session, _ = session_of(kind, seed)
    ids = context(2 * WINDOW, seed)
    session.extend(ids)
    prompt = [50, 51, 52, *INVOCATIONS["red"], *ids[1:5]]
    wanted = session.generate("red", prompt, **GREEDY)
    forwards: list[int] = []
    handle = session.base.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert session.generate("red", prompt, prefill_chunk_size=2, **GREEDY) == wanted
    handle.remove()
    assert forwards[:6] == [2, 2, 2, 2, 2, 1]  # the held token and the prompt
    given = GenerationConfig(prefill_chunk_size=3, pad_token_id=0, eos_token_id=2, **GREEDY)
    assert session.generate("red", prompt, generation_config=given) == wanted
    beams: dict[str, Any] = {**GREEDY, "num_beams": 2}
    whole = session.generate("red", prompt, **beams)
    assert session.generate("red", prompt, prefill_chunk_size=4, **beams) == whole
    with pytest.raises(ValueError, match="prefill_chunk_size is for one adapter"):
        session.ask(["red"], prefill_chunk_size=2, **GREEDY)
    session.base.generation_config.prefill_chunk_size = 2
    assert session.generate("red", prompt, **GREEDY) == wanted
    with pytest.raises(ValueError, match="assisted decoding is wrong on a cache"):
        session.generate("red", prompt_lookup_num_tokens=3, **GREEDY)


def test_stop_strings_and_eos(seed: int) -> None:
    session, _ = session_of("llama", seed)
    session.extend(context(14, seed))
    # A special token is no part of the text, so none may be the one that ends the answer.
    ordinary = {"suppress_tokens": session.tokenizer.all_special_ids}
    free = session.generate("green", min_new_tokens=10, **ordinary, **GREEDY)
    third = session.tokenizer.decode([free.token_ids[2]])
    stopped = session.generate("green", stop_strings=[third], **ordinary, **GREEDY)
    assert third in stopped.text and len(stopped.token_ids) <= 3
    ended = session.generate("green", eos_token_id=free.token_ids[0], **ordinary, **GREEDY)
    assert ended.token_ids == free.token_ids[:1]


def test_settings_may_come_in_a_generation_config(seed: int) -> None:
    """The caller's or the model's own: beams, the end, the length, what a session sets itself."""
    session, _ = session_of("llama", seed)
    session.extend(context(WINDOW, seed))
    beams = session.generate("red", num_beams=3, **GREEDY)
    given = GenerationConfig(num_beams=3, pad_token_id=0, eos_token_id=2, **GREEDY)
    assert session.generate("red", generation_config=given) == beams
    free = session.generate("red", min_new_tokens=10, **GREEDY)
    end = GenerationConfig(eos_token_id=free.token_ids[0], pad_token_id=0, **GREEDY)
    assert session.generate("red", generation_config=end).token_ids == free.token_ids[:1]
    assert session.ask(["red"], generation_config=end)[0].token_ids == free.token_ids[:1]
    with pytest.raises(ValueError, match="num_beams is for one adapter"):
        session.ask(["red"], generation_config=given)
    with pytest.raises(ValueError, match="256 positions; shorten"):
        session.generate("red", generation_config=GenerationConfig(max_length=257))
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens is not an option"):
        session.generate("red", generation_config=GenerationConfig(prompt_lookup_num_tokens=2))
    wanted = session.generate("red", **GREEDY)
    own = session.base.generation_config
    own.use_cache = session.base.config.use_cache = False
    assert session.generate("red", **GREEDY) == wanted
    assert session.ask(["red"], **GREEDY) == [wanted]
    own.num_beams = 3
    assert session.generate("red", **GREEDY) == beams
    with pytest.raises(ValueError, match="num_beams is for one adapter"):
        session.ask(["red"], **GREEDY)


def test_messages_one_by_one_are_the_chat_as_a_whole(seed: int) -> None:
    session, _ = session_of("llama", seed)
    chat = [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    whole = session.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = session.tokenizer(whole, add_special_tokens=False)["input_ids"]
    session.extend(chat[:1]).extend(chat[1:2]).extend(chat[2:], add_generation_prompt=True)
    assert list(session.token_ids) == wanted
    assert session.tokenizer.decode(wanted).replace(" ", "") == whole.replace(" ", "")


def test_messages_after_a_kept_answer(seed: int) -> None:
    """The answer ended with the end token; what the template puts after it is not forgotten."""
    session, _ = session_of("llama", seed)
    session.extend([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    answer = session.generate(
        keep=True, max_new_tokens=5, do_sample=False, forced_eos_token_id=2, min_new_tokens=5
    )
    assert answer.token_ids[-1] == 2
    session.extend([{"role": "user", "content": "more"}])
    text = session.tokenizer.decode(session.token_ids)
    assert text.endswith("§\n<u>more§\n"), text


def test_errors_say_what_to_do(seed: int) -> None:
    model = peft_model("llama", seed, plain=True)
    bare = tokenizer()
    session = Session(model, bare)
    with pytest.raises(ValueError, match="context is empty; call extend"):
        session.generate("red")
    with pytest.raises(ValueError, match="no chat template"):
        session.extend([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="nothing to append"):
        session.extend([])
    with pytest.raises(TypeError, match="expected text, token ids, or messages"):
        session.extend([object()])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="is not a token id"):
        session.extend([1, 4000])
    session.extend(context(250, seed))
    with pytest.raises(ValueError, match="unknown adapter 'grey'; this model has: 'red'"):
        session.generate("grey")
    with pytest.raises(ValueError, match="'plain' is not an Activated LoRA"):
        session.ask(["red", "plain"])
    for call in (
        lambda: session.generate("red", max_new_tokens=7),
        lambda: session.ask(["red"], max_new_tokens=7),
        lambda: session.extend(context(10, seed)),
        lambda: session.generate("red", context(10, seed)),
    ):
        with pytest.raises(ValueError, match="256 positions; shorten"):
            call()
    assert len(session.generate("green", max_new_tokens=5, min_new_tokens=5).token_ids) == 5
    with pytest.raises(ValueError, match="past_key_values is not an option"):
        session.generate("red", past_key_values=1, max_new_tokens=1)
    with pytest.raises(ValueError, match="keep=True takes one answer"):
        session.generate("red", keep=True, num_return_sequences=2, max_new_tokens=1)
    with pytest.raises(ValueError, match="num_beams is for one adapter"):
        session.ask(["red"], num_beams=2)
    for option in ({"keep": True}, {"streamer": object()}, {"num_return_sequences": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for one adapter"):
            session.ask(["red"], **option)
    with pytest.raises(ValueError, match="256 positions; shorten"):
        session.generate("red", max_length=257)
    with pytest.raises(ValueError, match="2 adapters but 1 prompts"):
        session.ask(["red", "green"], ["x"])
    with pytest.raises(ValueError, match="adapters is empty"):
        session.ask([])
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        Session(model.train(), bare)


def test_a_plain_model_has_no_adapter(seed: int) -> None:
    from .tiny import base_model

    model = base_model("gemma3", seed)
    session = Session(model, tokenizer()).extend(context(20, seed))
    wanted = model.generate(torch.tensor([session.token_ids]), **GREEDY)[0, 20:].tolist()
    answer = session.generate(**GREEDY)
    assert list(answer.token_ids) == wanted[: len(answer.token_ids)]
    assert session.ask([None, None], **GREEDY)[1].token_ids == answer.token_ids
    with pytest.raises(ValueError, match="this model has: none"):
        session.generate("red")


def test_guidance_has_a_sequence_of_its_own(seed: int) -> None:
    """The negative branch is no row of the session: its adapter begins in its own tokens."""
    session, reference = session_of("llama", seed)
    ids, negative = context(12, seed), [*context(6, seed + 1), *INVOCATIONS["red"], 30]
    session.extend(ids)
    answer = session.generate(
        "red", guidance_scale=2.0, negative_prompt_ids=torch.tensor([negative]), **GREEDY
    )
    start = answer.invocation_start
    row, other, tokens = [*ids, *answer.invocation], list(negative), []
    for _ in answer.token_ids:
        yes = scratch_logits(reference, "red", row, start)[-1].log_softmax(-1)
        no = scratch_logits(reference, "red", other, 6)[-1].log_softmax(-1)
        tokens.append(int((no + 2.0 * (yes - no)).argmax()))
        row, other = [*row, tokens[-1]], [*other, tokens[-1]]
    assert answer.token_ids == tuple(tokens)
