"""Other tasks than CAUSAL_LM, and adapters without a PeftModel."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import TaskType, get_peft_model, inject_adapter_in_model

from alora_kernels.peft import accelerate

from .models import ASK, base_model, lora, prompt, put


def test_tasks_other_than_causal_lm():
    base = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).eval()
    with pytest.warns(UserWarning, match="CAUSAL_LM"):
        config = lora(ASK, task_type=TaskType.SEQ_CLS, target_modules=["q_proj", "down_proj"])
    stock = get_peft_model(base, config).eval()
    model = accelerate(copy.deepcopy(stock))
    ids = put(prompt(2, 10), 0, 4, ASK)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, stock(input_ids=ids, alora_offsets=[6, None]).logits
        )
        assert not torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("way", ["add_adapter", "inject"])
def test_adapters_without_a_peft_model(way):
    torch.manual_seed(5)
    base = base_model()
    if way == "add_adapter":
        try:
            base.add_adapter(lora(ASK, target_modules=["q_proj", "down_proj"]), "default")
        except ValueError as error:
            pytest.skip(f"this transformers refuses this peft: {error}")
    else:
        config = lora(ASK, target_modules=["q_proj", "down_proj"])
        inject_adapter_in_model(config, base, "default")
    plain = base_model()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora" not in k}
    )
    stock = get_peft_model(plain, lora(ASK, target_modules=["q_proj", "down_proj"]))
    for (name, layer), other in zip(base.named_modules(), plain.modules()):
        if hasattr(layer, "lora_A"):
            assert name
            other.load_state_dict(layer.state_dict())
    model = accelerate(base)
    assert model is base
    ids = put(prompt(2, 10), 0, 4, ASK)
    keywords = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        assert torch.equal(
            model.generate(input_ids=ids, use_cache=False, **keywords),
            stock.generate(input_ids=ids, **keywords),
        )
