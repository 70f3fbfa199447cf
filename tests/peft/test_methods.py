"""PEFT's other methods go on working on an accelerated model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model

import alora_kernels
from alora_kernels.peft import accelerate, restore

from .models import ASK, SUM, adapted, base_model, lora, prompt, put, twins


def same(model, stock, ids, **keywords):
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, **keywords).logits, stock(input_ids=ids, **keywords).logits
        )


def test_adapters_come_and_go(tmp_path):
    model, stock = twins()
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)
    for name in ("sum", "plain", "ask"):
        model.set_adapter(name)
        stock.set_adapter(name)
        same(model, stock, ids)
    with model.disable_adapter(), stock.disable_adapter():
        same(model, stock, ids)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    for m in (model, stock):
        m.load_adapter(str(tmp_path / "sum"), "again")
        m.delete_adapter("sum")
        m.set_adapter("again")
    same(model, stock, ids)
    reloaded = PeftModel.from_pretrained(
        copy.deepcopy(stock).unload(), str(tmp_path / "sum"), adapter_name="again"
    )
    same(model, reloaded, ids)
    new = lora(ASK, target_modules=["q_proj", "v_proj"], r=3)
    torch.manual_seed(1)
    model.add_adapter("few", new)
    torch.manual_seed(1)
    stock.add_adapter("few", copy.deepcopy(new))
    for m in (model, stock):
        m.set_adapter("few")
    same(model, stock, ids)
    same(model, stock, ids, adapter_names=["few", "again"])


def test_an_adapter_may_bring_new_layers():
    stock = get_peft_model(base_model(), lora(ASK, target_modules=["q_proj"]), "ask").eval()
    model = accelerate(copy.deepcopy(stock))
    config = lora(SUM, target_modules=["up_proj", "gate_proj"])
    for m in (model, stock):
        torch.manual_seed(2)
        m.add_adapter("sum", copy.deepcopy(config))
        m.set_adapter("sum")
    owner = model.__dict__["_alora_acceleration"]
    assert len(owner.adapters.served) == 6
    same(model, stock, put(prompt(2, 10), 0, 4, SUM))


def test_merging_plain_adapters():
    model, stock = twins()
    ids = put(prompt(2, 12), 0, 3, ASK)
    for m in (model, stock):
        m.set_adapter("plain")
        m.merge_adapter()
    same(model, stock, ids)
    with pytest.raises(ValueError, match="merged adapters"):  # the base alone is not there
        model(input_ids=ids, adapter_names=["plain", "__base__"])
    for m in (model, stock):
        m.unmerge_adapter()
    same(model, stock, ids)
    model.set_adapter("ask")
    with pytest.raises(NotImplementedError):
        model.merge_adapter()
    model.set_adapter("plain")
    merged, expected = model.merge_and_unload(["plain"]), stock.merge_and_unload(["plain"])
    same(merged, expected, ids)


def test_restore_leaves_the_model_as_it_was():
    stock = adapted(base_model())
    model = copy.deepcopy(stock)
    before = [(n, type(m), dict(m.__dict__)) for n, m in model.named_modules()]
    accelerate(model)
    model.train()
    model.gradient_checkpointing_enable()
    ids = put(prompt(2, 12), 0, 3, ASK)
    model(input_ids=ids)
    model.gradient_checkpointing_disable()
    assert restore(model) is model
    model.eval()
    for (name, kind, fields), (path, module) in zip(before, model.named_modules()):
        assert (name, kind) == (path, type(module))
        # What transformers itself leaves after gradient checkpointing was on.
        extra = {
            key
            for key in set(module.__dict__) - set(fields)
            if "gradient_checkpointing" not in key and "_require_grads" not in key
        }
        assert not extra, (name, extra)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not [h for h in hooks if h.__module__.startswith("alora_kernels")]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert alora_kernels.restore(model) is model  # again: nothing to do
    assert repr(model) == repr(stock)


def test_unload_restores():
    model, stock = twins()
    ids = prompt(2, 9)
    base = model.unload()
    same(base, stock.unload(), ids)
    assert not base._forward_pre_hooks and "generate" not in base.__dict__


def test_copies_are_accelerated_models_of_their_own():
    model, stock = twins()
    twin = copy.deepcopy(model)
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 4, SUM)
    twin.set_adapter("sum")
    stock.set_adapter("sum")
    same(twin, stock, ids)
    stock.set_adapter("ask")
    same(model, stock, ids)
    owner = twin.__dict__["_alora_acceleration"]
    assert owner.root is twin.get_base_model()
    assert owner is not model.__dict__["_alora_acceleration"]
    layer = twin.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.alora_adapters is owner.adapters and layer in layer.alora_group.members
    assert restore(twin) is twin and type(twin) is type(stock)


def test_state_dict_names_and_class_names_are_pefts():
    model, stock = twins()
    assert list(model.state_dict()) == list(stock.state_dict())
    assert type(model).__name__ == type(stock).__name__ and isinstance(model, type(stock))
    assert pickle.dumps(model.state_dict())
    import inspect

    assert inspect.signature(model.forward) == inspect.signature(stock.forward)


def test_names_are_checked():
    model, _ = twins()
    ids = prompt(2, 9)
    with pytest.raises(ValueError, match="unknown adapter 'nobody'"):
        model(input_ids=ids, adapter_names=["ask", "nobody"])
    with pytest.raises(ValueError, match="unknown adapter 'nobody'"):
        model.generate(input_ids=ids, adapter_names=["ask", "nobody"])
    with pytest.raises(ValueError, match="3 starts or alora_offsets were given for a batch of 2"):
        model(input_ids=ids, alora_offsets=[1, 2, 3])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=ids, adapter_names=["ask", "sum"])


def test_a_mixed_batch_of_vectors():
    """A plain LoRA in a layer that sees one vector for each row, as a pooler's or an MLP's."""

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.top = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 5)

        def forward(self, ids):
            return self.top(self.table(ids).mean(1))

    config = {"target_modules": ["top"], "task_type": None}
    stock = get_peft_model(Pooled(), lora(None, **config), "one")
    stock.add_adapter("two", lora(None, **config))
    model = accelerate(copy.deepcopy(stock.eval()))
    ids, rows = prompt(4, 7), ["one", "__base__", "two", "one"]
    with torch.no_grad():
        mixed = model(ids, adapter_names=rows)
        torch.testing.assert_close(mixed, stock(ids, adapter_names=rows))
        assert not torch.allclose(mixed, stock(ids))
