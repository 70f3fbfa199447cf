"""Adapters that come, change or go after `accelerate`, by whatever way, are found or refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from alora_kernels import Activation
from alora_kernels.peft import accelerate, adapter_scope, restore
from alora_kernels.peft.adoption import is_served

from .models import ASK, SUM, adapted, base_model, lora, prompt, put, twins


def logits(model, ids, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def two_rows():
    return put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def by_definition(model, ids, offsets, **keywords):
    """What PEFT's layers give when each of them is handed the offsets."""
    stock = restore(copy.deepcopy(model))
    root = stock.get_base_model() if isinstance(stock, PeftModel) else stock
    for layer in lora_layers(root):
        assert not hasattr(type(layer), "alora_kind")
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "alora_offsets": offsets}), with_kwargs=True
        )
    return logits(root, ids, **keywords)


def activate(model, name):
    for layer in lora_layers(model):
        layer.set_adapter(name)


def shaken(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return model


def check(model, ids=None, offsets=(9, None)):
    """The active aLoRA, of the invocation ASK, is right in every layer, and does something."""
    ids = two_rows() if ids is None else ids
    expected = by_definition(model, ids, list(offsets))
    torch.testing.assert_close(logits(model, ids), expected)
    base = by_definition(model, ids, [None] * len(ids))
    assert not torch.allclose(expected, base)
    assert all(is_served(layer) for layer in lora_layers(model))
    return expected


@pytest.fixture
def root():
    """A model of transformers with one aLoRA on q_proj, accelerated."""
    model = base_model()
    inject_adapter_in_model(lora(SUM, target_modules=["q_proj"]), model, "sum")
    return accelerate(shaken(model))


NEW = {"target_modules": ["q_proj", "down_proj", "lm_head"]}


@pytest.fixture
def folder(tmp_path):
    """An aLoRA on disk, with layers that the models above do not have."""
    shaken(get_peft_model(base_model(), lora(ASK, **NEW), "ask")).save_pretrained(tmp_path)
    return tmp_path / "ask"


# ---------------------------------------------------------------------- they come


def test_by_load_adapter_of_transformers(root, folder):
    root.load_adapter(str(folder), adapter_name="ask")
    activate(root, "ask")
    check(root)
    with adapter_scope(root, "ask"):
        check(root)


def test_by_add_adapter_of_transformers(root, monkeypatch):
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.18.0")
    root._hf_peft_config_loaded = True
    root.add_adapter(lora(ASK, **NEW), "ask")
    check(shaken(root))
    root.disable_adapters()
    ids = two_rows()
    assert torch.equal(logits(root, ids), by_definition(root, ids, [None, None]))
    root.enable_adapters()
    check(root)
    root.set_adapter("sum")
    check(root, put(prompt(2, 12), 1, 4, SUM), (None, 8))
    root.set_adapter("ask")
    root.delete_adapter("sum")
    check(root)
    root.delete_adapter("ask")
    with torch.no_grad():
        base = [m.base_layer for m in lora_layers(root)]
        assert len(base) == 5 and torch.isfinite(root(input_ids=ids).logits).all()


def test_by_injecting_again(root):
    inject_adapter_in_model(lora(ASK, **NEW), root, "ask")
    activate(shaken(root), "ask")
    check(root)


def test_by_injecting_into_a_part(root):
    inject_adapter_in_model(lora(ASK, target_modules=["up_proj"]), root.model.layers[1], "ask")
    activate(shaken(root), "ask")
    check(root)


def test_by_the_tuner(folder):
    model, _ = twins()
    model.peft_config["new"] = lora(ASK, **NEW)
    model.base_model.inject_adapter(model.get_base_model(), "new")
    model.base_model.set_adapter("new")
    check(shaken(model))
    tuner = model.base_model
    tuner.add_weighted_adapter(["ask", "new"], [0.5, 0.3], "both", combination_type="cat")
    tuner.set_adapter("both")
    check(model)


@pytest.mark.parametrize("way", [get_peft_model, PeftModel.from_pretrained])
def test_by_a_peft_model_around_it(root, folder, way):
    if way is get_peft_model:
        model = shaken(get_peft_model(root, lora(ASK, **NEW), "ask"))
    else:
        model = PeftModel.from_pretrained(root, str(folder), adapter_name="ask").eval()
    model.set_adapter("ask")
    ids = two_rows()
    expected = by_definition(model, ids, [9, None])
    torch.testing.assert_close(logits(model, ids), expected)
    torch.testing.assert_close(logits(root, ids), expected)
    model = accelerate(model)
    torch.testing.assert_close(logits(model, ids), expected)
    assert not [n for m in restore(model).modules() for n in m.__dict__ if "alora_" in n]


def test_by_hand(root):
    """A layer of another model, a block of its copy, a list of blocks."""
    other = shaken(get_peft_model(base_model(), lora(ASK), "ask")).get_base_model()
    root.peft_config |= other.peft_config
    root.model.layers[0].mlp.gate_proj = other.model.layers[0].mlp.gate_proj
    activate(root, "ask")
    check(root)
    root.model.layers[1] = copy.deepcopy(other.model.layers[1])
    check(root)
    root.model.layers = nn.ModuleList([*other.model.layers])
    check(root)
    root.model.layers[0].self_attn.q_proj = root.model.layers[0].self_attn.q_proj.base_layer
    activate(root, "ask")  # the layer that was the first one is not told any more
    check(root)


def test_past_torchs_registration_they_raise_once(root):
    other = shaken(get_peft_model(base_model(), lora(ASK), "ask")).get_base_model()
    root.peft_config |= other.peft_config
    root.model.layers.insert(1, other.model.layers[1])
    root.config.num_hidden_layers = 3
    activate(root, "ask")
    with pytest.raises(RuntimeError, match=r"'model.layers.1.self_attn.q_proj' was put into"):
        logits(root, two_rows(), use_cache=False)
    ids = two_rows()
    expected = by_definition(root, ids, [9, None], use_cache=False)
    torch.testing.assert_close(logits(root, ids, use_cache=False), expected)


@pytest.mark.slow
def test_in_a_compiled_model(root):
    compiled = torch.compile(root.model, backend="eager")
    ids = two_rows()
    with adapter_scope(root, "sum", Activation.from_starts([None, 5], 12)), torch.no_grad():
        torch.testing.assert_close(compiled(ids)[0], root.model(ids)[0])
    inject_adapter_in_model(lora(ASK, **NEW), root, "ask")
    activate(shaken(root), "ask")
    check(root)
    with adapter_scope(root, "ask", Activation.from_starts([3, None], 12)), torch.no_grad():
        torch.testing.assert_close(compiled(ids)[0], root.model(ids)[0])


# ---------------------------------------------------------------------- they change and go


def test_a_renamed_adapter(root):
    root.peft_config["ask"] = root.peft_config.pop("sum")
    root.peft_config["ask"].alora_invocation_tokens = list(ASK)
    for layer in lora_layers(root):
        for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.lora_variant):
            parts["ask"] = parts.pop("sum")
        layer.scaling["ask"] = layer.scaling.pop("sum")
        layer._active_adapter = ["ask"]
    check(root)


def test_a_hotswapped_adapter(tmp_path):
    model, _ = twins()
    ids = two_rows()
    stock = adapted(base_model())
    stock.save_pretrained(tmp_path, selected_adapters=["ask"])
    logits(model, ids)
    hotswap_adapter(model, str(tmp_path / "ask"), "ask", torch_device="cpu")
    check(model)
    config = tmp_path / "ask" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "alora_invocation_tokens": [8, 8]}))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="alora_invocation_tokens"):  # PEFT keeps the old one
        hotswap_adapter(model, str(tmp_path / "ask"), "ask", torch_device="cpu")
    with pytest.raises(ValueError, match=r"has alora_invocation_tokens=\[8, 8\]"):
        model.load_adapter(str(tmp_path / "ask"), "ask")
    with pytest.raises(ValueError, match=r"has alora_invocation_tokens=\[8, 8\]"):
        model.get_base_model().load_adapter(str(tmp_path / "ask"), "ask", hotswap=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_deleted_weights_are_freed():
    import gc
    import weakref

    model, _ = twins()
    ids = two_rows()
    rows = ["ask", "sum"]
    logits(model, ids, adapter_names=rows)
    seen = [weakref.ref(p) for n, p in model.named_parameters() if ".sum." in n]
    model.delete_adapter("sum")
    gc.collect()
    assert seen and not [ref for ref in seen if ref() is not None]
    check(model)


def test_nothing_is_walked_while_nothing_changes(root, monkeypatch):
    from alora_kernels.peft import adoption

    ids = two_rows()
    logits(root, ids)
    shaken(get_peft_model(base_model(), lora(ASK), "ask"))  # another model's business
    torch.compile(root, backend="eager")
    nn.ModuleList([*root.model.layers])
    monkeypatch.setattr(adoption, "adopt", None)
    for _ in range(2):
        logits(root, ids)
        with adapter_scope(root, "sum"):
            logits(root, ids)


# ---------------------------------------------------------------------- they are refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora([]), "alora_invocation_tokens is empty"),
        (lora([[5, 6]]), "a flat list of token ids"),
        (lora(ASK, init_lora_weights="pissa"), "changes the base weights"),
    ],
    ids=["empty", "nested", "pissa"],
)
def test_an_injected_adapter_is_refused_before_the_next_forward(root, config, reason):
    inject_adapter_in_model(config, root, "bad")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"adapter 'bad': .*{reason}"):
            logits(root, two_rows())
    with pytest.raises(ValueError, match=reason):
        root.generate(input_ids=two_rows(), max_new_tokens=1)
    with pytest.raises(ValueError, match=reason), adapter_scope(root, "sum"):
        pass


def test_the_older_format_is_refused_before_it_is_loaded(root, folder):
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields.pop("alora_invocation_tokens")
    config.write_text(json.dumps({**fields, "invocation_string": "<ask>"}))
    with pytest.raises(ValueError, match="older aLoRA format"):
        root.load_adapter(str(folder), adapter_name="ask")
    assert list(root.peft_config) == ["sum"] and len(lora_layers(root)) == 2


def test_an_activated_lora_without_its_configuration_is_refused():
    """Only the outer model knows the invocation; the inner one would run it on every token."""
    model = base_model()
    inject_adapter_in_model(lora(ASK, target_modules=["q_proj"]), model, "ask")
    with pytest.raises(ValueError, match="part of an activated LoRA, but no module of LlamaModel"):
        accelerate(model.model)
    accelerate(shaken(model))
    check(model)
    inner = base_model()
    inject_adapter_in_model(lora(ASK, target_modules=["q_proj"]), inner.model, "ask")
    check(accelerate(shaken(inner)))  # the configuration lies on a part of the model


def test_two_adapters_of_one_name_in_two_parts_are_refused(root):
    inject_adapter_in_model(lora(ASK, target_modules=["up_proj"]), root.model.layers[1], "sum")
    with pytest.raises(ValueError, match=r"'sum': .* in 'model.layers.1' are \[5, 6, 7\]"):
        logits(root, two_rows())


def test_new_layers_that_are_not_served_are_said(root, caplog):
    inject_adapter_in_model(
        LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False), root, "table"
    )
    with caplog.at_level("WARNING", logger="alora_kernels"):
        logits(root, two_rows())
        logits(root, two_rows())
    assert [r.getMessage() for r in caplog.records] == [
        "alora_kernels serves 2 of 3 LoRA layers; these keep PEFT's path:\n"
        "  model.embed_tokens  lora.Embedding is not a linear layer"
    ]
