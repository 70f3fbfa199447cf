"""Choosing an adapter where layers keep PEFT's forward: experts, DoRA, other methods, norms."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    PeftMixedModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import MixtralConfig, MixtralForCausalLM

from alora_kernels import Activation
from alora_kernels.inference import Session
from alora_kernels.peft import accelerate, adapter_scope, restore

from ..inference.tiny import tokenizer
from .models import ASK, SIZES, SUM, base_model, lora, prompt, put

ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OTHERS = {
    "experts": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "dora of other layers": {"target_modules": ["o_proj", "v_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [12, 13, 30]},
}


def logits(model, ids, **keywords):
    with torch.no_grad():
        return model(input_ids=ids, **keywords).logits


def two_rows():
    return put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)


def stock_models(other):
    """PEFT's model with the adapters ask, sum and other, and the same one without other.

    (PEFT's own experts do not take the offsets that it hands to all layers once an aLoRA is
    active.)
    """
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    model = get_peft_model(base, lora(ASK, target_modules=ATTENTION), "ask")
    model.add_adapter("sum", lora(SUM, target_modules=ATTENTION))
    without = copy.deepcopy(model.eval())
    model.add_adapter("other", lora(None, **OTHERS[other]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name or name.endswith(".other"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval(), without


def expected_of(stock, without, ids):
    """What set_adapter gives, and the base model."""
    found = {}
    for name in ("ask", "sum", "other"):
        model = stock if name == "other" else without
        model.set_adapter(name)
        found[name] = logits(model, ids)
    with stock.disable_adapter():
        found[None] = logits(stock, ids)
    assert len({value.sum().item() for value in found.values()}) == 4
    return found


@pytest.mark.parametrize("other", OTHERS)
def test_one_adapter_for_all_rows_is_what_set_adapter_gives(other):
    stock, without = stock_models(other)
    model = accelerate(copy.deepcopy(stock))
    ids = two_rows()
    expected = expected_of(stock, without, ids)
    for active in ("ask", "other"):
        model.set_adapter(active)
        for name, value in expected.items():
            with adapter_scope(model, name):
                torch.testing.assert_close(logits(model, ids), value)
            with adapter_scope(model, [name, name]):
                torch.testing.assert_close(logits(model, ids), value)
            rows = [name or "__base__"] * 2
            torch.testing.assert_close(logits(model, ids, adapter_names=rows), value)
        torch.testing.assert_close(logits(model, ids), expected[active])
        with model.disable_adapter(), adapter_scope(model, "other"):
            torch.testing.assert_close(logits(model, ids), expected[None])
    mixed = logits(model, ids, adapter_names=["ask", "__base__"])  # neither is in such a layer
    torch.testing.assert_close(mixed[0], expected["ask"][0])
    torch.testing.assert_close(mixed[1], expected[None][1])
    model.set_adapter("ask")
    restore(model)
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), expected["other"])
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("experts", "does not support mixed adapter batches"),
        ("dora", "when DoRA is enabled"),
        ("norms", "Mixed batching is only supported"),
    ],
)
def test_rows_that_differ_are_refused_with_pefts_reason(other, reason):
    model = accelerate(stock_models(other)[0])
    with (
        pytest.raises((ValueError, TypeError), match=reason),
        adapter_scope(model, ["other", None]),
    ):
        logits(model, two_rows())


@pytest.mark.parametrize("other", ["experts", "dora", "norms"])
def test_threads_run_their_own_adapter(other):
    stock, without = stock_models(other)
    model = accelerate(copy.deepcopy(stock))
    ids = two_rows()
    expected = expected_of(stock, without, ids)
    wrong, barrier = [], threading.Barrier(len(expected))

    def work(name):
        barrier.wait()
        for _ in range(12):
            with adapter_scope(model, name):
                if not torch.allclose(logits(model, ids), expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("other", ["experts", "dora"])
def test_a_scope_trains_the_adapter_that_it_names(other):
    stock, _ = stock_models(other)
    model = accelerate(copy.deepcopy(stock))
    ids = two_rows()
    for m in (model, stock):
        m.set_adapter("other")
        m.zero_grad()
    stock(input_ids=ids, labels=ids).loss.backward()
    model.set_adapter("ask")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    with adapter_scope(model, "other"):
        model(input_ids=ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert wanted and grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name])


@pytest.mark.parametrize("other", ["experts", "dora"])
def test_a_session_runs_beside_such_layers(other):
    stock, without = stock_models(other)
    model = accelerate(copy.deepcopy(stock))
    context = prompt(1, 9)
    session = Session(model, tokenizer()).extend(context[0].tolist())
    options = {"max_new_tokens": 4, "do_sample": False}
    for name, tokens in (("ask", ASK), ("sum", SUM)):
        ids = torch.cat([context, torch.tensor([tokens])], 1)
        without.set_adapter(name)
        wanted = without.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
        assert list(session.generate(name, **options).token_ids) == wanted
    with stock.disable_adapter():
        wanted = stock.generate(input_ids=context, **options)[0, context.shape[1] :].tolist()
    assert list(session.generate(None, **options).token_ids) == wanted


def test_peft_is_told_the_truth_inside_a_scope():
    """disable_adapter asks the layers whether they are enabled, and puts that back."""
    model = accelerate(stock_models("dora")[0])
    ids = two_rows()
    before = logits(model, ids)
    with adapter_scope(model, None, Activation.none(24)):
        assert model.get_model_status().active_adapters == ["ask"]
        with model.disable_adapter():
            pass
        assert model.get_model_status().enabled is True
    assert torch.equal(logits(model, ids), before)


def test_merged_layers_refuse_to_choose():
    model = accelerate(stock_models("experts")[0])
    model.set_adapter("other")
    merged_before = logits(model, two_rows())
    model.merge_adapter(["other"])
    for name in (None, "ask", "other"):
        with pytest.raises(ValueError, match="merged adapters"), adapter_scope(model, name):
            logits(model, two_rows())
    model.unmerge_adapter()
    assert merged_before.shape == logits(model, two_rows()).shape


@pytest.mark.parametrize("config", [LoHaConfig, IA3Config])
def test_layers_of_other_methods_run_the_adapter_that_is_named(config):
    """As `add_adapter` of transformers puts them beside LoRA, and PeftMixedModel."""
    fields: dict[str, Any] = {"target_modules": ["down_proj"]}
    if config is IA3Config:
        fields["feedforward_modules"] = ["down_proj"]
    fields["init_weights" if config is LoHaConfig else "init_ia3_weights"] = False
    model = base_model()
    inject_adapter_in_model(lora(ASK, target_modules=["q_proj"]), model, "ask")
    inject_adapter_in_model(config(**fields), model, "other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada_" in name or "ia3_" in name:
                parameter.normal_(0, 0.3)
    model.eval()
    stock = copy.deepcopy(model)
    accelerate(model)
    ids = two_rows()
    expected = {}
    for name in ("other", None):
        for layer in stock.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter([name] if name else [])
        expected[name] = logits(stock, ids)
    for name in ("other", None):
        with adapter_scope(model, name):
            torch.testing.assert_close(logits(model, ids), expected[name])
    with pytest.raises(ValueError, match="can neither mix"), adapter_scope(model, ["other", None]):
        logits(model, ids)


def test_a_mixed_model_of_peft():
    """PEFT's own never searches for an invocation; its forward has no names for its arguments."""
    torch.manual_seed(3)
    base = base_model()
    mixed = PeftMixedModel(copy.deepcopy(base), lora(ASK, target_modules=["q_proj"]), "ask")
    mixed.add_adapter("loha", LoHaConfig(target_modules=["down_proj"], init_weights=False))
    mixed.set_adapter(["ask"])
    mixed.eval()
    plain = get_peft_model(base, lora(ASK, target_modules=["q_proj"]), "ask").eval()
    weights = {n: p for n, p in mixed.base_model.model.named_parameters() if ".lora_" in n}
    plain.base_model.model.load_state_dict(weights, strict=False)
    accelerate(mixed)
    ids = two_rows()
    with torch.no_grad():
        got = mixed(attention_mask=torch.ones_like(ids), input_ids=ids).logits
        torch.testing.assert_close(got, logits(plain, ids))
    with adapter_scope(mixed, None), plain.disable_adapter():
        torch.testing.assert_close(logits(mixed, ids), logits(plain, ids))
    base = restore(mixed).base_model
    assert not hasattr(type(base), "alora_kind")
    assert not [n for m in mixed.modules() for n in m.__dict__ if "alora" in n]
