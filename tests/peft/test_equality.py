"""Outputs and gradients equal PEFT's own layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from alora_kernels import Activation
from alora_kernels.peft import accelerate, adapter_scope

from .models import ASK, SUM, adapted, base_model, lora, prompt, put, twins


class Wrapped(nn.Module):
    """One linear layer that takes its tokens beside its input."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input_ids, x):
        return self.linear(x)


def layer_pair(linear, dtype, **changes):
    """An accelerated layer and PEFT's, in a model of one layer."""
    config = LoraConfig(
        target_modules=["linear"],
        r=8,
        lora_alpha=12,
        init_lora_weights=False,
        alora_invocation_tokens=ASK,
        task_type="CAUSAL_LM",
        fan_in_fan_out=isinstance(linear, Conv1D),
        **changes,
    )
    stock = get_peft_model(Wrapped(linear.to(dtype)), _generic(config))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return accelerate(copy.deepcopy(stock), strict=True), stock


def _generic(config):
    config.task_type = None  # Wrapped has no generate
    return config


def run(model, x, ids, dy, offsets=None):
    """y, dx, dA, dB (and the bias's gradient) of the layer."""
    layer = model.get_base_model().linear
    x = x.clone().requires_grad_()
    model.zero_grad()
    kwargs = {"alora_offsets": offsets} if offsets is not None else {}
    y = model(input_ids=ids, x=x, **kwargs)
    y.backward(dy.to(y.dtype))
    b = layer.lora_B["default"]
    grads = [layer.lora_A["default"].weight.grad, b.weight.grad]
    return [y, x.grad, *grads, *([] if b.bias is None else [b.bias.grad])]


def inputs(dtype, batch=3, length=11, width=24, out=17):
    ids = prompt(batch, length)
    put(ids, 0, 2, ASK)
    put(ids, 1, 7, ASK)
    offsets = [length - 2, length - 7, None]
    x = torch.randn(batch, length, width).to(dtype)
    return ids, offsets, x, torch.randn(batch, length, out).to(dtype)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_fp32(kind, changes):
    linear = Conv1D(17, 24) if kind == "conv1d" else nn.Linear(24, 17, bias=kind == "linear")
    if changes.get("lora_bias") and kind == "no bias":
        changes = {}
    model, stock = layer_pair(linear, torch.float32, **changes)
    ids, offsets, x, dy = inputs(torch.float32)
    ours, theirs = run(model, x, ids, dy), run(stock, x, ids, dy, offsets)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    assert torch.equal(ours[0][2], theirs[0][2])  # no invocation: the base, bit for bit
    assert torch.equal(ours[0][0, :2], theirs[0][0, :2])


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_bf16_base_with_fp32_adapters_is_as_exact_as_peft():
    """Against the same layer in float64; the bound is twice PEFT's own error."""
    model, stock = layer_pair(nn.Linear(64, 48), torch.bfloat16)
    assert stock.get_base_model().linear.lora_A["default"].weight.dtype is torch.float32
    ids, offsets, x, dy = inputs(torch.bfloat16, 3, 40, 64, 48)
    exact = run(copy.deepcopy(stock).double(), x.double(), ids, dy.double(), offsets)
    ours, theirs = run(model, x, ids, dy), run(stock, x, ids, dy, offsets)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for mine, other, true in zip(ours, theirs, exact):
        assert error(mine, true) <= 2 * error(other, true)
    assert torch.equal(ours[0][2], theirs[0][2])


def test_autocast_is_as_exact_as_peft():
    model, stock = layer_pair(nn.Linear(64, 48), torch.float32)
    ids, offsets, x, dy = inputs(torch.float32, 3, 40, 64, 48)
    exact = run(copy.deepcopy(stock).double(), x.double(), ids, dy.double(), offsets)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(model, x, ids, dy), run(stock, x, ids, dy, offsets)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for mine, other, true in zip(ours, theirs, exact):
        assert error(mine, true) <= 2 * error(other, true)


def test_compute_precision_is_a_choice():
    _, stock = layer_pair(nn.Linear(64, 48), torch.bfloat16)
    ids, _, x, dy = inputs(torch.bfloat16, 3, 40, 64, 48)
    default = run(accelerate(copy.deepcopy(stock)), x, ids, dy)
    rounded = run(accelerate(copy.deepcopy(stock), adapter_precision="compute"), x, ids, dy)
    assert not torch.equal(default[3], rounded[3])
    torch.testing.assert_close(default[0], rounded[0], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3", "gpt2", "opt"])
def test_every_layer_of_these_models_is_served(kind):
    """100 % of the LoRA layers, and the whole model equals PEFT's, gradients too."""
    stock = adapted(base_model(kind))
    model = accelerate(copy.deepcopy(stock), strict=True)
    owner = model.__dict__["_alora_acceleration"]
    assert owner.adapters.served == set(owner.adapters.layers)
    assert len(owner.adapters.served) == {"gpt2": 8, "opt": 12}.get(kind, 14)
    ids = put(put(prompt(3, 14), 0, 3, ASK), 1, 9, ASK)
    mask = torch.ones_like(ids)
    if kind == "opt":  # its MLP is fed [B·T, K], on which PEFT's aLoRA raises
        for name, layer in stock.named_modules():
            if name.endswith((".fc1", ".fc2")):
                layer.register_forward_pre_hook(lambda _, args: (args[0].unflatten(0, (3, 14)),))
                layer.register_forward_hook(lambda _, args, out: out.flatten(0, 1))
    for m in (model, stock):
        m.zero_grad()
        m(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    pairs = zip(model.named_parameters(), stock.parameters())
    trained = [(n, p.grad, q.grad) for (n, p), q in pairs if q.requires_grad]
    assert len(trained) == 2 * len(owner.adapters.served)
    for _, mine, other in trained:
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    for names in (["ask", "sum", "plain"], ["__base__", "sum", "ask"]):
        put(ids, 2, 5, SUM)
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=ids, adapter_names=names).logits,
                stock(input_ids=ids, adapter_names=names).logits,
            )


def test_patterns_and_run_time_scales():
    model, stock = twins(rank_pattern={"q_proj": 2, "down_proj": 9}, alpha_pattern={"k_proj": 3})
    ids = put(prompt(2, 12), 0, 3, ASK)
    for m in (model, stock):
        for layer in m.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("ask", 1.7)
                layer.scale_layer(0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_two_active_aloras_each_find_their_own_invocation():
    model, stock = twins()
    ids = put(put(prompt(2, 16), 0, 3, ASK), 0, 9, SUM)
    model.base_model.set_adapter(["ask", "sum", "plain"])
    captured = {}

    def capture(name, m):
        layer = m.get_base_model().model.layers[0].self_attn.v_proj
        return layer.register_forward_hook(
            lambda _, args, out: captured.__setitem__(name, (args[0], out))
        )

    capture("ours", model)
    with torch.no_grad():
        model(input_ids=ids)
    x, y = captured["ours"]
    layer = stock.get_base_model().model.layers[0].self_attn.v_proj
    expected = layer.base_layer(x)
    for name, start in (("ask", 3), ("sum", 9), ("plain", 0)):
        delta = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        expected[0, start:] += delta[0, start:]
        if name == "plain":
            expected[1] += delta[1]
    torch.testing.assert_close(y, expected)


def test_dropout_keeps_the_expectation_and_the_prefix():
    model, stock = layer_pair(nn.Linear(24, 17), torch.float32, lora_dropout=0.5)
    ids, offsets, x, _ = inputs(torch.float32)
    with torch.no_grad():
        still = stock.eval()(input_ids=ids, x=x, alora_offsets=offsets)
        model.train()
        dropped = torch.stack([model(input_ids=ids, x=x) for _ in range(400)])
    active = torch.arange(11) >= torch.tensor([[2], [7], [11]])
    assert torch.equal(dropped[:, ~active], still[~active].expand(400, -1, -1))
    deviation = dropped[:, active].std(0)
    assert deviation.min() > 0
    off = (dropped[:, active].mean(0) - still[active]).abs()
    assert (off / (deviation / 20)).max() < 6  # standard errors


@pytest.mark.parametrize("shape", ["flat", "heads", "heads first", "one row"])
def test_flattened_and_four_dimensional_inputs(shape):
    model, stock = layer_pair(nn.Linear(24, 17), torch.float32)
    ids, offsets, x, _ = inputs(torch.float32)
    batch, length = ids.shape
    delta_of = stock.get_base_model().linear
    with torch.no_grad():
        if shape == "flat":
            expected = stock(input_ids=ids, x=x, alora_offsets=offsets).flatten(0, 1)
            got = model(input_ids=ids, x=x.flatten(0, 1))
        elif shape == "one row":
            expected = stock(input_ids=ids, x=x, alora_offsets=offsets).flatten(0, 1)[None]
            got = model(input_ids=ids, x=x.flatten(0, 1)[None])
        else:
            x = torch.randn(batch, length, 2, 24)
            parts = [stock(input_ids=ids, x=p, alora_offsets=offsets) for p in x.unbind(2)]
            dim = 2 if shape == "heads" else 1
            expected = torch.stack(parts, dim)
            got = model(input_ids=ids, x=x if dim == 2 else x.transpose(1, 2).contiguous())
    assert delta_of is not None
    torch.testing.assert_close(got, expected)


def test_a_selection_of_tokens_is_refused():
    model, _ = layer_pair(nn.Linear(24, 17), torch.float32)
    ids, _, x, _ = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="which of its rows are active"):
        model(input_ids=ids, x=x.flatten(0, 1)[::2])
    with adapter_scope(model, "default", Activation.none(17)):  # told by the user
        model(input_ids=ids, x=x.flatten(0, 1)[::2][:17])


def test_lm_head_with_logits_to_keep():
    stock = adapted(base_model(), target_modules=["lm_head", "q_proj"])
    model = accelerate(copy.deepcopy(stock), strict=True)
    ids = put(prompt(2, 12), 0, 8, ASK)
    with torch.no_grad():
        whole = stock(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=6).logits, whole[:, -6:])
        keep = torch.tensor([2, 7, 9, 11])
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=keep).logits, whole[:, keep])


def test_trainable_base_biases_go_on_training():
    stock = get_peft_model(
        base_model("opt"), lora(ASK, bias="lora_only", target_modules=["q_proj"])
    )
    model = accelerate(copy.deepcopy(stock), strict=True)
    ids = put(prompt(2, 12), 0, 3, ASK)
    grads = []
    for m in (model, stock):
        m(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    biases = [n for n in grads[1] if n.endswith("base_layer.bias")]
    assert biases and grads[0].keys() == grads[1].keys()
    for name in grads[1]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-4)


def test_layers_of_other_kinds_keep_pefts_path_and_are_named(caplog):
    config = lora(ASK, target_modules=["q_proj", "embed_tokens"], alora_invocation_tokens=None)
    stock = get_peft_model(base_model(), config)
    model = accelerate(copy.deepcopy(stock))
    assert "lora.Embedding is not a linear layer" in caplog.text
    with pytest.raises(RuntimeError, match="embed_tokens"):
        accelerate(copy.deepcopy(stock), strict=True)
    ids = prompt(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock.eval()(input_ids=ids).logits)


def test_a_layer_on_pefts_path_still_gets_its_offsets():
    """An adapter in a third dtype runs PEFT's arithmetic, with our starts."""
    stock = adapted(base_model())
    for layer in stock.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["ask"].half()
            layer.lora_B["ask"].half()
    model = accelerate(copy.deepcopy(stock))
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 6, ASK)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        names = ["__base__", "ask"]
        assert torch.equal(
            model(input_ids=ids, adapter_names=names).logits,
            stock(input_ids=ids, adapter_names=names).logits,
        )
