"""A layer remembers nothing of its last call: every change between two calls counts."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from transformers.utils.deprecation import deprecate_kwarg

from alora_kernels import Activation
from alora_kernels.peft import adapter_scope

from .models import ASK, SUM, cached, layers, prompt, put, twins


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


def rescale_in_place(model):
    """As `hotswap_adapter` does after `prepare_model_for_compiled_hotswap`."""
    for layer in layers(model):
        layer.scaling["ask"].fill_(2.5)


def tensor_scalings(model):
    for layer in layers(model):
        layer.scaling["ask"] = torch.tensor(layer.scaling["ask"])


rescale_in_place.prepare = tensor_scalings


def written_by_others(model):
    """By numpy and over DLPack: torch sees no write."""
    torch.manual_seed(0)
    for layer in layers(model):
        weight, lora_a = layer.base_layer.weight.detach(), layer.lora_A["ask"].weight.detach()
        weight.numpy()[...] = 0.2 * torch.randn(weight.shape).numpy()
        torch.from_dlpack(lora_a).copy_(torch.randn(lora_a.shape))


def other_storage(model):
    torch.manual_seed(0)
    for layer in layers(model):
        for weight in (layer.lora_B["ask"].weight, layer.base_layer.weight):
            with torch.no_grad():
                weight.set_(torch.randn_like(weight))


def same_storage_refilled(model):
    torch.manual_seed(0)
    for layer in layers(model):
        for weight in (layer.lora_B["ask"].weight, layer.base_layer.weight):
            weight.untyped_storage().copy_(torch.randn_like(weight).untyped_storage())


def fused_step(model):
    """transformers' default optimizer: no version counts what it writes."""
    torch.manual_seed(0)
    weights = [p for n, p in model.named_parameters() if "lora_" in n and ".ask." in n]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    torch.optim.AdamW(weights, lr=0.5, fused=True).step()
    for weight in weights:
        weight.grad = None


def halved(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs) * 0.5


def other_forward(part):
    def change(model):
        for layer in layers(model):
            module = layer.base_layer if part == "base_layer" else getattr(layer, part)["ask"]
            module.forward = halved(module.forward)

    change.__name__ = f"other_forward_of_{part}"
    return change


def other_forward_of_dropout(model):
    for layer in layers(model):
        layer.lora_dropout["ask"].forward = lambda x: x * 0.5


def other_dropout(model):
    class Half(nn.Module):
        def forward(self, x):
            return x * 0.5

    for layer in layers(model):
        layer.lora_dropout["ask"] = Half()


def other_forward_of_the_layer(model):
    for layer in layers(model):
        layer.forward = halved(layer.forward)


def other_variant(model):
    class Twice(LoraVariant):
        init = merge_safe = merge_unsafe = unmerge = None

        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            part = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
            return result + 2 * part

    for layer in layers(model):
        layer.lora_variant["ask"] = Twice()


def other_class(model):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.5

    for layer in layers(model):
        if isinstance(layer.base_layer, nn.Linear):
            layer.base_layer.__class__ = Half
        layer.lora_B["ask"].__class__ = Half


class Twice(torch.Tensor):
    """A tensor with a way of its own to be multiplied, as quantised and sharded ones have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is nn.functional.linear else out


def tensors_of_another_kind(model):
    for layer in layers(model):
        for part in (layer.lora_A["ask"], layer.lora_B["ask"]):
            part.weight = nn.Parameter(part.weight.detach().as_subclass(Twice))


def biased(model):
    for layer in layers(model):
        layer.lora_A["ask"].bias = nn.Parameter(torch.ones(4))


def parametrized(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    for layer in layers(model):
        nn.utils.parametrize.register_parametrization(layer.lora_A["ask"], "weight", Half())
        nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Half())


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
    rescale_in_place,
    written_by_others,
    other_storage,
    same_storage_refilled,
    fused_step,
    other_forward("base_layer"),
    other_forward("lora_A"),
    other_forward("lora_B"),
    other_forward_of_dropout,
    other_dropout,
    other_forward_of_the_layer,
    other_variant,
    other_class,
    parametrized,
    biased,
    tensors_of_another_kind,
]


def prepare(change, *models):
    for model in models:
        getattr(change, "prepare", lambda _: None)(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_between_two_tokens_is_noticed(change, kind):
    model, stock = twins(kind)
    prepare(change, model, stock)
    ids = put(put(prompt(2, 9), 0, 2, ASK), 1, 4, SUM)
    tokens = prompt(2, 1)
    whole = torch.cat([ids, tokens], 1)
    with torch.no_grad():
        model(input_ids=ids)
        with adapter_scope(model, "ask", Activation.all(2)):
            model(input_ids=tokens)
        before = model(input_ids=whole).logits
        model(input_ids=whole)
        for m in (model, stock):
            change(m)
        expected = stock(input_ids=whole).logits
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=whole).logits, expected)
    if change is not train:
        assert not torch.allclose(before.to(expected.dtype), expected)


UNMIXED = (train, disable, switch, switch_one_layer, other_variant)


def mixed(model, ids, **keywords):
    return model(
        input_ids=ids, adapter_names=["sum", "ask", "__base__", "plain"], **keywords
    ).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [c for c in CHANGES if c not in UNMIXED])
def test_a_change_between_two_mixed_batches_is_noticed(change, kind):
    model, stock = twins(kind)
    prepare(change, model, stock)
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


def test_several_active_adapters():
    """On the same rows: their parts add up, each from its own start, with groups or without."""
    model, stock = twins()
    ids = put(put(prompt(2, 12), 0, 2, ASK), 0, 6, SUM)
    for m in (model, stock):
        m.base_model.set_adapter(["ask", "plain"])
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            for layer in layers(model):
                if layer.alora_group is not None:
                    layer.alora_group.dissolve("the test says so")


def test_autocast_between_two_calls():
    """Bound by twice the largest error in five draws that PEFT makes under autocast."""
    model, stock = twins()
    exact, bound = copy.deepcopy(stock).double(), 0.0
    with torch.no_grad():
        for _ in range(5):
            ids = put(put(prompt(4, 9), 0, 2, SUM), 1, 4, ASK)
            true = mixed(exact, ids)
            mixed(model, ids)
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
    """One token at a time, bound by twice the largest of PEFT's own errors in five draws."""
    model, stock = twins("llama", dtype)
    exact, bound = copy.deepcopy(stock).double(), 0.0
    with torch.no_grad():
        for _ in range(5):
            ids = put(put(prompt(4, 12), 0, 2, SUM), 1, 4, ASK)
            true = mixed(exact, ids)
            bound = max(bound, float((mixed(stock, ids).double() - true).norm()))
        cache, got = None, []
        for part in (ids[:, :7], *ids[:, 7:].split(1, 1)):
            extra = {} if cache is None else cached(model, cache)
            names = ["sum", "ask", "__base__", "plain"]
            out = model(input_ids=part, adapter_names=names, use_cache=True, **extra)
            cache = out["cache"] if "cache" in out else out["past_key_values"]
            got.append(out.logits)
    assert (torch.cat(got, 1).double() - true).norm() <= 2 * bound


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
    """Nothing is dropped at this probability, but dropout is at work."""
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


def test_a_hook_around_every_module():
    """torch's global hooks see the parts of a layer too."""
    model, stock = twins()
    ids = put(put(prompt(2, 9), 0, 2, ASK), 1, 4, ASK)
    with torch.no_grad():
        before = model(input_ids=ids).logits

        def halve(module, args, output):
            return output * 0.5 if type(module) is nn.Linear and module.in_features == 4 else None

        handle = nn.modules.module.register_module_forward_hook(halve)
        try:
            expected = stock(input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        finally:
            handle.remove()
        assert not torch.allclose(before, expected)
        torch.testing.assert_close(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_x_is_written_between_the_layers_of_a_group(mode):
    """In inference mode no version counts the write, so no output may wait for its layer."""
    model, stock = twins()
    ids = put(prompt(1, 9), 0, 2, ASK)

    def write(module, args, output):
        args[0].mul_(0.5)

    with mode():
        before = model(input_ids=ids).logits
        for m in (model, stock):
            layers(m)[0].register_forward_hook(write)
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert not torch.allclose(before, expected)


def write_between(mlp, x):
    """Llama's MLP by someone else: x changes between two layers, and no version counts it."""
    gate = mlp.gate_proj(x)
    x.data.mul_(0.5)
    return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))


@pytest.mark.parametrize("place", ["class", "class, wrapped", "class, decorated", "instance"])
def test_code_of_others_writes_x_between_the_layers_of_a_group(place, monkeypatch):
    """Only transformers' own forwards, which write nothing there, let outputs wait."""
    model, stock = twins()
    ids = put(prompt(1, 9), 0, 2, ASK)
    mlps = [layer.mlp for m in (model, stock) for layer in m.get_base_model().model.layers]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        if place == "instance":
            for mlp in mlps:
                mlp.forward = types.MethodType(write_between, mlp)
        else:
            forward = {
                "class": write_between,
                "class, wrapped": functools.wraps(type(mlps[0]).forward)(
                    lambda *args: write_between(*args)
                ),
                "class, decorated": deprecate_kwarg("old", version="99.0")(write_between),
            }[place]
            monkeypatch.setattr(type(mlps[0]), "forward", forward)
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("kind", ["torch", "peft"])
def test_another_forward_in_the_class(kind, monkeypatch):
    model, stock = twins()
    ids = put(prompt(1, 9), 0, 2, ASK)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        changed = nn.Linear if kind == "torch" else LoraLinear
        own = changed.forward

        def half(self, x, *args, **kwargs):
            return own(self, x, *args, **kwargs) * 0.5

        monkeypatch.setattr(changed, "forward", half)
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected)


def test_a_hook_of_one_layer_changes_the_next():
    """Nothing that was computed before the hook may be handed out after it."""
    model, stock = twins()
    ids = put(prompt(1, 9), 0, 2, ASK)

    def zero(module, args, output):
        module.alora_next.lora_B["ask"].weight.data.zero_()

    with torch.no_grad():
        before = model(input_ids=ids).logits
        for m in (model, stock):
            q, v, _ = layers(m)
            object.__setattr__(q, "alora_next", v)
            q.register_forward_hook(zero)
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected)


def test_training_after_inference_mode():
    """Tensors made in inference mode cannot be saved for a backward: none may be used again."""
    model, stock = twins()
    ids = put(put(prompt(2, 9), 0, 2, ASK), 1, 4, ASK)
    with torch.inference_mode():
        model(input_ids=ids)
    grads = []
    for m in (model, stock):
        m(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


def test_an_output_without_gradient_may_be_changed_in_place_later():
    model, _ = twins()
    layer, factor = layers(model)[2], torch.ones((), requires_grad=True)
    x = torch.randn(1, 5, layer.in_features)
    with torch.no_grad(), adapter_scope(model, "ask", Activation.all(5)):
        y = layer(x)
    y.mul_(factor)
    y.sum().backward()
    assert factor.grad is not None


def test_as_many_heads_as_tokens_are_refused():
    """[B, T, H, K] and [B, H, T, K] cannot be told apart."""
    model, _ = twins()
    layer = layers(model)[0]
    ids = put(prompt(1, 9), 0, 4, ASK)
    shapes, forward = [(1, 9, 3), (1, 3, 9), (1, 9, 9)], layer.forward
    seen = []

    def several(x):
        for shape in shapes:
            try:
                seen.append(forward(torch.randn(*shape, x.shape[-1])).shape)
            except RuntimeError as error:
                seen.append(str(error))
        return forward(x)

    layer.forward = several
    with torch.no_grad():
        model(input_ids=ids)
    assert [type(s) for s in seen] == [torch.Size, torch.Size, str]
    assert "which of its rows are active is not known" in seen[2]


def test_tracing_by_jit():
    model, stock = twins()
    for m in (model, stock):
        m.base_model.set_adapter("plain")
    x = torch.randn(1, 5, layers(model)[2].in_features)
    with torch.no_grad():
        traced = torch.jit.trace(layers(model)[2], x, check_trace=False)
        torch.testing.assert_close(traced(x * 2), layers(stock)[2](x * 2))
