"""Loss and gradients of prefix_forward equal those of each row alone, unpadded."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import INVOCATION, KINDS, alone, gradients, make_batch, make_model, worst
from peft.tuners.lora.variants import ALoraLinearVariant

from alora_kernels.training import PrefixStore, prefix_forward

EXACT = 1e-12
# Prefixes above and below the sliding window, one row without a prefix, one without an invocation.
LENGTHS = [(20, 6), (0, 7), (11, 9), (12, 0), (3, 4)]


def run(model, batch, mode, **options):
    output = prefix_forward(model, *batch, mode, **options)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_alone(kind, pad, seed):
    model = make_model(kind, seed=seed)
    batch = make_batch(LENGTHS, pad, seed)
    loss, grads = alone(model, *batch)
    store = PrefixStore()
    for mode, options in [
        ("full", {}),
        ("no_grad", {}),
        ("no_grad", {"chunk_size": 5}),
        ("cached", {"store": store, "chunk_size": 7}),
        ("cached", {"store": store}),
    ]:
        got, got_grads = run(model, batch, mode, **options)
        assert abs(got - loss) <= EXACT * loss, (mode, options)
        assert worst(got_grads, grads) <= EXACT, (mode, options)
    assert (store.misses, store.hits) == (4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_on_at_every_suffix_token_is_not_masked(kind, seed, monkeypatch):
    """Without a row of the base model the suffix runs as a plain LoRA; nothing of that is left."""
    model = make_model(kind, seed=seed)
    batch = make_batch([(20, 6), (0, 7), (11, 9), (3, 4)], seed=seed)
    loss, grads = alone(model, *batch)
    layers = [m for m in model.modules() if getattr(m, "lora_variant", None)]
    before = [dict(m.lora_variant) for m in layers]
    with monkeypatch.context() as patch:
        patch.setattr(ALoraLinearVariant, "forward", None)  # a call would raise
        for mode in ("no_grad", "cached"):
            got, got_grads = run(model, batch, mode, store=PrefixStore())
            assert abs(got - loss) <= EXACT * loss
            assert worst(got_grads, grads) <= EXACT
        with pytest.raises(TypeError):
            prefix_forward(model, *make_batch(LENGTHS, seed=seed))  # a row of the base model
    assert layers and [m.lora_variant for m in layers] == before


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_equal_lengths(kind, seed, monkeypatch):
    model = make_model(kind, seed=seed, attention="eager")
    batch = make_batch([(14, 6), (14, 6)], seed=seed, width=20)
    softmax = torch.nn.functional.softmax
    # transformers' eager attention rounds to float32 here, which hides everything below 1e-7.
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)
    )
    loss, grads = alone(model, *batch)
    got, got_grads = run(model, batch, "no_grad", chunk_size=9)
    assert abs(got - loss) <= EXACT * loss
    assert worst(got_grads, grads) <= EXACT


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_eager_attention_padded_float32(kind, seed):
    """In float32 the error against float64 is at most twice that of `full`."""
    batch = make_batch([(14, 6), (5, 9), (0, 4)], seed=seed)
    exact = make_model(kind, seed=seed, attention="sdpa")
    model = make_model(kind, seed=seed, attention="eager", dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
    _, want = alone(exact, *batch)
    _, full = run(model, batch, "full")
    _, mine = run(model, batch, "no_grad")

    def error(grads):
        return sum(float((grads[n].double() - want[n]).square().sum()) for n in want) ** 0.5

    assert error(mine) <= 2 * error(full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant, seed):
    model = make_model(kind, seed=seed)
    batch = make_batch(LENGTHS, "left", seed)
    loss, grads = alone(model, *batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(2):
        got, got_grads = run(model, batch, "no_grad", chunk_size=6)
        assert abs(got - loss) <= EXACT * loss
        assert worst(got_grads, grads) <= EXACT
        # Evaluation between two steps must not leave anything behind in the layers.
        with torch.no_grad():
            assert abs(prefix_forward(model, *batch).loss - loss) <= EXACT * loss


def test_checkpointing_recomputes_the_layers(seed):
    """The suffix really is checkpointed: layers run again in backward."""
    model = make_model(seed=seed)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    runs = []
    model.get_base_model().model.layers[1].input_layernorm.register_forward_hook(
        lambda *_: runs.append(1)
    )
    loss = prefix_forward(model, *make_batch([(9, 6)], seed=seed)).loss
    before = len(runs)
    loss.backward()
    assert (before, len(runs)) == (2, 3)  # prefix, suffix; then the suffix again


def test_last_layer_stops_after_keys_and_values(seed):
    model = make_model(seed=seed)
    layers = model.get_base_model().model.layers
    batch = make_batch([(16, 6), (12, 6)], seed=seed)
    tokens = {"first": 0, "last": 0, "head": 0}

    def count(name):
        def hook(module, args, output):
            tokens[name] += output.shape[0] * output.shape[1]

        return hook

    layers[0].mlp.register_forward_hook(count("first"))
    layers[-1].mlp.register_forward_hook(count("last"))
    model.get_base_model().lm_head.register_forward_hook(count("head"))
    own = [dict(m.__dict__) for m in layers]
    prefix_forward(model, *batch, chunk_size=8)
    # Each prefix runs by itself; the head sees one token of each.
    assert tokens == {"first": 16 + 12 + 2 * 6, "last": 2 * 6, "head": 2 + 2 * 6}
    assert [m.__dict__.keys() for m in layers] == [d.keys() for d in own]


def test_prefixes_run_whole_where_they_fit(seed):
    """Four rows of at most 8 tokens each on the mean: a long one in chunks, the others together."""
    model = make_model(seed=seed)
    batch = make_batch([(6, 5), (40, 6), (9, 6), (10, 4)], seed=seed)
    loss, grads = alone(model, *batch)
    shapes = []
    first = model.get_base_model().model.layers[0]
    hook = first.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape[:2])))
    got, got_grads = run(model, batch, "no_grad", chunk_size=8)
    hook.remove()
    assert shapes == [(1, 32), (1, 8), (3, 10), (4, 6)]  # the last are the suffixes
    assert abs(got - loss) <= EXACT * loss
    assert worst(got_grads, grads) <= EXACT


@pytest.mark.parametrize("checkpointed", [False, True])
def test_exception_leaves_the_model_as_it_was(checkpointed, seed):
    model = make_model(seed=seed)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    batch = make_batch([(16, 6)], seed=seed)
    layer = model.get_base_model().model.layers[-1]

    def fail(*_):
        raise RuntimeError("on purpose")

    for module in (layer.self_attn.k_proj, layer.mlp):  # inside the prefix pass, then the suffix
        before = {n: dict(m.__dict__) for n, m in model.named_modules()}
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            prefix_forward(model, *batch)
        handle.remove()
        for name, m in model.named_modules():
            for flag in ("gradient_checkpointing", "_disable_adapters", "_adapters_disabled",
                         "lora_variant"):  # fmt: skip
                assert m.__dict__.get(flag) == before[name].get(flag), (name, flag)
            assert "forward" not in m.__dict__ or "forward" in before[name]


def test_no_random_number_is_drawn_for_the_prefix(seed):
    """With adapter dropout, cached and no_grad see the same masks, hit or miss."""
    model = make_model(seed=seed, dropout=0.5)
    batch = make_batch([(16, 6), (7, 9)], seed=seed)
    store = PrefixStore()
    losses = []
    for mode in ("no_grad", "cached", "cached"):
        torch.manual_seed(seed)
        losses.append(prefix_forward(model, *batch, mode, store=store).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[2] == pytest.approx(losses[0], rel=1e-12)
    assert store.hits == 2


def test_earlier_invocations_are_base_tokens(seed):
    """The last invocation counts, and an earlier one in the prefix changes nothing."""
    model = make_model(seed=seed)
    ids, mask, labels = make_batch([(16, 6)], seed=seed)
    ids[0, 4:6] = torch.tensor(INVOCATION)
    loss, grads = alone(model, ids, mask, labels)
    got, got_grads = run(model, (ids, mask, labels), "no_grad")
    assert abs(got - loss) <= EXACT * loss
    assert worst(got_grads, grads) <= EXACT


def test_explicit_starts_win(seed):
    """An answer that contains the invocation moves PEFT's start, not an explicit one."""
    model = make_model(seed=seed)
    ids, mask, labels = make_batch([(16, 9)], seed=seed, width=25)
    ids[0, 21:23] = labels[0, 21:23] = torch.tensor(INVOCATION)
    output = model(input_ids=ids, alora_offsets=[9])
    want = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    want.backward()
    grads = gradients(model)
    for mode in ("full", "no_grad"):
        got, got_grads = run(model, (ids, mask, labels), mode, starts=[16])
        assert abs(got - want) <= EXACT * want
        assert worst(got_grads, grads) <= EXACT
    moved, _ = run(model, (ids, mask, labels), "no_grad")
    assert abs(moved - want) > 1e-6 * want


def test_every_row_starts_at_zero_falls_to_full(seed):
    model = make_model(seed=seed)
    batch = make_batch([(0, 6), (0, 9)], seed=seed)
    loss, grads = alone(model, *batch)
    calls = []
    model.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))
    got, got_grads = run(model, batch, "no_grad")
    assert len(calls) == 1
    assert abs(got - loss) <= EXACT * loss
    assert worst(got_grads, grads) <= EXACT


def test_row_without_invocation_warns_once_with_its_index(seed):
    model = make_model(seed=seed)
    batch = make_batch([(9, 6), (9, 0)], seed=seed)
    with pytest.warns(UserWarning, match=r"rows \[1\]"):
        prefix_forward(model, *batch)


def test_row_without_invocation_keeps_its_labels(seed):
    """Its loss counts as in `full`, and its gradient is zero there too."""
    model = make_model(seed=seed)
    ids, mask, labels = make_batch([(9, 6), (12, 0)], seed=seed)
    labels[1, 8:12] = ids[1, 8:12]
    loss, grads = alone(model, ids, mask, labels)
    with pytest.warns(UserWarning, match="no invocation"):
        got, got_grads = run(model, (ids, mask, labels), "no_grad")
    assert abs(got - loss) <= EXACT * loss
    assert worst(got_grads, grads) <= EXACT


def test_prefix_labels_count_in_the_normalisation(seed):
    """Gradients equal a plain model call; the loss lacks the prefix's constant term."""
    model = make_model(seed=seed)
    ids, mask, _ = make_batch([(9, 6), (9, 6)], seed=seed, width=15)
    labels = ids.clone()
    loss, grads = alone_all(model, ids, labels)
    with pytest.warns(UserWarning, match=r"18 of 28 labels"):
        got, got_grads = run(model, (ids, mask, labels), "no_grad")
    full, full_grads = run(model, (ids, mask, labels), "full")
    assert abs(full - loss) <= EXACT * loss
    assert got < 0.9 * loss
    assert worst(got_grads, grads) <= EXACT
    assert worst(full_grads, grads) <= EXACT


def alone_all(model, ids, labels):
    logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), gradients(model)


def test_accumulation_equals_one_batch(seed):
    model = make_model(seed=seed)
    ids, mask, labels = make_batch([(16, 6), (7, 9), (3, 4)], seed=seed)
    loss, grads = alone(model, ids, mask, labels)
    count = (labels != -100).sum()
    total = 0
    for part in (slice(0, 1), slice(1, 3)):
        out = prefix_forward(model, ids[part], mask[part], labels[part], num_items_in_batch=count)
        out.loss.backward()
        total += out.loss.detach()
    assert abs(total - loss) <= EXACT * loss
    assert worst(gradients(model), grads) <= EXACT


def test_position_ids_are_used_and_keyed(seed):
    model = make_model(seed=seed)
    batch = make_batch([(9, 6)], seed=seed, width=15)
    store = PrefixStore()
    # RoPE is relative, so a stretch (not a shift) must change the result.
    places = torch.arange(15)[None] * 2
    plain = prefix_forward(model, *batch, "cached", store=store).loss
    stretched = prefix_forward(model, *batch, "cached", store=store, position_ids=places).loss
    full = prefix_forward(model, *batch, "full", position_ids=places).loss
    assert store.hits == 0
    assert abs(stretched - full) <= EXACT * full
    assert abs(plain - full) > 1e-6


def test_logits_and_labels_of_the_suffix(seed):
    model = make_model(seed=seed)
    ids, mask, labels = make_batch([(16, 6), (7, 9)], seed=seed)
    out = prefix_forward(model, ids, mask, labels)
    full = prefix_forward(model, ids, mask, labels, "full")
    assert out.logits.shape[:2] == (2, 9)
    for b, (p, s) in enumerate([(16, 6), (7, 9)]):
        torch.testing.assert_close(out.logits[b, :s], full.logits[b, p : p + s], rtol=1e-11, atol=0)
        assert torch.equal(out.labels[b, : s - 1], labels[b, p + 1 : p + s])
        assert (out.labels[b, s - 1 :] == -100).all()


def test_bfloat16_base_with_float32_adapter(seed):
    """Mixed precision as PEFT makes it: close to `full` at the level of bfloat16."""
    model = make_model(seed=seed, dtype=torch.float32)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16()
    batch = make_batch([(16, 6), (7, 9)], seed=seed)
    exact = make_model(seed=seed)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
    want, want_grads = alone(exact, *batch)
    full, full_grads = run(model, batch, "full")
    mine, mine_grads = run(model, batch, "no_grad")
    as_double = [{n: g.double() for n, g in d.items()} for d in (full_grads, mine_grads)]
    error = [sum(float((d[n] - want_grads[n]).square().sum()) for n in d) ** 0.5 for d in as_double]
    assert error[1] <= 2 * error[0]
    assert abs(mine.double() - want) <= 2 * abs(full.double() - want) + 2**-8 * want


COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
OTHERS = {
    "Cohere2Config": {**COMMON, "sliding_window": 8},
    "GPT2Config": {
        "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "GPTNeoXConfig": {k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
    "GraniteConfig": COMMON,
    "Olmo2Config": COMMON,
    "Phi3Config": COMMON,
    "Qwen2Config": COMMON,
    "SmolLM3Config": COMMON,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, seed):
    model = make_model(config=getattr(transformers, name)(**OTHERS[name]), seed=seed)
    batch = make_batch([(20, 6), (11, 9), (0, 7)], "left", seed)
    loss, grads = alone(model, *batch)
    got, got_grads = run(model, batch, "no_grad", chunk_size=8)
    assert abs(got - loss) <= EXACT * loss
    assert worst(got_grads, grads) <= EXACT
