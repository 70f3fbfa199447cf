"""Random prompts, starts, block sizes, chunk sizes and orders of arrival, against PEFT."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import engines, tiny

pytestmark = pytest.mark.vllm
NAMES = (None, "first", "second", "other", "plain")


@pytest.fixture(
    scope="module", params=[(32, 48), (64, 100), (128, 33)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def sized(llama, request):
    """An engine with this many tokens to a block, and to a step."""
    block, step = request.param
    with engines.offline(llama, block_size=block, max_num_batched_tokens=step) as engine:
        yield engine, block


@st.composite
def sessions(draw):
    """Turns over one or two contexts: which adapter, its prompt, and after how many steps it comes.

    Few different tokens, so that an invocation appears early, late, often, torn or not at all.
    """
    words = st.sampled_from([*tiny.INVOCATION, 60, 61, 70, 71, 72])
    contexts = draw(st.lists(st.lists(words, min_size=1, max_size=150), min_size=1, max_size=2))
    turns = []
    for _ in range(draw(st.integers(1, 5))):
        context = draw(st.sampled_from(contexts))
        cut = draw(st.integers(1, len(context)))
        tail = draw(st.lists(words, max_size=12))
        insert = draw(st.sampled_from([[], list(tiny.INVOCATION), [60, 61]]))
        wait = draw(st.integers(0, 4))
        turns.append((draw(st.sampled_from(NAMES)), [*context[:cut], *insert, *tail], wait))
    return turns


@given(turns=sessions())
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_session_is_answered_as_by_peft(sized, turns):
    from vllm import SamplingParams

    engine, block = sized
    engine.forget()
    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    results = {}

    def step() -> None:
        for output in core.step():
            if output.finished:
                results[output.request_id] = output

    for index, (name, prompt, wait) in enumerate(turns):
        lora = engine.lora(name)
        core.add_request(str(index), {"prompt_token_ids": prompt}, params, lora_request=lora)
        for _ in range(wait):
            step()
    while core.has_unfinished_requests():
        step()
    for index, (name, prompt, _) in enumerate(turns):
        engines.same(engine.model, name, prompt, list(results[str(index)].outputs[0].token_ids))
    # All is in the cache now. Whoever comes takes what is its own, and what the base model's is.
    context = turns[0][1]
    shared = engines.full(len(context), block)
    adapter = [*context, *tiny.INVOCATION, 70]
    base_knows = any(name is None and prompt == context for name, prompt, _ in turns)
    cached = engine.one("first", adapter, new=2)
    assert cached <= engines.full(len(adapter) - 1, block)
    if base_knows:
        assert cached >= shared
    assert engine.one(None, [*adapter, 71], new=2) >= shared
