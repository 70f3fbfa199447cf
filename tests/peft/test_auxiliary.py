"""Modules that an adapter trains as a whole run the adapter of their rows."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from alora_kernels.peft import accelerate, adapter_scope, restore

from .models import ASK, SUM, base_model, lora, prompt, put

BASE = "__base__"


def pair(*without: str, **changes):
    """An accelerated model and PEFT's; `without` names adapters that have LoRA layers alone."""
    fewer = {key: value for key, value in changes.items() if key != "modules_to_save"}
    configs = {
        name: lora(tokens, **(fewer if name in without else changes))
        for name, tokens in (("ask", ASK), ("sum", SUM), ("plain", None))
    }
    stock = get_peft_model(base_model(), configs["ask"], adapter_name="ask")
    for name in ("sum", "plain"):
        stock.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_(0, 0.2)
    stock.eval()
    return accelerate(copy.deepcopy(stock)), stock


def asked():
    return put(put(prompt(4, 12), 0, 3, ASK), 1, 5, SUM)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["v_proj", "up_proj"]},
        {"trainable_token_indices": [12, 13, 20, 21, 22, 40]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_each_row_runs_the_module_of_its_adapter(changes):
    model, stock = pair(**changes)
    ids = asked()
    rows = ["ask", "sum", "plain", BASE]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=rows).logits
        torch.testing.assert_close(mixed, stock(input_ids=ids, adapter_names=rows).logits)
        for row, name in enumerate(rows):
            one = ids[row : row + 1]
            with adapter_scope(model, None if name == BASE else name):
                torch.testing.assert_close(model(input_ids=one).logits[0], mixed[row])
            if name != BASE:
                stock.set_adapter(name)
                torch.testing.assert_close(stock(input_ids=one).logits[0], mixed[row])
    assert not any(m._forward_pre_hooks for m in restore(model).modules())


def test_an_adapter_without_the_module_runs_the_base_module():
    model, stock = pair("sum", modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    ids = asked()
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["ask", "sum", "ask", "sum"]).logits
        for row, name in enumerate(["ask", "sum", "ask", "sum"]):
            stock.set_adapter(name)
            torch.testing.assert_close(stock(input_ids=ids[row : row + 1]).logits[0], mixed[row])
        model.set_adapter("sum")
        again = model(input_ids=ids, adapter_names=["ask", "sum", "ask", "sum"]).logits
        torch.testing.assert_close(again, mixed)
