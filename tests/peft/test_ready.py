"""The short way of inference notices every change, and quantised bases keep their own forward."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from alora_kernels import Activation
from alora_kernels.peft import accelerate, adapter_scope
from alora_kernels.peft import layers as layers_module

from .models import ASK, FIRST, SUM, adapted, base_model, cached, lora, prompt, put, twins


def layers(model):
    base = model.get_base_model()
    if hasattr(base, "transformer"):  # GPT-2, whose base layers are Conv1D
        block = base.transformer.h[0]
        return block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj
    block = base.model.layers[0]
    return block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj


def rescale(model):
    for layer in layers(model):
        layer.set_scale("ask", 2.5)


def train(model):
    model.train()
    for layer in layers(model):
        assert isinstance(layer.lora_dropout["ask"], nn.Identity)


def new_parameter(model):
    torch.manual_seed(0)
    for layer in layers(model):
        layer.lora_A["ask"].weight = nn.Parameter(torch.randn_like(layer.lora_A["ask"].weight))


def in_place(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["ask"].weight.normal_()
            layer.base_layer.weight.mul_(1.5)


def swap_data(model):
    torch.manual_seed(0)
    for layer in layers(model):
        weight = layer.lora_B["ask"].weight
        weight.data = torch.randn_like(weight)


def swap_base_data(model):
    torch.manual_seed(0)
    for layer in layers(model):
        weight = layer.base_layer.weight
        weight.data = torch.randn_like(weight)


def turn_base_data(model):
    """Other strides at the same address."""
    turned = 0
    for layer in layers(model):
        weight = layer.base_layer.weight
        if weight.shape[0] == weight.shape[1]:
            weight.data = weight.data.t()
            turned += 1
    assert turned


def new_base(model):
    torch.manual_seed(0)
    for layer in layers(model):
        layer.base_layer = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)


def new_bias(model):
    torch.manual_seed(0)
    for layer in layers(model):
        bias = nn.Parameter(torch.randn(layer.out_features), requires_grad=False)
        layer.base_layer.bias = bias


def new_adapter(model):
    model.base_model.delete_adapter("ask")
    torch.manual_seed(0)
    model.base_model.inject_adapter(model.base_model.model, "ask", autocast_adapter_dtype=True)


def hook(model):
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda _, args, out: out * 0.5)
        layer.lora_A["ask"].register_forward_hook(lambda _, args, out: out * 2)


def disable(model):
    model.base_model.disable_adapter_layers()


def switch(model):
    model.set_adapter("sum")


def switch_one_layer(model):
    layers(model)[1].set_adapter("plain")


def double(model):
    model.double()


def half_the_layers(model):
    for layer in layers(model)[1:]:
        layer._disable_adapters = True


CHANGES = [
    rescale,
    train,
    new_parameter,
    in_place,
    swap_data,
    swap_base_data,
    turn_base_data,
    new_base,
    new_bias,
    hook,
    disable,
    switch,
    switch_one_layer,
    double,
    half_the_layers,
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_between_two_tokens_is_noticed(change, kind):
    model, stock = twins(kind)
    ids = put(put(prompt(2, 9), 0, 2, ASK), 1, 4, SUM)
    tokens = prompt(2, 1)
    whole = torch.cat([ids, tokens], 1)
    with torch.no_grad():
        model(input_ids=ids)
        with adapter_scope(model, "ask", Activation.all(2)):
            model(input_ids=tokens)  # prepares
        before = model(input_ids=whole).logits
        model(input_ids=whole)  # the short way
        for m in (model, stock):
            change(m)
        expected = stock(input_ids=whole).logits
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=whole).logits, expected)
    if change is not train:
        assert not torch.allclose(before.to(expected.dtype), expected)


UNMIXED = (train, disable, switch, switch_one_layer)


def mixed(model, ids, **keywords):
    return model(
        input_ids=ids, adapter_names=["sum", "ask", "__base__", "plain"], **keywords
    ).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [c for c in CHANGES if c not in UNMIXED])
def test_a_change_between_two_mixed_batches_is_noticed(change, kind):
    model, stock = twins(kind)
    ids = put(put(prompt(4, 9), 0, 2, SUM), 1, 4, ASK)
    with torch.no_grad():
        before = mixed(model, ids)
        torch.testing.assert_close(before, mixed(stock, ids))
        for m in (model, stock):
            change(m)
        expected = mixed(stock, ids)
        for _ in range(2):
            torch.testing.assert_close(mixed(model, ids), expected)
    assert not torch.allclose(before.to(expected.dtype), expected)


def test_several_active_adapters_take_the_short_way(monkeypatch):
    """On the same rows: their parts add up, each from its own start, with groups or without."""
    model, stock = twins()
    ids = put(put(prompt(2, 12), 0, 2, ASK), 0, 6, SUM)
    for m in (model, stock):
        m.base_model.set_adapter(["ask", "plain"])
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        for way in range(3):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            if way == 0:
                monkeypatch.setattr(layers_module, "alora_linear", None)
                monkeypatch.setattr(layers_module, "alora_add", None)
            if way == 1:
                for layer in layers(model):
                    if layer.alora_group is not None:
                        layer.alora_group.dissolve("the test says so")


def test_the_short_ways_of_a_layer_are_bounded():
    model, _ = twins()
    ids = put(prompt(4, 9), 1, 4, ASK)
    names = ["ask", "sum", "plain", "__base__"]
    count = 0
    with torch.no_grad():
        for rows in itertools.product(names, repeat=4):
            count = max(count, len(layers(model)[0].alora_ready))
            model(input_ids=ids[:, :2], adapter_names=list(rows), use_cache=False)
    assert 10 < count <= layers_module.KEPT


def test_the_short_way_knows_autocast():
    """Bound by twice the largest error in five draws that PEFT makes under autocast."""
    model, stock = twins()
    exact, bound = copy.deepcopy(stock).double(), 0.0
    with torch.no_grad():
        for _ in range(5):
            ids = put(put(prompt(4, 9), 0, 2, SUM), 1, 4, ASK)
            true = mixed(exact, ids)
            mixed(model, ids)  # prepares
            with torch.autocast("cpu", torch.bfloat16):
                theirs, mine = mixed(stock, ids), mixed(model, ids)
            bound = max(bound, float((theirs.double() - true).norm()))
            assert mine.dtype == theirs.dtype == torch.bfloat16
            torch.testing.assert_close(mixed(model, ids), mixed(stock, ids))
    assert (mine.double() - true).norm() <= 2 * bound
    hidden = torch.randn(4, 9, model.config.hidden_size)
    projection = layers(model)[0]
    with torch.no_grad(), adapter_scope(model, "ask", Activation.all(36)):
        for _ in range(2):
            assert projection(hidden).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert projection(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_decoding_equals_peft(dtype):
    """One token at a time, bound by twice PEFT's own error in float64."""
    model, stock = twins("llama", dtype)
    exact = copy.deepcopy(stock).double()
    ids = put(put(prompt(4, 12), 0, 2, SUM), 1, 4, ASK)
    with torch.no_grad():
        true, theirs = mixed(exact, ids), mixed(stock, ids)
        cache, got = None, []
        for part in (ids[:, :7], *ids[:, 7:].split(1, 1)):
            extra = {} if cache is None else cached(model, cache)
            names = ["sum", "ask", "__base__", "plain"]
            out = model(input_ids=part, adapter_names=names, use_cache=True, **extra)
            cache = out["cache"] if "cache" in out else out["past_key_values"]
            got.append(out.logits)
    error = (torch.cat(got, 1).double() - true).norm()
    assert error <= 2 * (theirs.double() - true).norm() + 1e-12 * true.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_short_way_is_taken(kind, monkeypatch):
    model, stock = twins(kind)
    ids = put(put(prompt(2, 9), 0, 2, ASK), 1, 4, ASK)
    with torch.no_grad():
        model(input_ids=ids)
        monkeypatch.setattr(layers_module, "alora_linear", None)
        monkeypatch.setattr(layers_module, "alora_linear_group", None)
        for part in (ids, ids[:1, :1], ids[:1, :5]):  # other sizes, other activations
            expected = stock(input_ids=part).logits  # PEFT registers hooks, of its own layers
            torch.testing.assert_close(model(input_ids=part).logits, expected)
        several = put(put(prompt(4, 9), 0, 2, SUM), 1, 4, ASK)
        monkeypatch.setattr(layers_module, "alora_add", None)
        torch.testing.assert_close(mixed(model, several), mixed(stock, several))
    with pytest.raises(TypeError):
        model(input_ids=ids)  # with gradients it is not


def test_dropout_in_training_mode_without_gradient():
    model, _ = twins(lora_dropout=0.5)
    ids = put(prompt(1, 9), 0, 2, ASK)
    with torch.no_grad():
        still = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, still)
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, still)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, still)


def test_dropout_of_several_active_adapters_without_gradient():
    """Nothing is dropped at this probability, but the short way does not serve it."""
    model, stock = twins(lora_dropout=1e-9)
    ids = put(prompt(2, 12), 0, 2, ASK)
    for m in (model, stock):
        m.base_model.set_adapter(["ask", "plain"])
        m.train()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_members_of_a_group_with_different_dropout():
    model, _ = twins(lora_dropout=0.5)
    model.train()
    q, v, _ = layers(model)
    v.lora_dropout["ask"] = nn.Identity()
    seen: dict[str, list[torch.Tensor]] = {"q": [], "v": []}
    q.register_forward_hook(lambda *args: seen["q"].append(args[-1]))
    v.register_forward_hook(lambda *args: seen["v"].append(args[-1]))
    ids = put(prompt(1, 9), 0, 2, ASK)
    for _ in range(2):
        model(input_ids=ids)
    assert torch.equal(*seen["v"]) and not torch.equal(*seen["q"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_equals_peft(kind, dtype, batch, changes):
    """One token at a time, bound by twice PEFT's own error in float64."""
    model, stock = twins(kind, dtype, **changes)
    exact = copy.deepcopy(stock).double()
    ids = prompt(batch, 12)
    for row in range(batch):
        put(ids, row, 2 + row, ASK)
    offsets = [12 - 2 - row for row in range(batch)]
    with torch.no_grad():
        true = exact(input_ids=ids, alora_offsets=offsets).logits
        theirs = stock(input_ids=ids, alora_offsets=offsets).logits
        cache = None
        got = []
        for part in (ids[:, :7], *ids[:, 7:].split(1, 1)):
            extra = {} if cache is None else cached(model, cache)
            out = model(input_ids=part, use_cache=True, **extra)
            cache = out["cache"] if "cache" in out else out["past_key_values"]
            got.append(out.logits)
    mine = torch.cat(got, 1)
    error = (mine.double() - true).norm()
    bound = (theirs.double() - true).norm()
    assert error <= 2 * bound + 1e-12 * true.norm()


# ---------------------------------------------------------------------- quantised bases


def quantised(how: str):
    """A tiny Llama with a quantised base and its adapters."""
    base = base_model(hidden_size=64, intermediate_size=64)
    if how == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        config = torchao.Int8WeightOnlyConfig()
        torchao.quantize_(base, config)
        # Where PEFT 0.19 looks for the configuration, to quantise what it merges.
        where = SimpleNamespace(get_apply_tensor_subclass=lambda: config)
        base.hf_quantizer = SimpleNamespace(quantization_config=where)
        stock = adapted(base)
        del base.hf_quantizer
        return stock
    bnb = pytest.importorskip("bitsandbytes")
    for block in base.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                sizes = (linear.in_features, linear.out_features)
                if how == "4bit":
                    new = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                    new.weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4"
                    )
                else:
                    new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(
                        linear.weight.data, requires_grad=False, has_fp16_weights=False
                    )
                setattr(parent, name, new.to("cpu"))
    if how == "4bit":
        base.is_loaded_in_4bit = True
    else:
        base.is_loaded_in_8bit = True
    return adapted(base)


@pytest.mark.parametrize("how", ["4bit", "8bit", "torchao"])
def test_quantised_bases_run_their_own_forward(how):
    stock = quantised(how)
    model = accelerate(copy.deepcopy(stock), strict=True)
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt", "torchao": "TorchaoLoraLinear"}[how]
    assert {type(layer).__name__ for layer in layers(model)} == {kind}
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 6, ASK)
    model(input_ids=ids, labels=ids).loss.backward()
    assert layers(model)[0].lora_A["ask"].weight.grad.any()
    if how != "8bit":  # PEFT writes in place into a view that bitsandbytes made without gradient
        stock(input_ids=ids, labels=ids).loss.backward()
    for mine, other in zip(model.parameters(), stock.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=2e-5, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-4, rtol=1e-3
        )
        # Two aLoRAs in one batch: each row its own offsets (PEFT's bnb layers mix them up).
        put(ids, 1, 6, SUM)
        put(ids, 1, 8, [FIRST])
        mixed = model(input_ids=ids, adapter_names=["ask", "sum"]).logits
        for row, name in enumerate(("ask", "sum")):
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, atol=1e-4, rtol=1e-3)


def test_a_foreign_layer_that_knows_no_offsets():
    """A layer class as GPTQ's and HQQ's: its forward has no room for aLoRA's keyword."""
    from peft.tuners.lora.layer import Linear

    class GPTQLoraLinear(Linear):
        def forward(self, x):  # raises TypeError on alora_offsets, as those do
            return super().forward(x)

    stock = get_peft_model(base_model(), lora(ASK)).eval()
    model = copy.deepcopy(stock)
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = GPTQLoraLinear
    ids = put(prompt(2, 12), 0, 3, ASK)
    with pytest.raises(TypeError):
        copy.deepcopy(model)(input_ids=ids)
    accelerate(model, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
