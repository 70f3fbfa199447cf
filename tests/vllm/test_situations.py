"""Every way in which a request can go through one engine: its answer is PEFT's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from . import tiny
from .engines import full

pytestmark = pytest.mark.vllm
INVOCATION = list(tiny.INVOCATION)
TOLERANCE = 2e-4  # of a log probability: float32 sums in another order


def test_chunked_prefill_straddles_the_start(engine, words):
    """64 tokens to a step: the start lies within, at the edge of, and after the first chunks."""
    for start in (10, 63, 64, 65, 100, 128, 150):
        assert engine.one("first", [*words(start), *INVOCATION, *words(20)]) == 0


def test_mixed_batch(engine, words):
    names = [None, "first", "plain", "second", "other", None, "first", "other"]
    prompts = []
    for index, name in enumerate(names):
        invocation = [60, 61] if name == "other" else INVOCATION
        prompts.append([*words(5 + 17 * index), *invocation, *words(3 + 5 * index)])
    engine.check(names, prompts)


def test_requests_arrive_while_others_decode(engine, words):
    """Requests are added between steps, so that prefills and decodes share batches."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    names = ["first", None, "second", "plain", "first", "other"]
    prompts = [[*words(20 + 30 * i), *INVOCATION, 60, 61, *words(4)] for i in range(len(names))]
    results = {}
    waiting = list(enumerate(zip(names, prompts)))
    while waiting or core.has_unfinished_requests():
        if waiting:
            index, (name, prompt) = waiting.pop(0)
            core.add_request(
                f"arrival-{index}",
                {"prompt_token_ids": prompt},
                params,
                lora_request=engine.lora(name),
            )
        for output in core.step():
            if output.finished:
                results[output.request_id] = list(output.outputs[0].token_ids)
    for index, (name, prompt) in enumerate(zip(names, prompts)):
        got = results[f"arrival-{index}"]
        assert got == engine.model.answer(name, prompt, 12)


def test_several_samples_of_one_prompt(engine, words):
    """n = 3, each the most probable token (top_k = 1)."""
    prompt = [*words(50), *INVOCATION, *words(9)]
    (answer,) = engine.ask(["first"], [prompt], n=3, temperature=1.0, top_k=1)
    want = engine.model.answer("first", prompt, 10)
    assert [list(o.token_ids) for o in answer.output.outputs] == [want] * 3


def echoing(engine, words, tmp_path, answers=None):
    """An adapter whose answer contains its own invocation, a single token, and such a prompt.

    `answers(name, prompt)` are the answers of which one must contain it; by default the greedy one.
    """
    model = engine.model
    if answers is None:

        def answers(name, prompt):
            return [model.answer(name, prompt, 6)]

    for _ in range(50):
        prompt = [*words(40), 45, *words(5)]
        for token in model.answer("first", prompt, 6)[1:-1]:
            if 4 < token < 128 and token not in prompt:
                candidate = [token if t == 45 else t for t in prompt]
                name = f"echo{len(model.adapters)}"
                path = tiny.with_tokens(model.adapters["first"], tmp_path / name, [token])
                model.adapters[name] = path
                tiny.peft_model(model).load_adapter(path, adapter_name=name)
                if any(token in tokens[:-1] for tokens in answers(name, candidate)):
                    return name, candidate, token
    raise AssertionError("no prompt makes the adapter say its invocation")


def test_generated_invocation_changes_nothing(engine, words, tmp_path):
    name, prompt, token = echoing(engine, words, tmp_path)
    (answer,) = engine.ask([name], [prompt], new=6)
    assert answer.tokens == engine.model.answer(name, prompt, 6)
    assert token in answer.tokens[:-1]


def beams_of_peft(model, name, prompt, width, new):
    """vLLM's beam search over PEFT's logits: 2 · width candidates of each beam.

    None where a beam and the first one cut off, or two beams at the end, are so close that sums in
    another order may swap them; and where a beam ends in EOS, whose score vLLM divides by one token
    less.
    """
    beams, clear = [([], 0.0)], 2 * new * TOLERANCE
    for _ in range(new):
        grown = []
        for tokens, score in beams:
            scores = torch.log_softmax(tiny.logits(model, name, prompt, tokens), -1)
            best = torch.topk(scores, 2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist()):
                grown.append(([*tokens, token], score + value))
        grown.sort(key=lambda beam: -beam[1])
        beams = grown[:width]
        if beams[-1][1] - grown[width][1] < clear or any(
            tokens[-1] == tiny.EOS for tokens, _ in beams
        ):
            return None
    if any(a[1] - b[1] < clear for a, b in itertools.pairwise(beams)):
        return None
    return beams


@pytest.mark.parametrize("which", ["first", "echo", "plain", None])
def test_beam_search(engine, words, tmp_path, which):
    """A beam's prompt ends in generated tokens: with `echo`, among them an invocation."""
    from vllm.sampling_params import BeamSearchParams

    def tokens_of_beams(name, prompt):
        return [tokens for tokens, _ in beams_of_peft(engine.model, name, prompt, 2, 6) or ()]

    if which == "echo":
        # PEFT's beams must hold it: the greedy answer need not survive among them.
        name, prompt, token = echoing(engine, words, tmp_path, tokens_of_beams)
    else:
        name, prompts = which, ([*words(45), *INVOCATION, *words(5)] for _ in range(50))
        prompt = next(p for p in prompts if tokens_of_beams(name, p))
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    (output,) = engine.llm.beam_search(
        [{"prompt_token_ids": prompt}], params, lora_request=engine.lora(name)
    )
    want = beams_of_peft(engine.model, name, prompt, 2, 6)
    got = [(s.tokens[len(prompt) :], s.cum_logprob) for s in output.sequences]
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    for (_, mine), (_, peft) in zip(got, want):
        assert math.isclose(mine, peft, abs_tol=6 * TOLERANCE)
    if which == "echo":
        assert any(token in tokens[:-1] for tokens, _ in got)


@pytest.mark.parametrize("name", ["first", "plain", None])
def test_structured_output(engine, words, name):
    from vllm.sampling_params import StructuredOutputsParams

    prompt = [*words(70), *INVOCATION, *words(6)]
    choice = StructuredOutputsParams(choice=["1", "4", "7"])
    (answer,) = engine.ask(
        [name], [prompt], new=1, structured_outputs=choice, detokenize=True, ignore_eos=False
    )
    logits = tiny.logits(engine.model, name, prompt, [])
    assert answer.tokens == [max((101, 104, 107), key=lambda token: float(logits[token]))]


def test_prompt_logprobs(engine, words):
    """Positions before the start have the base model's, the others the adapter's."""
    prompt = [*words(70), *INVOCATION, *words(30)]
    engine.one(None, prompt)  # what is cached must not be taken: it has no logits
    (answer,) = engine.ask(["first"], [prompt], prompt_logprobs=0)
    scores = torch.log_softmax(tiny.all_logits(engine.model, "first", prompt), -1)
    got = answer.output.prompt_logprobs
    assert len(got) == len(prompt) and got[0] is None
    for position in range(1, len(prompt)):
        want = float(scores[position - 1, prompt[position]])
        assert math.isclose(got[position][prompt[position]].logprob, want, abs_tol=TOLERANCE)


def test_truncated_prompt_counts_what_is_left(engine, words):
    """The start counts in the tokens that remain, and an invocation that was cut off is none."""
    cut = [*words(60), *INVOCATION, *words(50)]
    inputs = [{"prompt_token_ids": cut}]
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    for keep in (80, 40):
        (output,) = engine.llm.generate(
            inputs,
            params,
            lora_request=engine.lora("first"),
            use_tqdm=False,
            tokenization_kwargs={"truncate_prompt_tokens": keep},
        )
        assert list(output.prompt_token_ids) == cut[-keep:]
        name = "first" if keep == 80 else None
        assert list(output.outputs[0].token_ids) == engine.model.answer(name, cut[-keep:], 8)


def test_aborted_request_leaves_the_others_right(engine, words):
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, detokenize=False)
    prompts = [[*words(90), *INVOCATION, *words(4 + i)] for i in range(3)]
    for index, prompt in enumerate(prompts):
        core.add_request(
            f"abort-{index}",
            {"prompt_token_ids": prompt},
            params,
            lora_request=engine.lora("first"),
        )
    for _ in range(3):  # 192 tokens: the second prompt is partly read
        core.step()
    core.abort_request(["abort-1"])
    results = {}
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                results[output.request_id] = list(output.outputs[0].token_ids)
    assert set(results) == {"abort-0", "abort-2"}
    for index in (0, 2):
        assert results[f"abort-{index}"] == engine.model.answer("first", prompts[index], 10)
    # What the aborted request had computed is right for whoever finds it.
    assert engine.one("first", prompts[1]) == full(90)


def test_chat_template_comes_before_the_search(engine):
    """The start counts in the tokens after templating; the invocation is a part of the text."""
    from vllm import SamplingParams

    words = " ".join(f"t{64 + i % 30}" for i in range(40))
    invocation = " ".join(f"t{t}" for t in INVOCATION)
    messages = [{"role": "user", "content": f"{words} {invocation}"}]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = engine.llm.chat(messages, params, lora_request=engine.lora("first"), use_tqdm=False)
    prompt = list(output.prompt_token_ids)
    assert prompt[-4:] == [*INVOCATION, 50]
    assert list(output.outputs[0].token_ids) == engine.model.answer("first", prompt, 8)
