"""The same adapter tensors twice: as activated adapters, and as plain LoRA."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import alora_kernels
from bench.models.gemma import gemma_folder

INVOCATION_LENGTH = 5


def load_models(o: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model with activated adapters (accelerated), the one with plain ones, the tokenizer."""
    if o.small:
        bases, tokenizer = _tiny(o.seed)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = o.model or gemma_folder()
        bases = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return (*models_of(bases, o), tokenizer)


def models_of(bases: Sequence[Any], o: argparse.Namespace) -> tuple[Any, Any]:
    """The first base with activated adapters (accelerated), the second with plain ones (PEFT)."""
    models = []
    for base, activated in zip(bases, (True, False)):
        model: Any = None
        for i in range(o.adapters):
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=o.rank,
                lora_alpha=o.rank,
                target_modules=o.targets if o.targets == "all-linear" else o.targets.split(","),
                alora_invocation_tokens=[10 + i] * INVOCATION_LENGTH if activated else None,
            )
            if model is None:
                model = get_peft_model(base, config, adapter_name=f"a{i}")
            else:
                model.add_adapter(f"a{i}", config)
        torch.manual_seed(o.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.02)
        models.append(model.to(o.device).eval())
    return alora_kernels.accelerate(models[0]), models[1]


def _tiny(seed: int) -> tuple[list[Any], Any]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        max_position_embeddings=1024,
    )
    bases = [Gemma3ForCausalLM(config) for _ in range(2)]
    bases[1].load_state_dict(bases[0].state_dict())
    return bases, NoText(config.vocab_size)


class NoText:
    """Stands for a tokenizer: the tiny model works on token ids only."""

    eos_token_id, pad_token_id, chat_template = 1, 0, None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return " ".join(map(str, ids))
