"""Merging and unloading leave nothing behind; where they fail, the model stays accelerated."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from peft import PeftMixedModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from alora_kernels.peft import accelerate, adapter_scope, restore

from .models import ASK, SUM, base_model, lora, prompt, put, twins


def logits(model, ids, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def two_rows():
    return put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)


def assert_plain(model, like):
    """`model` holds what a model that was never accelerated holds, and can be saved."""
    assert [type(m) for m in model.modules()] == [type(m) for m in like.modules()]
    for module, other in zip(model.modules(), like.modules()):
        assert set(module.__dict__) == set(other.__dict__)
        assert not module._forward_pre_hooks and not module._forward_hooks
    file = io.BytesIO()
    torch.save(model, file)
    assert b"alora_kernels" not in file.getvalue()


CALLS = {
    "merge": lambda m: m.merge_and_unload(adapter_names=["plain"]),
    "merge with checks": lambda m: m.merge_and_unload(True, True, ["plain"]),
    "merge the active one": lambda m: m.merge_and_unload(),
    "unload": lambda m: m.unload(),
    "merge by the tuner": lambda m: m.base_model.merge_and_unload(adapter_names=["plain"]),
    "unload by the tuner": lambda m: m.base_model.unload(),
    "merge first": lambda m: (m.merge_adapter(["plain"]), m.merge_and_unload())[1],
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_stays_behind(call):
    """Also of a model that holds aLoRAs beside the adapter that is merged."""
    model, stock = twins()
    ids = two_rows()
    for m in (model, stock):
        m.set_adapter("plain")
        logits(m, ids)
        logits(m, ids, adapter_names=["ask", "plain"])
    weights = [weakref.ref(p) for n, p in model.named_parameters() if "lora_" in n]
    base, expected = CALLS[call](model), CALLS[call](stock)
    torch.testing.assert_close(logits(base, ids), logits(expected, ids))
    assert_plain(base, expected)
    assert type(model) is type(stock) and type(model.base_model) is type(stock.base_model)
    assert set(model.__dict__) == set(stock.__dict__)
    del model
    gc.collect()
    assert weights and not [ref for ref in weights if ref() is not None]


@pytest.mark.parametrize("failing", ["an aLoRA", "in the middle"])
def test_where_merging_raises_the_model_stays_accelerated(failing):
    model, stock = twins()
    ids = two_rows()
    if failing == "an aLoRA":
        with pytest.raises(NotImplementedError):
            model.merge_and_unload()
    else:
        for m in (model, stock):
            m.set_adapter("plain")
            with torch.no_grad():
                m.get_base_model().model.layers[1].mlp.up_proj.lora_A["plain"].weight[0, 0] = (
                    torch.inf
                )
            with pytest.raises(ValueError, match="NaNs detected"):
                m.merge_and_unload(safe_merge=True)
            m.set_adapter("ask")
    expected = logits(stock, ids)
    torch.testing.assert_close(logits(model, ids), expected)
    owner = model.__dict__["_alora_acceleration"]
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert owner.adapters.served and len(owner.adapters.layers) == len(layers)
    with adapter_scope(model, "sum"):
        stock.set_adapter("sum")
        torch.testing.assert_close(logits(model, ids), logits(stock, ids))
    assert type(restore(model)) is type(stock)


def test_unmerging_and_merging_again():
    model, stock = twins()
    ids = two_rows()
    for m in (model, stock):
        m.set_adapter("plain")
        logits(m, ids)
        m.merge_adapter()
        m.unmerge_adapter()
        m.merge_adapter(["plain"])
    torch.testing.assert_close(logits(model, ids), logits(stock, ids))
    for m in (model, stock):
        m.unmerge_adapter()
        m.delete_adapter("plain")
        m.set_adapter("ask")
    torch.testing.assert_close(logits(model, ids), logits(stock, ids))


def test_a_merged_mixed_model_and_a_model_without_a_wrapper():
    mixed = accelerate(PeftMixedModel(base_model(), lora(None), "one").eval())
    ids = prompt(2, 9)
    expected = logits(mixed, ids)
    base = mixed.merge_and_unload()
    torch.testing.assert_close(logits(base, ids), expected)
    assert_plain(base, base_model())
    root = base_model()
    inject_adapter_in_model(lora(None), root, "one")
    accelerate(root)
    wrapper = get_peft_model(root, lora(None, target_modules=["q_proj"]), "two")
    bare = wrapper.unload()  # by PEFT alone, which does not know of us
    logits(bare, ids)
    assert_plain(bare, base_model())


def test_one_of_two_models_around_a_base_may_be_restored():
    """Whichever of them is asked, the PeftModel is PEFT's again too, and searches by itself."""
    model, stock = twins()
    ids = two_rows()
    expected = logits(stock, ids)
    assert restore(model.get_base_model()) is model.get_base_model()
    assert type(model) is type(stock)
    assert torch.equal(logits(model, ids), expected)
    accelerate(model.get_base_model())
    torch.testing.assert_close(logits(model, ids), expected)
    accelerate(model)
    accelerate(model.get_base_model(), adapter_precision="compute")
    assert hasattr(type(model), "alora_kind")
    owner = model.__dict__["_alora_acceleration"]
    assert owner is model.get_base_model().__dict__["_alora_acceleration"]
    assert owner.options.adapter_precision == "compute"
    torch.testing.assert_close(logits(model, ids), expected)


def test_classes_that_others_made_of_ours_are_made_anew():
    """FSDP2 gives every module that it shards a subclass of the class that it finds."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, stock = twins()
        ids = two_rows()
        expected = logits(stock, ids)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        for module in (layer, *model.get_base_model().model.layers, model):
            fully_shard(module, mesh=mesh)
        torch.testing.assert_close(logits(model, ids), expected)
        restore(model)
        for module in (model, layer):
            assert isinstance(module, FSDPModule) and not hasattr(type(module), "alora_kind")
        torch.testing.assert_close(logits(model, ids), expected)
        torch.testing.assert_close(logits(accelerate(model), ids), expected)
        torch.testing.assert_close(logits(restore(model), ids), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_refusal_leaves_an_accelerated_model_as_it_is():
    model, stock = twins()
    ids = two_rows()
    owner = model.__dict__["_alora_acceleration"]
    inject_adapter_in_model(lora([]), model.get_base_model(), "bad")
    with pytest.raises(ValueError, match="'bad'"):
        accelerate(model)
    assert model.__dict__["_alora_acceleration"] is owner
    model.delete_adapter("bad")
    torch.testing.assert_close(logits(model, ids), logits(stock, ids))


def test_methods_that_others_put_on_the_model_are_theirs():
    """As training libraries do with `generate`."""
    model, stock = twins()
    restore(model)
    root = model.get_base_model()
    ids = two_rows()[:1]
    calls = []
    plain = root.generate
    root.generate = lambda *a, **k: (calls.append("before"), plain(*a, **k))[1]
    accelerate(model)
    ours = root.generate
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = stock.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, **options), expected) and calls == ["before"]
    root.generate = lambda *a, **k: (calls.append("after"), ours(*a, **k))[1]
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), expected)
    assert calls == ["before", "after", "before"]
    restore(model)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert calls[3:] == ["after", "before"]
    del root.generate
    copied = copy.deepcopy(model)
    assert "generate" not in copied.get_base_model().__dict__
