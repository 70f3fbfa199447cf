"""An option means the same from the call, from generation_config= and from the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList

from alora_kernels.inference import Session

from .tiny import context, peft_model, tokenizer

WAYS = ("call", "config", "own", "peft")
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def session() -> Session:
    return Session(peft_model("llama", 7), tokenizer()).extend(context(20, 7))


def given(session: Session, way: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Options of a call with `settings` in effect by one of the ways."""
    if way == "call":
        return dict(settings)
    if way == "config":
        return {"generation_config": GenerationConfig(**settings)}
    if way == "own":
        own = session.base.generation_config
    else:  # a PeftModel's, which PEFT hands to its base
        own = session.model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    for name, value in settings.items():
        setattr(own, name, value)
    return {}


REFUSED = {
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[4]],
    "token_healing": True,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_session_refuses_it_refuses_from_everywhere(
    session: Session, way: str, name: str
) -> None:
    options = given(session, way, {name: REFUSED[name]})
    wanted = f"^Session.{{}}: {name} is not an option of a session"
    for call, where in (
        (lambda: session.generate("red", **options, max_new_tokens=1), "generate"),
        (lambda: session.ask(["red", None], **options, max_new_tokens=1), "ask"),
        (lambda: session.stream("red", **options, max_new_tokens=1), "stream"),
    ):
        with pytest.raises(ValueError, match=wanted.format(where)):
            call()


@pytest.mark.parametrize("way", WAYS)
def test_guidance_is_for_one_adapter_at_a_time(session: Session, way: str) -> None:
    options = given(session, way, {"guidance_scale": 1.5})
    with pytest.raises(ValueError, match=r"^Session.ask: guidance_scale is for one adapter"):
        session.ask(["red", None], **options, max_new_tokens=1)


HARMLESS = [
    ("cache_implementation", "static"),
    ("cache_implementation", "dynamic"),
    ("cache_implementation", "hybrid"),
    ("use_cache", False),
    ("prefill_chunk_size", 2),
    ("output_hidden_states", True),
    ("output_attentions", True),
    ("output_scores", True),
    ("num_beams", 1),
    ("num_return_sequences", 1),
    ("return_dict_in_generate", False),
    ("token_healing", False),
    ("guidance_scale", 1.0),
    ("penalty_alpha", 0.0),
    ("num_beam_groups", 1),
    ("force_words_ids", []),
    ("stop_strings", []),
    ("max_length", 40),
    ("prompt_lookup_num_tokens", 0),
]


@pytest.mark.parametrize("way", ["call", "own"])
@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_what_changes_nothing_is_served_from_everywhere(
    session: Session, way: str, name: str, value: Any
) -> None:
    prompt = [50, 51, 52]
    wanted = session.generate("red", prompt, **LENGTH)
    options = given(session, way, {name: value})
    assert session.generate("red", prompt, **options, **LENGTH) == wanted
    assert "".join(session.stream("red", prompt, **options, **LENGTH)) == wanted.text
    if name != "prefill_chunk_size":
        assert session.ask(["red"], [prompt], **options, **LENGTH) == [wanted]
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size is for one adapter at a time"):
            session.ask(["red"], [prompt], **options, **LENGTH)


@pytest.mark.parametrize("way", WAYS)
def test_lengths_ends_and_stops_mean_the_same(session: Session, way: str) -> None:
    free = session.generate("green", **LENGTH).token_ids
    third = session.tokenizer.decode([free[2]])
    for settings, length in (
        ({"max_new_tokens": 4, "min_new_tokens": 4}, 4),
        ({"max_length": 26}, None),
        ({"max_new_tokens": 6, "eos_token_id": [free[2], 1]}, free.index(free[2]) + 1),
        ({"max_new_tokens": 6, "eos_token_id": 1, "stop_strings": third}, None),
        ({"max_new_tokens": 5, "eos_token_id": 1, "pad_token_id": 3}, 5),
    ):
        fresh = session
        if way in ("own", "peft"):  # which stays set
            fresh = Session(peft_model("llama", 7), tokenizer()).extend(context(20, 7))
        options = given(fresh, way, {"do_sample": False, **settings})
        answer = fresh.generate("green", **options)
        if "max_length" in settings:
            length = 26 - 21  # the context and the invocation count
        if "stop_strings" in settings:
            assert third in answer.text and third not in answer.text[:-1]
            length = len(answer.token_ids)
        assert answer.token_ids == free[:length]
        many = fresh.ask(["green", "blue", None], **options)
        assert many[0] == answer
        assert many[1:] == [fresh.generate(name, **options) for name in ("blue", None)]


@pytest.mark.parametrize("way", WAYS)
def test_beams_and_several_answers_mean_the_same(session: Session, way: str) -> None:
    wanted = session.generate("red", num_beams=3, **LENGTH)
    options = given(session, way, {"num_beams": 3})
    assert session.generate("red", **options, **LENGTH) == wanted
    for call in (
        lambda: session.ask(["red"], **options),
        lambda: session.stream("red", **options),
    ):
        with pytest.raises(ValueError, match="num_beams"):
            call()
    given(session, way, {"num_beams": 1})
    options = given(session, way, {"num_return_sequences": 2, "do_sample": True})
    options["max_new_tokens"] = 3
    assert len(session.generate("red", **options)) == 2
    with pytest.raises(ValueError, match="keep=True takes one answer"):
        session.generate("red", keep=True, **options)
    with pytest.raises(ValueError, match="num_return_sequences is for one adapter"):
        session.ask(["red"], **options)


def test_the_models_own_settings_are_read_in_every_call(session: Session) -> None:
    own = session.base.generation_config
    for length in (3, 5, 2):
        own.max_new_tokens = own.min_new_tokens = length
        assert len(session.generate("red").token_ids) == length
        assert [len(a.token_ids) for a in session.ask(["red", None])] == [length] * 2


def test_a_keyword_of_none_takes_a_setting_back(session: Session) -> None:
    """No end, no stop, no beams."""
    free = session.generate("red", **LENGTH).token_ids
    own = session.base.generation_config
    own.eos_token_id, own.num_beams = free[0], 3
    own.stop_strings = [session.tokenizer.decode([free[1]])]
    none: dict[str, Any] = dict.fromkeys(("eos_token_id", "num_beams", "stop_strings"))
    answer = session.generate("red", max_new_tokens=6, do_sample=False, **none)
    assert answer.token_ids == free
    many = session.ask(["red", None], max_new_tokens=6, do_sample=False, **none)
    assert many[0] == answer and len(many[1].token_ids) == 6


def test_the_tokenizers_end_serves_a_model_that_names_none(session: Session) -> None:
    free = session.generate("red", **LENGTH).token_ids
    session.base.generation_config.eos_token_id = None
    session.tokenizer.eos_token = session.tokenizer.convert_ids_to_tokens(free[3])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    answer = session.generate("red", **options)
    assert answer.token_ids == free[: free.index(free[3]) + 1]
    assert session.ask(["red", "blue"], **options)[0] == answer


def test_options_that_are_off_are_no_options(session: Session) -> None:
    wanted = session.generate("red", **LENGTH)
    off: dict[str, Any] = {"keep": False, "streamer": None, "stopping_criteria": None}
    off |= {"logits_processor": [], "assistant_model": None, "attention_mask": None}
    assert session.ask(["red"], **off, **LENGTH) == [wanted]
    assert session.generate("red", **off, **LENGTH) == wanted
    with pytest.raises(ValueError, match="streamer is the stream's own"):
        session.stream("red", streamer=object())
    with pytest.raises(ValueError, match="attention_mask is not an option"):
        session.generate("red", attention_mask=torch.ones(1, 3))


def test_several_answers_end_where_each_one_stops(session: Session) -> None:
    torch.manual_seed(3)
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8}
    free = session.generate("red", num_return_sequences=4, eos_token_id=None, **options)
    stop = session.tokenizer.decode([free[0].token_ids[1]])
    torch.manual_seed(3)
    stopped = session.generate(
        "red", num_return_sequences=4, eos_token_id=None, stop_strings=[stop], **options
    )
    assert stop in stopped[0].text
    for answer in stopped:
        assert stop not in session.tokenizer.decode(answer.token_ids[:-1])


def test_stop_strings_that_a_tokenizer_cannot_have_are_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    session = Session(peft_model("llama", 7), plain).extend(context(20, 7))
    for way in ("call", "own"):
        options = given(session, way, {"stop_strings": ["9"]})
        with pytest.raises(ValueError, match=r"Session.generate: stop_strings cannot be used"):
            session.generate("red", **options, **LENGTH)


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[40, 41], [30]]},
    {"sequence_bias": [[[30], -3.0]]},
    {"max_length": 27, "max_new_tokens": None, "min_new_tokens": None},
    {"min_length": 26, "min_new_tokens": None},
    {"exponential_decay_length_penalty": (2, 1.5)},
    {"suppress_tokens": [30, 31], "begin_suppress_tokens": [33]},
    {"forced_eos_token_id": 2},
]


@pytest.mark.parametrize("settings", PENALTIES, ids=lambda s: next(iter(s)))
def test_what_judges_tokens_by_those_before_sees_no_padding(
    session: Session, settings: dict[str, Any]
) -> None:
    options = {**LENGTH, **settings}
    alone = [session.generate(name, **options) for name in ("red", "green", "blue", None)]
    assert session.ask(["red", "green", "blue", None], **options) == alone


def test_a_callers_code_sees_one_row(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []

    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(tuple(input_ids.shape))  # type: ignore[arg-type]
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 24)

    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([stop]), **LENGTH}
    alone = [session.generate(name, **options) for name in ("red", "blue")]
    seen.clear()
    assert session.ask(["red", "blue"], **options) == alone
    assert {rows for rows, _ in seen} == {1}
