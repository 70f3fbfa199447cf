"""Generation: every way to decode equals PEFT's model recomputed from scratch, token for token."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from .models import ASK, FIRST, SUM, VOCAB, base_model, cache_of, cached, oracle, prompt, put, twins

NEW = 6


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(int(torch.seed()) % 2**31)
    return twins()


def generate(model, ids, **kwargs):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    return model.generate(input_ids=ids, **{**settings, **kwargs})


def asked(batch=2, length=14):
    ids = prompt(batch, length)
    for row in range(batch):
        put(ids, row, 4 + 3 * row, ASK)
    return ids, [4 + 3 * row for row in range(batch)]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "dynamic"},
    ],
    ids=str,
)
def test_greedy(pair, how):
    model, stock = pair
    ids, starts = asked()
    if "prefill_chunk_size" in how:
        try:
            generate(base_model(), ids, **how)
        except ValueError as error:  # transformers 5.0
            pytest.skip(f"this transformers does not prefill in chunks: {error}")
    assert torch.equal(generate(model, ids, **how), oracle(stock, ids, NEW, starts))


# (A token that no model gives: transformers 4.57 looks for the end of a sequence in any case.)
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB}


@pytest.mark.parametrize("how", [LOOKUP, "assistant", "itself"], ids=str)
def test_assisted_decoding(pair, how):
    model, stock = pair
    ids, starts = asked(1)
    ids[0, 7:13] = ids[0, [4, 5, 6, 4, 5, 6]]  # repetitions, so that candidates are found
    starts = [10]
    if how == "assistant":
        how = {"assistant_model": transformers.LlamaForCausalLM(stock.config).eval()}
    elif how == "itself":  # every candidate is accepted
        how = {"assistant_model": copy.deepcopy(model)}
    assert torch.equal(generate(model, ids, **how), oracle(stock, ids, NEW, starts))


def test_num_return_sequences(pair):
    model, stock = pair
    ids, starts = asked()
    torch.manual_seed(3)
    out = generate(model, ids, num_return_sequences=3, do_sample=True, top_k=1)
    assert torch.equal(out, oracle(stock, ids, NEW, starts).repeat_interleave(3, 0))


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_beams(pair, where):
    """The score of every beam is what the model gives to that sequence from scratch."""
    model, stock = pair
    ids, starts = asked()
    settings = {"num_beams": 3, "num_return_sequences": 2}
    if where == "generation_config":
        settings = {"generation_config": transformers.GenerationConfig(**settings)}
    out = generate(
        model, ids, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **settings
    )
    offsets = [out.sequences.shape[1] - s for s in starts for _ in range(2)]
    with torch.no_grad():
        logits = stock(input_ids=out.sequences, alora_offsets=offsets).logits
    new = logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    score = new.gather(-1, out.sequences[:, ids.shape[1] :, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, score, atol=1e-4, rtol=1e-4)


def test_left_padding_does_not_change_a_row(pair):
    model, stock = pair
    ids, starts = asked(1, 11)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    both = torch.cat([padded, put(prompt(1, 15), 0, 2, ASK)])
    masks = torch.cat([mask, torch.ones_like(mask)])
    out = generate(model, both, attention_mask=masks)
    assert torch.equal(out[0, 4:], oracle(stock, ids, NEW, starts)[0])


def test_a_mixed_batch(pair):
    model, stock = pair
    ids = put(put(prompt(4, 12), 0, 3, ASK), 1, 5, SUM)
    names = ["ask", "sum", "__base__", "plain"]
    out = generate(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with stock.disable_adapter():
                expected = oracle(stock, ids[row : row + 1], NEW, [None])
        else:
            stock.set_adapter(name)
            start = {"ask": 3, "sum": 5, "plain": None}[name]
            expected = oracle(stock, ids[row : row + 1], NEW, [start])
            stock.set_adapter("ask")
        assert torch.equal(out[row], expected[0]), name


def test_an_invocation_that_is_generated_changes_nothing(pair):
    """With use_cache=False the whole row comes again, the generated invocation in it."""
    model, stock = pair
    ids, starts = asked(1)

    class Spell(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            step = input_ids.shape[1] - ids.shape[1]
            if step < len(ASK):
                scores = torch.full_like(scores, -1e9)
                scores[:, ASK[step]] = 0
            return scores

    spelled = torch.cat([ids, torch.tensor([ASK])], 1)
    for place in (starts, [None]):
        if place == [None]:
            ids, spelled = ids.clone(), spelled.clone()
            ids[0, 4] = spelled[0, 4] = FIRST  # no invocation in the prompt either
        expected = oracle(stock, spelled, NEW - len(ASK), place)
        for how in ({}, {"use_cache": False}):
            out = generate(model, ids, logits_processor=[Spell()], **how)
            assert torch.equal(out, expected)


def test_the_next_turn_begins_at_the_last_invocation(pair):
    model, stock = pair
    ids, starts = asked(1)
    first = generate(model, ids)
    turn = torch.cat([first, put(prompt(1, 5), 0, 1, ASK)], 1)
    start = first.shape[1] + 1
    assert torch.equal(generate(model, turn), oracle(stock, turn, NEW, [start]))
    assert start != starts[0]


def test_alora_offsets_of_the_user_win(pair):
    model, stock = pair
    ids, _ = asked(2)
    out = generate(model, ids, alora_offsets=[2, None])
    assert torch.equal(out, oracle(stock, ids, NEW, [ids.shape[1] - 2, None]))


def test_inputs_embeds_need_explicit_starts(pair):
    model, stock = pair
    ids, starts = asked(2)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds"):
        generate(model, ids[:, :0], inputs_embeds=embeds, attention_mask=None)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embeds)
    offsets = [ids.shape[1] - s for s in starts]
    with torch.no_grad():
        torch.testing.assert_close(
            model(inputs_embeds=embeds, alora_offsets=offsets).logits,
            stock(input_ids=ids, alora_offsets=offsets).logits,
        )
    mask = torch.ones_like(ids)
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        alora_offsets=offsets,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(out, oracle(stock, ids, NEW, starts)[:, ids.shape[1] :])


def test_short_and_full(pair):
    model, stock = pair
    ids, starts = asked()
    expected = oracle(stock, ids, 1, starts)
    assert torch.equal(generate(model, ids, max_new_tokens=1), expected)
    row = ids[:1]
    stop = int(expected[0, -1])  # the first token is EOS
    out = generate(model, row, eos_token_id=stop)
    assert torch.equal(out, expected[:1])
    full = put(prompt(1, 122), 0, 50, ASK)  # fills max_position_embeddings = 128 exactly
    assert torch.equal(generate(model, full), oracle(stock, full, NEW, [50]))


# ---------------------------------------------------------------------- caches of the user's own


@pytest.mark.parametrize("chunks", [[14] + [1] * 6, [5, 9, 1, 1, 1, 1, 1, 1], [14, 3, 3]])
def test_an_own_loop_with_a_cache(pair, chunks):
    model, stock = pair
    ids, starts = asked(2, 20)
    with torch.no_grad():
        offsets = [20 - s for s in starts]
        expected = stock(input_ids=ids, alora_offsets=offsets).logits
        cache, place, got = transformers.DynamicCache(config=stock.config), 0, []
        if chunks[0] == 5:  # the invocation of row 0 would be cut
            ids = torch.cat([prompt(2, 2), ids[:, :-2]], 1)
            expected = stock(input_ids=ids, alora_offsets=[20 - s - 2 for s in starts]).logits
        for size in chunks:
            part = ids[:, place : place + size]
            got.append(model(input_ids=part, **cached(model, cache)).logits)
            place += size
    torch.testing.assert_close(torch.cat(got, 1), expected)


def test_a_base_cache_then_the_invocation(pair):
    """PEFT's headline use: one base cache, deep-copied, and each adapter invoked upon it."""
    model, stock = pair
    context, length = prompt(1, 10), 10
    with torch.no_grad():
        with model.disable_adapter():
            base = cache_of(model(input_ids=context, use_cache=True))
        for name, tokens in (("ask", ASK), ("sum", SUM)):
            model.set_adapter(name)
            stock.set_adapter(name)
            tail = torch.tensor([[*tokens, 33, 34]])
            whole = torch.cat([context, tail], 1)
            cache = copy.deepcopy(base)
            got = [model(input_ids=tail, **cached(model, cache)).logits]
            got.append(model(input_ids=torch.tensor([[40]]), **cached(model, cache)).logits)
            whole = torch.cat([whole, torch.tensor([[40]])], 1)
            offsets = [whole.shape[1] - length]
            expected = stock(input_ids=whole, alora_offsets=offsets).logits[:, length:]
            torch.testing.assert_close(torch.cat(got, 1), expected)
            out = generate(model, whole[:, :-1], **cached(model, copy.deepcopy(base)))
            assert torch.equal(out, oracle(stock, whole[:, :-1], NEW, [length]))
        model.set_adapter("ask")
        stock.set_adapter("ask")


def test_a_cache_that_covers_the_invocation_is_refused(pair):
    model, _ = pair
    ids, _ = asked(1, 14)  # invocation at 4..6
    for covers in (5, 14):
        with torch.no_grad(), model.disable_adapter():
            cache = cache_of(model(input_ids=ids[:, :covers], use_cache=True))
        rest = torch.cat([ids, prompt(1, 3)], 1)
        with pytest.raises(ValueError, match="the cache already covers"):
            generate(model, rest, **cached(model, copy.deepcopy(cache)))
        with pytest.raises(ValueError, match="the cache already covers"), torch.no_grad():
            model(input_ids=rest[:, covers:], **cached(model, cache))


def test_a_cache_written_by_the_adapter_is_continued(pair):
    """generate again on the cache that generate returned: the adapter goes on."""
    model, stock = pair
    ids, starts = asked(1)
    first = generate(model, ids, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, prompt(1, 3)], 1)
    out = generate(model, whole, **cached(model, cache_of(first)))
    assert torch.equal(out, oracle(stock, whole, NEW, starts))


def test_spelling_the_invocation_token_by_token_warns(pair):
    model, _ = pair
    cache = None
    with torch.no_grad(), pytest.warns(UserWarning, match="one token at a time"):
        for token in [20, 21, *ASK]:
            step = {} if cache is None else cached(model, cache)
            cache = cache_of(model(input_ids=torch.tensor([[token]]), use_cache=True, **step))


def test_sampling_uses_the_adapter(pair):
    model, _ = pair
    ids, _ = asked(1)
    torch.manual_seed(1)
    on = generate(model, ids, do_sample=True, output_logits=True, return_dict_in_generate=True)
    with model.disable_adapter():
        off = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    assert not torch.equal(on.logits[0], off.logits[0])
    assert int(on.sequences.max()) < VOCAB
