"""Starts belong to a sequence: other forwards inside `generate`, on tokens and caches of their own.

The right value of every sequence is PEFT's model recomputed from scratch.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from alora_kernels import Activation
from alora_kernels.peft import adapter_scope

from .models import (
    ASK,
    FIRST,
    SUM,
    base_model,
    cache_of,
    cached,
    oracle,
    prompt,
    put,
    twins,
)
from .test_generation import NEW, generate

PLACE, OTHER = 4, 1  # where the invocation lies in the prompt, and in another sequence


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(int(torch.seed()) % 2**31)
    return twins()


def own():
    return put(prompt(1, 12), 0, PLACE, ASK)


def another():
    return put(prompt(1, 9), 0, OTHER, ASK)


def scratch(stock, ids, starts):
    """The logits of the last token, from scratch."""
    offsets = [None if s is None else ids.shape[1] - s for s in starts]
    with torch.no_grad():
        return stock(input_ids=ids, alora_offsets=offsets, use_cache=False).logits[:, -1:]


class Calling(transformers.LogitsProcessor):
    """A logits processor that runs something for every token."""

    def __init__(self, function):
        self.function, self.results = function, []

    def __call__(self, input_ids, scores):
        self.results.append(self.function(input_ids))
        return scores


# ---------------------------------------------------------------------- classifier-free guidance


def guided(stock, ids, starts, negative, others, scale=3.0):
    for _ in range(NEW):
        yes = scratch(stock, ids, starts).log_softmax(-1)
        no = scratch(stock, negative, others).log_softmax(-1)
        token = (no + scale * (yes - no))[:, -1].argmax(-1, keepdim=True)
        ids, negative = torch.cat([ids, token], 1), torch.cat([negative, token], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("where", ["own invocation", "earlier", "none", "default"])
def test_the_negative_branch_is_a_sequence_of_its_own(pair, where, use_cache):
    model, stock = pair
    ids = own()
    if where == "default":  # transformers takes the last token of the prompt
        negative, start, extra = ids[:, -1:], None, {}
    else:
        length = {"own invocation": 9, "earlier": 17, "none": 9}[where]
        negative, start = prompt(1, length), {"earlier": 0, "none": None}.get(where, 5)
        if start is not None:
            put(negative, 0, start, ASK)
        extra = {"negative_prompt_ids": negative}
    got = generate(model, ids, guidance_scale=3.0, use_cache=use_cache, **extra)
    assert torch.equal(got, guided(stock, ids, [PLACE], negative, [start]))


def test_guidance_of_a_batch_with_an_adapter_in_each_row(pair):
    model, stock = pair
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)
    negative = put(put(prompt(2, 8), 0, 1, ASK), 1, 4, SUM)
    extra = {"guidance_scale": 3.0, "negative_prompt_ids": negative}
    got = generate(model, ids, adapter_names=["ask", "sum"], **extra)
    for row, (name, start, other) in enumerate([("ask", 3, 1), ("sum", 5, 4)]):
        stock.set_adapter(name)
        one = slice(row, row + 1)
        assert torch.equal(got[one], guided(stock, ids[one], [start], negative[one], [other]))
    stock.set_adapter("ask")


@pytest.mark.parametrize("how", ["starts", "activation"])
def test_a_scope_around_generate_means_its_own_sequence(pair, how):
    model, stock = pair
    ids, negative = own(), another()
    told = {"starts": [8]} if how == "starts" else {"activation": Activation.from_starts([8], 12)}
    with adapter_scope(model, "ask", **told):
        plain = generate(model, ids)
        got = generate(model, ids, guidance_scale=3.0, negative_prompt_ids=negative)
    assert torch.equal(plain, oracle(stock, ids, NEW, [8]))
    assert torch.equal(got, guided(stock, ids, [8], negative, [OTHER]))


def test_an_activation_that_ends_is_refused_for_generate(pair):
    model, _ = pair
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 3:6] = True
    with (
        adapter_scope(model, "ask", Activation.from_mask(mask)),
        pytest.raises(ValueError, match="stays so to the end"),
    ):
        generate(model, own())


# ---------------------------------------------------------------------- calls of the model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("how", ["the model", "its base", "offsets", "a scope", "generate", "base"])
def test_a_logits_processor_that_calls_the_model(pair, how, use_cache):
    model, stock = pair
    ids, other = own(), another()
    start = 6 if how in ("offsets", "a scope") else OTHER

    def call(_):
        if how == "generate":
            return generate(model, other)
        if how == "base":
            return generate(model.get_base_model(), other)
        if how == "a scope":
            with adapter_scope(model, "ask", starts=[start]):
                return model(input_ids=other).logits[:, -1:]
        called = model.get_base_model() if how == "its base" else model
        extra = {"alora_offsets": [9 - start]} if how == "offsets" else {}
        return called(input_ids=other, **extra).logits[:, -1:]

    calling = Calling(call)
    out = generate(model, ids, logits_processor=[calling], use_cache=use_cache)
    assert torch.equal(out, oracle(stock, ids, NEW, [PLACE]))
    whole = how in ("generate", "base")
    expected = oracle(stock, other, NEW, [OTHER]) if whole else scratch(stock, other, [start])
    for result in calling.results:
        torch.testing.assert_close(result, expected)
    assert len(calling.results) == NEW


def test_a_stopping_criterion_that_decodes_on_a_cache_of_its_own(pair):
    model, stock = pair
    ids, other = own(), another()
    seen = {"ids": other, "cache": None, "right": []}

    class Watch(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if seen["cache"] is None:
                output = model(input_ids=other, use_cache=True)
            else:
                seen["ids"] = torch.cat([seen["ids"], input_ids[:, -1:]], 1)
                output = model(input_ids=input_ids[:, -1:], **cached(model, seen["cache"]))
            seen["cache"] = cache_of(output)
            expected = scratch(stock, seen["ids"], [OTHER])
            seen["right"].append(torch.allclose(output.logits[:, -1:], expected, atol=1e-4))
            return torch.zeros(1, dtype=torch.bool)

    out = generate(model, ids, stopping_criteria=[Watch()])
    assert torch.equal(out, oracle(stock, ids, NEW, [PLACE]))
    assert len(seen["right"]) == NEW and all(seen["right"])


def test_looking_ahead_on_a_copy_of_the_running_cache(pair):
    """A processor that tries a token on a copy of generate's own cache."""
    model, stock = pair
    ids = own()
    cache = transformers.DynamicCache(config=stock.config)
    right = []

    def ahead(rows):
        token = torch.tensor([[33]])
        got = model(input_ids=token, **cached(model, copy.deepcopy(cache))).logits
        expected = scratch(stock, torch.cat([rows, token], 1), [PLACE])
        right.append(torch.allclose(got, expected, atol=1e-4))

    out = generate(model, ids, logits_processor=[Calling(ahead)], **cached(model, cache))
    assert torch.equal(out, oracle(stock, ids, NEW, [PLACE]))
    assert len(right) == NEW and all(right)


# ---------------------------------------------------------------------- other ways to decode


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A decoding method of the user's: candidates on repeated rows, the best ones selected."""
    cache = transformers.DynamicCache(config=model.config)
    logits = model(input_ids=input_ids, **cached(model, cache)).logits
    for _ in range(NEW):
        top = logits[:, -1].topk(3).indices
        cache.batch_repeat_interleave(3)
        logits = model(input_ids=top.reshape(-1, 1), **cached(model, cache)).logits
        best = logits[:, -1].max(-1).values.view(-1, 3).argmax(-1)
        rows = torch.arange(len(input_ids)) * 3 + best
        cache.batch_select_indices(rows)
        logits = logits[rows]
        input_ids = torch.cat([input_ids, top.gather(1, best[:, None])], 1)
    return input_ids


def contrastive_from_scratch(stock, ids, starts):
    for _ in range(NEW):
        top = scratch(stock, ids, starts)[:, -1].topk(3).indices
        tried = torch.cat([ids.repeat_interleave(3, 0), top.reshape(-1, 1)], 1)
        logits = scratch(stock, tried, [s for s in starts for _ in range(3)])
        best = logits[:, -1].max(-1).values.view(-1, 3).argmax(-1)
        ids = torch.cat([ids, top.gather(1, best[:, None])], 1)
    return ids


@pytest.mark.parametrize("told", ["searched", "offsets", "scope"])
@pytest.mark.parametrize("named", [True, False])
def test_a_decoding_method_of_the_users(pair, told, named, monkeypatch):
    """Given to the call, or in the place of transformers' own, as code from the hub puts it."""
    model, stock = pair
    ids = put(put(prompt(2, 12), 0, 4, ASK), 1, 7, ASK)
    starts = [4, 7] if told == "searched" else [8, 2]
    how = {"custom_generate": contrastive} if named else {}
    if not named:
        monkeypatch.setattr(
            type(model.get_base_model()),
            "_sample",
            lambda self, input_ids, **_: contrastive(self, input_ids, None, None, None),
        )
    if told == "offsets":
        how["alora_offsets"] = [12 - s for s in starts]
    if told == "scope":
        with adapter_scope(model, "ask", starts=starts):
            got = generate(model, ids, **how)
    else:
        got = generate(model, ids, **how)
    assert torch.equal(got, contrastive_from_scratch(stock, ids, starts))


@pytest.mark.parametrize("who", ["the model", "its base", "early exit"])
def test_an_assistant_that_is_the_model_itself(pair, who):
    model, stock = pair
    ids = own()
    how = {"assistant_early_exit": 1}
    if who != "early exit":
        how = {"assistant_model": model if who == "the model" else model.get_base_model()}
    assert torch.equal(generate(model, ids, **how), oracle(stock, ids, NEW, [PLACE]))


def test_an_assistant_that_shares_layers_is_refused(pair):
    """Its forward is not the accelerated model's, so nobody knows what its tokens are."""
    model, stock = pair
    assistant = transformers.LlamaForCausalLM(stock.config).eval()
    assistant.model = model.get_base_model().model
    with pytest.raises(RuntimeError, match="outside the forward"):
        generate(model, own(), assistant_model=assistant)


def test_the_cache_of_beams_is_continued(pair):
    """Beams moved its rows; the record that generate leaves is of the rows as they are."""
    model, _ = pair
    ids = put(put(prompt(2, 12), 0, 4, ASK), 1, 7, ASK)
    out = generate(model, ids, num_beams=3, num_return_sequences=3, return_dict_in_generate=True)
    cache, token = cache_of(out), torch.full((6, 1), FIRST)
    with torch.no_grad():
        got = model(input_ids=token, **cached(model, copy.deepcopy(cache))).logits
        with adapter_scope(model, "ask", starts=[4] * 3 + [7] * 3):
            expected = model(input_ids=token, **cached(model, copy.deepcopy(cache))).logits
        with model.disable_adapter():
            off = model(input_ids=token, **cached(model, cache)).logits
    assert torch.equal(got, expected) and not torch.allclose(got, off, atol=1e-3)


def test_methods_that_were_replaced_before_are_called_and_come_back():
    from alora_kernels.peft import accelerate, restore

    from .models import adapted

    model = adapted(base_model())
    root = model.get_base_model()
    calls = []
    plain = root.prepare_inputs_for_generation

    def mine(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    root.prepare_inputs_for_generation = mine
    accelerate(model)
    ids = own()
    out = generate(model, ids)
    assert len(calls) == NEW
    restore(model)
    assert root.prepare_inputs_for_generation is mine
    assert torch.equal(out, oracle(model, ids, NEW, [PLACE]))


@pytest.mark.slow
def test_compiled_decoding_with_a_negative_branch():
    """The decoding is one graph; the negative branch runs beside it, not compiled."""
    model, stock = twins()
    settings = transformers.CompileConfig(fullgraph=True, backend="eager", dynamic=False)
    settings._compile_all_devices = True  # transformers compiles on a GPU alone
    how = {"compile_config": settings}
    counted = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counted.clear()
    for _ in range(2):
        ids, negative = own(), another()
        cache = transformers.StaticCache(config=stock.config, max_cache_len=40)
        extra = {"guidance_scale": 3.0, "negative_prompt_ids": negative, **cached(model, cache)}
        got = generate(model, ids, **how, **extra)
        assert torch.equal(got, guided(stock, ids, [PLACE], negative, [OTHER]))
        length = int(cache.get_seq_length())
        token = prompt(1, 1)
        with torch.no_grad():
            logits = model(input_ids=token, **cached(model, cache)).logits
        expected = scratch(stock, torch.cat([got[:, :length], token], 1), [PLACE])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert counted["stats"]["unique_graphs"] == 1 and not counted["graph_break"]
