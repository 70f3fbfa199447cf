"""Caches: rows that move, other writers, and caches that do not tell their length.

The right value is PEFT's model recomputed from scratch, or an error that names the trouble.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import get_peft_model

from alora_kernels.peft import accelerate, adapter_scope

from .models import ASK, VOCAB, cached, lora, oracle, prompt, put, twins
from .test_generation import NEW, generate

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(int(torch.seed()) % 2**31)
    return twins()


def scratch(stock, ids, starts):
    offsets = [None if s is None else ids.shape[1] - s for s in starts]
    with torch.no_grad():
        return stock(input_ids=ids, alora_offsets=offsets, use_cache=False).logits


class Running:
    """An own loop: rows of tokens, the cache that holds them, and where they begin."""

    def __init__(self, pair, cache=None):
        self.model, self.stock = pair
        self.cache = transformers.DynamicCache(config=self.stock.config) if cache is None else cache
        self.ids = put(put(prompt(3, 12), 0, 2, ASK), 1, 5, ASK)
        self.starts = [2, 5, None]
        with torch.no_grad():
            self.model(input_ids=self.ids, **cached(self.model, self.cache))

    def take(self, rows):
        """What the test did to the cache's rows."""
        self.ids, self.starts = self.ids[rows], [self.starts[r] for r in rows]

    def step(self, tokens=1):
        """The next tokens are right."""
        new = prompt(len(self.ids), tokens)
        with torch.no_grad():
            got = self.model(input_ids=new, **cached(self.model, self.cache)).logits
        self.ids = torch.cat([self.ids, new], 1)
        expected = scratch(self.stock, self.ids, self.starts)[:, -tokens:]
        torch.testing.assert_close(got, expected, **CLOSE)


def in_place(cache, rows):
    for layer in cache.layers:
        layer.keys[:], layer.values[:] = layer.keys[rows].clone(), layer.values[rows].clone()


MOVES = {
    "reorder_cache": ([1, 0, 2], lambda c, rows: c.reorder_cache(torch.tensor(rows))),
    "beams of one row": ([1, 1, 1], lambda c, rows: c.reorder_cache(torch.tensor(rows))),
    "batch_select_indices": ([2, 1], lambda c, rows: c.batch_select_indices(torch.tensor(rows))),
    "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], lambda c, rows: c.batch_repeat_interleave(2)),
    "written in place": ([2, 0, 1], in_place),
}


@pytest.mark.parametrize("move", MOVES)
def test_rows_that_move_are_found_again(pair, move):
    running = Running(pair)
    running.step()
    rows, act = MOVES[move]
    act(running.cache, rows)
    running.take(rows)
    running.step()
    running.step(3)
    running.cache.crop(-2)
    running.ids = running.ids[:, :-2]
    running.step()


def test_rows_of_a_static_cache_move(pair):
    running = Running(pair, transformers.StaticCache(config=pair[1].config, max_cache_len=40))
    running.cache.reorder_cache(torch.tensor([1, 2, 0]))
    running.take([1, 2, 0])
    running.step()
    running.step(2)


def test_rows_of_a_sliding_cache_move():
    pair = twins("gemma3")
    running = Running(pair)
    for rows in ([1, 0, 2], [2, 0, 1]):
        running.step()
        running.cache.reorder_cache(torch.tensor(rows))
        running.take(rows)
    running.step()


def test_a_cache_in_8_bits_is_continued(pair):
    """Its values are rounded, so the reference reads the same cache, told where rows begin."""
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache in 8-bit floating point")
    model, stock = pair
    running = Running(pair, transformers.QuantizedCache("fp8", stock.config))
    running.cache.reorder_cache(torch.tensor([1, 0, 2]))
    new = prompt(3, 1)
    with torch.no_grad():
        got = model(input_ids=new, **cached(model, copy.deepcopy(running.cache))).logits
        with adapter_scope(model, "ask", starts=[5, 2, None]):
            expected = model(input_ids=new, **cached(model, running.cache)).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copies_are_continued(pair, how):
    running = Running(pair)
    running.step()
    running.cache = how(running.cache)
    running.step()


def empty(cache):
    cache.reset()
    if int(cache.get_seq_length()):
        pytest.skip("the reset of this transformers empties no dynamic cache")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_reset(pair, kind):
    model, stock = pair
    config = stock.config
    running = Running(
        pair,
        transformers.StaticCache(config=config, max_cache_len=40) if kind == "static" else None,
    )
    for length in (12, 7, 20):  # as long as before, shorter, longer
        empty(running.cache)
        running.ids = put(prompt(1, length), 0, 3, ASK).expand(3, -1).clone()
        running.starts = [3] * 3
        with torch.no_grad():
            model(input_ids=running.ids, **cached(model, running.cache))
        running.step()


# ---------------------------------------------------------------------- other writers


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_another_model_refilled_is_not_believed(pair, kind):
    """As long as before, in the same object: the record would fit by its length."""
    model, stock = pair
    cache = None
    if kind == "static":
        cache = transformers.StaticCache(config=stock.config, max_cache_len=40)
    running = Running(pair, cache)
    cache = running.cache
    empty(cache)
    ids = prompt(3, 12)
    with torch.no_grad(), stock.disable_adapter():
        stock(input_ids=ids, **cached(stock, cache))
    with torch.no_grad(), pytest.raises(ValueError, match="it is not known whether"):
        model(input_ids=prompt(3, 1), **cached(model, copy.deepcopy(cache)))
    tail = torch.tensor([[*ASK, 33]] * 3)  # in which every row begins
    with torch.no_grad():
        got = model(input_ids=tail, **cached(model, cache)).logits
    expected = scratch(stock, torch.cat([ids, tail], 1), [12] * 3)[:, -4:]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_reset_cache_that_the_base_model_refilled_is_known(pair):
    model, _ = pair
    running = Running(pair)
    cache = running.cache
    empty(cache)
    ids = put(prompt(3, 12), 1, 6, ASK)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids, **cached(model, cache))
    with torch.no_grad(), pytest.raises(ValueError, match="the cache already covers 12 tokens"):
        model(input_ids=prompt(3, 1), **cached(model, cache))


def test_a_cache_rebuilt_from_its_tensors_is_refused(pair):
    running = Running(pair)
    layers = [(layer.keys, layer.values) for layer in running.cache.layers]
    with pytest.raises(ValueError, match="it is not known whether the adapter has begun"):
        running.cache = transformers.DynamicCache(layers)
        running.step()
    model = running.model
    new = prompt(3, 1)
    with torch.no_grad(), adapter_scope(model, "ask", starts=running.starts):
        got = model(input_ids=new, **cached(model, transformers.DynamicCache(layers))).logits
    whole = torch.cat([running.ids, new], 1)
    expected = scratch(running.stock, whole, running.starts)[:, -1:]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_outputs_as_tuples_are_continued(pair):
    model, stock = pair
    ids = put(prompt(1, 12), 0, 4, ASK)
    new = prompt(1, 1)
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True, return_dict=False)
        got = model(input_ids=new, return_dict=False, **cached(model, first[1]))[0]
    expected = scratch(stock, torch.cat([ids, new], 1), [4])[:, -1:]
    torch.testing.assert_close(got, expected, **CLOSE)


# ---------------------------------------------------------------------- caches without a length


class Mute(transformers.DynamicCache):
    """A cache that must not be asked."""

    def get_seq_length(self, *_):
        raise AssertionError("asked")


@pytest.mark.parametrize("how", ["plain", "disabled", "base", "row by row"])
def test_adapters_without_a_place_never_ask_the_cache(pair, how):
    model, _ = pair
    ids = prompt(1, 9)
    places = torch.arange(9)[None]
    owner = model.__dict__["_alora_acceleration"]
    keywords = {"input_ids": ids, "position_ids": places, **cached(model, Mute())}
    if how == "plain":
        model.set_adapter("plain")
        state = owner.forwards.state_of((), keywords)
        model.set_adapter("ask")
        assert state.activations["plain"].num_active == 9
    elif how == "disabled":
        with model.disable_adapter():
            assert owner.forwards.state_of((), keywords).activations == {}
    else:
        with adapter_scope(model, None if how == "base" else ["plain"]):
            state = owner.forwards.state_of((), keywords)
        assert len(state.activations) == (how != "base")
    with pytest.raises(AssertionError, match="asked"):
        owner.forwards.state_of((), keywords)


def recurrent(kind):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    if kind == "mamba":
        config = transformers.MambaConfig(**sizes, state_size=8)
        return transformers.MambaForCausalLM(config).eval()
    config = transformers.Mamba2Config(
        **sizes, state_size=8, num_heads=8, head_dim=8, expand=2, n_groups=1, chunk_size=8
    )
    return transformers.Mamba2ForCausalLM(config).eval()


def recurrent_twins(kind, tokens=ASK):
    stock = get_peft_model(recurrent(kind), lora(tokens, target_modules=["in_proj"])).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return accelerate(copy.deepcopy(stock), strict=True), stock


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_on_recurrent_layers(kind, use_cache):
    model, stock = recurrent_twins(kind)
    ids = put(put(prompt(2, 14), 0, 4, ASK), 1, 6, ASK)
    got = generate(model, ids, use_cache=use_cache)
    assert torch.equal(got, oracle(stock, ids, NEW, [4, 6]))


def test_a_plain_lora_on_recurrent_layers():
    model, stock = recurrent_twins("mamba2", None)
    ids = prompt(2, 14)
    assert torch.equal(generate(model, ids), generate(stock, ids))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("name", [None, "cache_params"])
def test_an_own_loop_on_recurrent_layers(kind, name):
    model, stock = recurrent_twins(kind)
    ids = put(put(prompt(2, 14), 0, 4, ASK), 1, 6, ASK)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        for _ in range(3):
            new = prompt(2, 1)
            ids = torch.cat([ids, new], 1)
            key = next(k for k in ("cache", "past_key_values", "cache_params") if k in output)
            extra = {name or key: output[key]}
            if key == "cache_params":  # transformers 4.57 has to be told
                extra["cache_position"] = torch.tensor([ids.shape[1] - 1])
            output = model(input_ids=new, use_cache=True, **extra)
            expected = scratch(stock, ids, [4, 6])[:, -1:]
            torch.testing.assert_close(output.logits, expected, **CLOSE)


def test_a_recurrent_cache_of_another_model_is_refused():
    model, stock = recurrent_twins("mamba2")
    ids = put(prompt(1, 14), 0, 4, ASK)
    with torch.no_grad():
        cache = stock(input_ids=ids, alora_offsets=[10], use_cache=True)
    key = next(k for k in ("cache", "cache_params") if k in cache)
    with torch.no_grad(), pytest.raises(ValueError, match="not known how many tokens"):
        model(input_ids=prompt(1, 1), use_cache=True, **{key: cache[key]})
    with pytest.raises(ValueError, match="not known how many tokens"):
        generate(model, prompt(1, 1), **{key: cache[key]})


def test_a_state_that_is_a_list_is_no_new_sequence():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    config = transformers.RwkvConfig(
        **sizes, context_length=64, attention_hidden_size=32, intermediate_size=64
    )
    base = transformers.RwkvForCausalLM(config).eval()
    model = get_peft_model(base, lora(ASK, target_modules=["key", "value"])).eval()
    accelerate(model)
    owner = model.__dict__["_alora_acceleration"]
    ids = put(prompt(1, 12), 0, 4, ASK)
    with torch.no_grad():
        state = model(input_ids=ids, use_cache=True).state
    new = {"input_ids": prompt(1, 1)}
    assert (
        owner.forwards.state_of((), {**new, "state": state}).activations["default"].num_active == 1
    )
    with pytest.raises(ValueError, match="not known how many tokens"):
        owner.forwards.state_of((), {**new, "state": [t.clone() + 1 for t in state]})
    out = generate(model, ids)
    with torch.no_grad(), adapter_scope(model, "default", starts=[4]):  # transformers' own decoding
        told, state = ids, None
        for _ in range(NEW):
            last = told if state is None else told[:, -1:]
            # Every token of the prompt after the fourth is active, so every new one is.
            with adapter_scope(model, "default", starts=[4 if state is None else 0]):
                output = model(input_ids=last, state=state, use_cache=True)
            state = output.state
            told = torch.cat([told, output.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, told)


BATCHING = hasattr(transformers.LlamaForCausalLM, "init_continuous_batching")


@pytest.mark.skipif(not BATCHING, reason="this transformers has no continuous batching")
@pytest.mark.parametrize("way", ["generate_batch", "init_continuous_batching", "generate"])
def test_continuous_batching_is_refused(pair, way):
    """Of an activated adapter, and under a scope: it runs in a thread that no scope reaches."""
    model, _ = pair
    ids = put(prompt(1, 12), 0, 4, ASK)

    def call():
        if way == "generate":
            if transformers.__version__ < "5":
                pytest.skip("generate of this transformers has no paged cache")
            return model.generate(ids, cache_implementation="paged", max_new_tokens=2)
        return getattr(model, way)(*([ids.tolist()] if way == "generate_batch" else []))

    with pytest.raises(NotImplementedError, match="'ask' is an Activated LoRA"):
        call()
    with adapter_scope(model, "plain"), pytest.raises(NotImplementedError, match="adapter_scope"):
        call()


@pytest.mark.slow
@pytest.mark.skipif(not BATCHING, reason="this transformers has no continuous batching")
def test_continuous_batching_of_a_plain_lora(pair):
    model, stock = pair
    prompts = [prompt(1, n)[0].tolist() for n in (12, 7)]
    settings = transformers.GenerationConfig(
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        num_blocks=32,
        block_size=32,
        max_batch_tokens=64,
    )
    for m in pair:
        m.set_adapter("plain")
    expected = [oracle(stock, torch.tensor([p]), 3, [None])[0, -3:].tolist() for p in prompts]
    outputs = model.generate_batch(prompts, generation_config=settings).values()
    for m in pair:
        m.set_adapter("ask")
    assert [output.generated_tokens for output in outputs] == expected


@pytest.mark.parametrize("goes_on", ["with the invocation", "with other tokens"])
def test_a_cache_that_is_cropped_inside_the_invocation(pair, goes_on):
    model, stock = pair
    ids = put(prompt(1, 12), 0, 4, ASK)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=stock.config)
        model(input_ids=ids, **cached(model, cache))
        cache.crop(-7)  # five tokens are left, one of them of the invocation
        new = put(prompt(1, 4), 0, 0, ASK[1:]) if goes_on == "with the invocation" else prompt(1, 4)
        if goes_on == "with other tokens":
            with pytest.raises(ValueError, match="cropped to 5 tokens, inside the invocation"):
                model(input_ids=new, **cached(model, cache))
            return
        got = model(input_ids=new, **cached(model, cache)).logits
    expected = scratch(stock, torch.cat([ids[:, :5], new], 1), [4])[:, 5:]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("again", [False, True], ids=["base", "invoked again"])
def test_a_cache_that_is_cropped_to_where_the_adapter_began(pair, again):
    """Nothing that the adapter wrote is left, so it has not begun."""
    model, stock = pair
    ids = put(prompt(1, 12), 0, 4, ASK)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=stock.config)
        model(input_ids=ids, **cached(model, cache))
        cache.crop(-8)
        new = put(prompt(1, 6), 0, 2, ASK) if again else prompt(1, 6)
        got = model(input_ids=new, **cached(model, cache)).logits
    expected = scratch(stock, torch.cat([ids[:, :4], new], 1), [6 if again else None])[:, 4:]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_one_cache_of_two_models(pair):
    """An adapter of the same name in another model has not begun in this cache."""
    model, stock = pair
    second, plain = twins()
    second.load_state_dict(stock.state_dict())
    second.peft_config["ask"].alora_invocation_tokens = [30, 31]
    plain.load_state_dict(stock.state_dict())
    ids = put(prompt(1, 12), 0, 4, ASK)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=stock.config)
        model(input_ids=ids, **cached(model, cache))
        tail = torch.tensor([[30, 31, 40]])
        got = second(input_ids=tail, **cached(second, copy.deepcopy(cache))).logits
        with adapter_scope(second, "ask", starts=[12]):
            expected = second(input_ids=tail, **cached(second, copy.deepcopy(cache))).logits
        assert torch.equal(got, expected)
        off = second(input_ids=prompt(1, 1), **cached(second, cache)).logits
    assert off.shape[1] == 1
