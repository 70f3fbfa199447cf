"""What the training benchmark runs: a model from a config, a batch, and each variant's step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INVOCATION = [7, 8]


def make_model(options: argparse.Namespace) -> Any:
    """A Llama of 50 million parameters with an aLoRA on all seven projections, float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=max(options.prompt) + options.suffix,
        tie_word_embeddings=True,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return adapted(base, options.rank)


def adapted(base: Any, rank: int) -> Any:
    """`base` with an aLoRA on all its projections, in training mode."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        alora_invocation_tokens=INVOCATION,
    )
    model = get_peft_model(base, adapter).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # if it were zero, so would be all gradients of lora_A
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_batch(
    options: argparse.Namespace, prompt: int, vocabulary: int = 32000
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `prompt` random tokens, then the invocation, then an answer with labels."""
    generator = torch.Generator().manual_seed(prompt)
    shape = (options.batch, prompt + options.suffix)
    ids = torch.randint(10, vocabulary, shape, generator=generator)
    ids[:, prompt : prompt + len(INVOCATION)] = torch.tensor(INVOCATION)
    labels = ids.clone()
    labels[:, : prompt + len(INVOCATION)] = -100
    return ids, torch.ones_like(ids), labels


def make_step(
    model: Any, batch: tuple[Tensor, Tensor, Tensor], variant: str, chunk_size: int
) -> Callable[[], Tensor]:
    """A forward and backward; returns the loss."""
    from alora_kernels.training import PrefixStore, prefix_forward

    ids, mask, labels = batch
    store = PrefixStore() if variant == "cached" else None

    def step() -> Tensor:
        if variant == "peft":
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        else:
            loss = prefix_forward(
                model, ids, mask, labels, variant, store=store, chunk_size=chunk_size
            ).loss
        loss.backward()
        return loss.detach()

    return step
