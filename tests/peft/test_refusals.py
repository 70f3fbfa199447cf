"""Adapters that would be silently wrong are refused, with the reason."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from alora_kernels.peft import accelerate, check_adapter_folder
from alora_kernels.peft.support import check_config, why_unsuited

from .models import ASK, base_model, lora, twins


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_rewrites_the_base_is_refused(start):
    model = get_peft_model(base_model(), lora(ASK, init_lora_weights=start))
    with pytest.raises(ValueError, match="changes the base weights"):
        accelerate(model)
    accelerate(get_peft_model(base_model(), lora(None, init_lora_weights=start)))


def test_empty_tokens_are_refused():
    model = get_peft_model(base_model(), lora([]))
    with pytest.raises(ValueError, match="alora_invocation_tokens is empty"):
        accelerate(model)
    model, _ = twins()
    with pytest.raises(ValueError, match="alora_invocation_tokens is empty"):
        model.add_adapter("new", lora([]))
    assert "new" not in model.peft_config


def test_the_older_format_is_refused(tmp_path):
    model, stock = twins()
    stock.save_pretrained(tmp_path, selected_adapters=["ask"])
    folder = tmp_path / "ask"
    assert check_adapter_folder(folder)["alora_invocation_tokens"] == ASK
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = None
    config["invocation_string"] = "<|start_of_role|>check"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="older aLoRA format"):
        check_adapter_folder(folder)
    with pytest.raises(ValueError, match="older aLoRA format"):
        model.load_adapter(str(folder), "old")
    assert "old" not in model.peft_config


def test_an_encoder_decoder_is_refused():
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.warns(UserWarning):
        config = LoraConfig(
            task_type="SEQ_2_SEQ_LM", target_modules=["q"], alora_invocation_tokens=ASK
        )
    with pytest.raises(ValueError, match="encoder-decoder"):
        accelerate(get_peft_model(base, config))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "RoFormer", "XLMRoberta"])
def test_bidirectional_attention_is_refused(kind):
    """What stands before the invocation would see the adapter."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    auto = transformers.AutoModelForCausalLM
    tokens = {"target_modules": ["query"]}
    model = get_peft_model(auto.from_config(config), lora(ASK, **tokens))
    with pytest.raises(ValueError, match=r"bidirectional \(config.is_decoder=False"):
        accelerate(model)
    model = accelerate(get_peft_model(auto.from_config(config), lora(None, **tokens)))
    with pytest.raises(ValueError, match="bidirectional"):
        model.add_adapter("ask", lora(ASK, **tokens))
    assert "ask" not in model.peft_config
    config.is_decoder = True
    accelerate(get_peft_model(auto.from_config(config), lora(ASK, **tokens)))


def test_a_model_over_patches_of_bytes_is_refused():
    class Blt(torch.nn.Module):
        config = transformers.BltConfig()

    with pytest.raises(ValueError, match="patches of bytes"):
        check_config("ask", lora(ASK), why_unsuited(Blt()))
