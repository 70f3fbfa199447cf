"""What others do to a model: exceptions, hooks, replaced forwards."""

from __future__ import annotations

import pytest
import torch

from alora_kernels import Activation
from alora_kernels.peft import adapter_scope

from .models import ASK, prompt, put, twins


def test_an_exception_inside_forward_leaves_nothing_behind():
    from alora_kernels.peft.state import current_state

    model, stock = twins()
    ids = put(prompt(2, 12), 0, 3, ASK)

    def fail(*_):
        raise KeyError("mine")

    handle = model.get_base_model().model.layers[1].mlp.act_fn.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            model(input_ids=ids)
        with pytest.raises(KeyError, match="mine"):
            model.generate(input_ids=ids, max_new_tokens=2)
        assert current_state() is None
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_groups_hold_nothing_after_a_forward_and_dissolve_when_wrong():
    model, stock = twins()
    attention = model.get_base_model().model.layers[0].self_attn
    group = attention.q_proj.alora_group
    assert [
        m is getattr(attention, n) for m, n in zip(group.members, ("q_proj", "k_proj", "v_proj"))
    ]
    assert (
        len(group) == 3 and len(model.get_base_model().model.layers[0].mlp.up_proj.alora_group) == 2
    )
    x = torch.randn(2, 12, attention.q_proj.in_features)
    other, alone = x + 1, attention.k_proj
    with torch.no_grad(), adapter_scope(model, "ask", Activation.all(24)):
        attention.q_proj(x)
        assert group.enabled
        got = alone(other)
        assert not group.enabled
        lora = alone.lora_B["ask"](alone.lora_A["ask"](other)) * alone.scaling["ask"]
        torch.testing.assert_close(got, alone.base_layer(other) + lora)
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_a_hook_on_a_grouped_layer_or_its_parts_is_called():
    model, stock = twins()
    calls = []
    for m in (model, stock):
        attention = m.get_base_model().model.layers[0].self_attn
        attention.k_proj.register_forward_hook(lambda *_: calls.append("layer"))
        attention.v_proj.base_layer.register_forward_hook(lambda *_: calls.append("base"))
        attention.v_proj.lora_A["ask"].register_forward_hook(lambda *_: calls.append("a"))
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        mine = model(input_ids=ids).logits
        first, calls[:] = list(calls), []
        torch.testing.assert_close(mine, stock(input_ids=ids).logits)
    assert sorted(first) == sorted(calls) == ["a", "base", "layer"]


def alone(layer, x, mask):
    """The layer's output of x, by its definition; `mask` tells the active rows."""
    part = layer.lora_B["ask"](layer.lora_A["ask"](x)) * layer.scaling["ask"]
    return layer.base_layer(x) + part * mask


@pytest.mark.parametrize("change", ["write", "grad mode", "autocast", "none"])
def test_what_changes_between_two_calls_by_hand_counts(change):
    """The outputs that a group has computed are for the x and the modes that it saw."""
    model, _ = twins()
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 12, attention.q_proj.in_features)
    grad = change == "grad mode"
    with adapter_scope(model, "ask", Activation.all(24)):
        with torch.no_grad():
            attention.q_proj(x)
            if change == "write":
                x.mul_(0.5)
        with (
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        ):
            got = attention.k_proj(x)
    assert got.requires_grad == grad
    assert got.dtype == (torch.bfloat16 if change == "autocast" else torch.float32)
    assert attention.k_proj.alora_group.enabled == (change == "none")
    tolerance = 0.1 if change == "autocast" else 1e-5
    want = alone(attention.k_proj, x, 1.0).to(got.dtype)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_inputs_of_several_shapes_in_one_forward():
    """Rows are told for each shape anew: flat, with heads before the tokens, with heads behind."""
    model, _ = twins()
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 8, ASK)
    mask = torch.arange(12) >= torch.tensor([[3], [8]])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    shapes = {
        (24,): mask.reshape(24, 1),
        (2, 12): mask[..., None],
        (2, 3, 12): mask[:, None, :, None],
        (2, 12, 3): mask[..., None, None],
    }
    seen = []

    def call(*_):
        for lead, active in shapes.items():
            x = torch.randn(*lead, layer.in_features)
            seen.append((layer(x), alone(layer, x, active)))

    model.get_base_model().model.layers[0].register_forward_pre_hook(call)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(seen) == len(shapes)
    for got, want in seen:
        torch.testing.assert_close(got, want)
