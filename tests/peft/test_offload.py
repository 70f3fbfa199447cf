"""Forwards that others put on an instance, accelerate's offload above all, in every order."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from alora_kernels.peft import accelerate, adapter_scope, restore

from .models import ASK, SUM, prompt, put, twins

CPU = torch.device("cpu")


def logits(model, ids, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def two_rows():
    return put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)


def dispatched(model, folder):
    """Blocks and single LoRA layers of their own, the second block on disk."""
    inside = "base_model.model.model"
    places = {name: "cpu" for name, _ in model.named_modules() if name.endswith("q_proj")}
    places |= {f"{inside}.embed_tokens": "cpu", f"{inside}.norm": "cpu"}
    places |= {f"{inside}.rotary_emb": "cpu", "base_model.model.lm_head": "disk"}
    for name, _ in model.named_modules():
        if any(name.endswith(end) for end in ("k_proj", "v_proj", "o_proj", "mlp", "layernorm")):
            places[name] = "disk" if ".1." in name else "cpu"
    return dispatch_model(model, places, main_device=CPU, offload_dir=str(folder), force_hooks=True)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "dispatch": dispatched,
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("last", ["restore", "remove hooks"])
def test_offload_and_acceleration_come_and_go_in_any_order(offload, first, last, tmp_path):
    model, stock = twins()
    restore(model)
    ids = two_rows()
    rows = ["sum", "plain"]
    with torch.no_grad():
        expected = {
            "ask": logits(stock, ids),
            "rows": logits(stock, ids, adapter_names=rows),
            "offsets": logits(stock, ids, alora_offsets=[2, 7]),
        }
        stock.set_adapter("sum")
        expected["sum"] = logits(stock, ids)
    options = {"max_new_tokens": 3, "do_sample": False}
    text = stock.generate(input_ids=ids[1:], **options)

    def check(accelerated):
        torch.testing.assert_close(logits(model, ids), expected["ask"])
        torch.testing.assert_close(logits(model, ids, adapter_names=rows), expected["rows"])
        torch.testing.assert_close(logits(model, ids, alora_offsets=[2, 7]), expected["offsets"])
        if not accelerated:
            return
        with adapter_scope(model, "sum"):
            torch.testing.assert_close(logits(model, ids), expected["sum"])
            got = model.generate(input_ids=ids[1:], use_cache=False, **options)
            assert torch.equal(got, text)

    steps = {
        "offload": lambda: OFFLOADS[offload](model, tmp_path),
        "accelerate": lambda: accelerate(model),
        "restore": lambda: restore(model),
        "remove hooks": lambda: remove_hook_from_module(model, recurse=True),
    }
    steps.pop(first)()
    check(first == "accelerate")
    steps.pop("accelerate" if first == "offload" else "offload")()
    check(True)
    other = "restore" if last == "remove hooks" else "remove hooks"
    steps.pop(other)()
    check(other != "restore")
    steps.pop(last)()
    check(False)
    if offload != "dispatch":
        for module, like in zip(model.modules(), stock.modules()):
            assert type(module) is type(like)
            assert set(module.__dict__) - {"forward"} == set(like.__dict__)


class Doubled(ModelHook):
    """Doubles the output; counts its calls."""

    def __init__(self):
        self.calls = 0

    def post_forward(self, module, output):
        self.calls += 1
        return output * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_was_replaced_on_a_layer_is_called(when):
    model, stock = twins()
    restore(model)
    ids = two_rows()
    hooks = []
    if when == "after":
        accelerate(model)
        logits(model, ids)
    for m in (model, stock):
        hooks.append(Doubled())
        add_hook_to_module(m.get_base_model().model.layers[0].self_attn.k_proj, hooks[-1])
    if when == "before":
        accelerate(model)
    expected = logits(stock, ids)
    torch.testing.assert_close(logits(model, ids), expected)
    with adapter_scope(model, "ask"):
        torch.testing.assert_close(logits(model, ids), expected)
    model.set_adapter("sum")  # and looked at again
    model.add_adapter("new", copy.deepcopy(model.peft_config["sum"]))
    model.set_adapter("ask")
    torch.testing.assert_close(logits(model, ids), expected)
    assert hooks[0].calls == 3 and hooks[1].calls == 1
    restore(model)
    torch.testing.assert_close(logits(model, ids), expected)
    assert hooks[0].calls == 4
    accelerate(model)
    torch.testing.assert_close(logits(model, ids), expected)


def test_a_closure_that_holds_a_forward_outlives_restore():
    """Nothing tells of it: the function that it holds has to work on PEFT's layer."""
    model, stock = twins()
    ids = two_rows()
    for m in (model, stock):
        for module in (m, m.get_base_model().model.layers[1].mlp.up_proj):
            held = module.forward

            @functools.wraps(held)
            def forward(*args, held=held, **kwargs):
                return held(*args, **kwargs)

            module.forward = forward
    expected = logits(stock, ids)
    torch.testing.assert_close(logits(model, ids), expected)
    restore(model)
    torch.testing.assert_close(logits(model, ids), expected)
    accelerate(model)
    torch.testing.assert_close(logits(model, ids), expected)
    with adapter_scope(model, None), stock.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(stock, ids))


def test_a_forward_of_the_users_own_stays_on_the_layer():
    model, stock = twins()
    ids = two_rows()

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x) * 2

    for m in (model, stock):
        layer = m.get_base_model().model.layers[0].self_attn.k_proj
        layer.forward = types.MethodType(forward, layer)
    expected = logits(stock, ids)
    torch.testing.assert_close(logits(model, ids), expected)
    torch.testing.assert_close(logits(restore(model), ids), expected)
    torch.testing.assert_close(logits(accelerate(model), ids), expected)


def test_a_copy_of_an_offloaded_model(tmp_path):
    model, stock = twins()
    ids = two_rows()
    cpu_offload(model, CPU)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied, ids), logits(stock, ids))
    restore(copied)
    torch.testing.assert_close(logits(copied, ids), logits(stock, ids))
