"""An accelerated model is an object: it is copied, saved, loaded and sent to other processes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model

import alora_kernels
from alora_kernels.peft import accelerate, adapter_scope, restore

from .models import ASK, SUM, adapted, base_model, lora, prompt, put, twins


def logits(model, ids, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def two_rows():
    return put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(protocol):
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


def ours(module):
    """Names of what is ours in `module` and all below it."""
    found = []
    for path, m in module.named_modules():
        found += [f"{path}.{name}" for name in m.__dict__ if "alora" in name]
        found += [path for kind in type(m).__mro__ if "alora_kind" in vars(kind)]
        for hooks in (m._forward_pre_hooks, m._forward_hooks):
            found += [path for h in hooks.values() if h.__module__.startswith("alora_kernels")]
    return found


WAYS = [saved, pickled(0), pickled(2), pickled(5), copy.deepcopy]


@pytest.mark.parametrize("way", WAYS, ids=["torch.save", "0", "2", "5", "deepcopy"])
def test_what_is_loaded_is_accelerated_and_right(way):
    model, stock = twins()
    ids = two_rows()
    logits(model, ids)  # with prepared calls, groups and a search behind it
    loaded = way(model)
    assert type(loaded) is type(model) and isinstance(loaded, type(stock))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    owner = loaded.__dict__["_alora_acceleration"]
    assert owner is not model.__dict__["_alora_acceleration"]
    assert owner.root is loaded.get_base_model() and owner.options.backend == "auto"
    assert len(owner.adapters.served) == 14 and not owner.adapters.refused
    with adapter_scope(loaded, "sum"):
        stock.set_adapter("sum")
        torch.testing.assert_close(logits(loaded, ids), logits(stock, ids))
    stock.set_adapter("ask")
    expected = stock.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    for options in ({}, {"use_cache": False}):  # of which PEFT's own generate gets one wrong
        got = loaded.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False, **options)
        assert torch.equal(got, expected)
    restore(loaded)
    assert not ours(loaded) and type(loaded) is type(stock)
    torch.testing.assert_close(logits(loaded, ids), logits(stock, ids))
    assert torch.equal(logits(model, ids), logits(way(model), ids))  # the first is untouched


@pytest.mark.parametrize("way", [saved, copy.deepcopy], ids=["torch.save", "deepcopy"])
def test_a_base_model_saved_alone_is_accelerated_too(way):
    model, stock = twins()
    ids = two_rows()
    root = way(model.get_base_model())
    torch.testing.assert_close(logits(root, ids), logits(stock, ids))
    expected = stock.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    again = way(root)  # it has not run yet
    got = again.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(got, expected)
    with adapter_scope(way(root), None), stock.disable_adapter():
        torch.testing.assert_close(logits(root, ids), logits(root, ids))
    restore(again)
    assert not ours(again)


@pytest.mark.parametrize("way", [saved, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("place", ["model.layers.0", "model.layers.0.self_attn.q_proj"])
def test_a_layer_saved_alone_is_pefts(way, place):
    """It brings neither the model nor what is ours."""
    model, stock = twins()
    logits(model, two_rows())
    part = way(model.get_base_model().get_submodule(place))
    if way is not copy.copy or not place.endswith("0"):
        assert not ours(part)
    if place.endswith("q_proj"):
        x = torch.randn(2, 5, 32)
        layer = stock.get_base_model().get_submodule(place)
        torch.testing.assert_close(
            part(x, alora_offsets=[2, None]), layer(x, alora_offsets=[2, None])
        )
        size = len(pickle.dumps(part))
        assert size < 2 * len(pickle.dumps(layer))


def test_layers_that_keep_pefts_path_travel():
    """DoRA, an embedding, and modules that are trained as a whole."""
    changes = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "embed_tokens"]}
    stock = get_peft_model(base_model(), lora(None, **changes), "one")
    stock.add_adapter("two", lora(None, target_modules=["q_proj"], use_dora=True))
    model = accelerate(copy.deepcopy(stock.eval()))
    ids = prompt(2, 9)
    for m in (model, saved(model), copy.deepcopy(model)):
        for name in ("one", "two"):
            stock.set_adapter(name)
            with adapter_scope(m, name):
                torch.testing.assert_close(logits(m, ids), logits(stock, ids))
        for part in ("model.embed_tokens", "lm_head"):
            assert not ours(saved(m.get_base_model().get_submodule(part)))
        m.set_adapter("one")
        assert not ours(restore(m))


def test_a_copy_in_training_and_in_the_middle_of_a_forward():
    model, stock = twins()
    ids = two_rows()
    copies = []
    block = model.get_base_model().model.layers[1]
    handle = block.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    stock.train()
    stock(input_ids=ids, labels=ids).loss.backward()
    copies[0].zero_grad()
    copies[0](input_ids=ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    for m in (model, copies[0]):
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name])


def test_saved_files_and_state_dicts_are_unchanged(tmp_path):
    model, stock = twins()
    for m, folder in ((model, "ours"), (stock, "pefts")):
        m.save_pretrained(tmp_path / folder)
    for name in ("ask", "sum", "plain"):
        folders = [tmp_path / which / name for which in ("ours", "pefts")]
        first, second = [(f / "adapter_model.safetensors").read_bytes() for f in folders]
        assert first == second
        first, second = [json.loads((f / "adapter_config.json").read_text()) for f in folders]
        for config in (first, second):
            config["target_modules"].sort()
        assert first == second
    loaded = saved(model)
    loaded.load_state_dict(stock.state_dict())
    assert list(loaded.state_dict()) == list(stock.state_dict())


CHILD = """
import sys, torch
assert not any(name.startswith("alora_kernels") for name in sys.modules)
model, ids = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save((model(input_ids=ids).logits, type(model).alora_kind.__name__), sys.argv[2])
"""


@pytest.mark.slow
def test_another_process_loads_it_without_having_imported_us(tmp_path):
    model, stock = twins()
    ids = two_rows()
    torch.save((model, ids), tmp_path / "model")
    subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "model"), str(tmp_path / "out")], check=True
    )
    got, name = torch.load(tmp_path / "out")
    assert torch.equal(got, logits(model, ids)) and name == "PeftModelForCausalLM"
    torch.testing.assert_close(got, logits(stock, ids))


def run_in_child(rank, model, ids, queue):
    queue.put(logits(model, ids).tolist())


@pytest.mark.slow
def test_it_is_an_argument_of_a_spawned_process():
    model, stock = twins()
    ids = two_rows()
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(run_in_child, (model, ids, queue), nprocs=1)
    torch.testing.assert_close(torch.tensor(queue.get()), logits(stock, ids))


@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("compiled", marks=pytest.mark.slow)])
def test_in_a_wrapper_it_travels_as_pefts_does(wrapper):
    """What torch puts around a model: what can be saved there can be saved with us inside."""
    model, stock = twins()
    ids = two_rows()
    if wrapper == "compiled":
        found = copy.deepcopy(torch.compile(model, backend="eager"))
        torch.testing.assert_close(logits(found, ids), logits(stock, ids))
        assert restore(found) is found and not ours(found)
        return
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        found = saved(wrapped)
        torch.testing.assert_close(logits(found, ids), logits(stock, ids))
        accelerate(found)  # through the wrapper
        torch.testing.assert_close(logits(found, ids), logits(stock, ids))
        assert restore(found) is found and not ours(found)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_it_is_accelerated_through_a_wrapper():
    """The forward of a wrapper has no argument names, so what is inside is accelerated."""
    stock = adapted(base_model())
    ids = two_rows()
    expected = logits(stock, ids, attention_mask=torch.ones_like(ids))
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel):
        model = wrap(copy.deepcopy(stock))
        assert alora_kernels.accelerate(model) is model
        with torch.no_grad():
            got = model(attention_mask=torch.ones_like(ids), input_ids=ids).logits
        torch.testing.assert_close(got, expected)
        assert not ours(restore(model))
