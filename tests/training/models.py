"""Tiny models from config and batches for the training tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

INVOCATION = [7, 8]
VOCABULARY = 97
WINDOW = 8  # shorter than the prefixes, so sliding layers have forgotten part of them
KINDS = ("llama", "mistral", "gemma3", "qwen3")


def base_config(kind: str, layers: int = 3, **changes: Any) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped queries
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        **changes,
    }
    if kind == "llama":
        return LlamaConfig(**common)
    if kind == "qwen3":
        return Qwen3Config(**common)
    common.setdefault("sliding_window", WINDOW)
    if kind == "mistral":
        return MistralConfig(**common)
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3TextConfig(**common, layer_types=kinds[:layers], query_pre_attn_scalar=8)
    raise ValueError(kind)


def make_model(
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    dropout: float = 0.0,
    targets: Any = "all-linear",
    tokens: Sequence[int] | None = INVOCATION,
    layers: int = 3,
    config: Any = None,
    **lora: Any,
) -> Any:
    """A PEFT aLoRA model in training mode whose lora_B is not zero."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(
        config or base_config(kind, layers), attn_implementation=attention
    ).to(dtype)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=targets,
        alora_invocation_tokens=None if tokens is None else list(tokens),
        **lora,
    )
    model = get_peft_model(base, adapter, autocast_adapter_dtype=False).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def make_batch(
    lengths: Sequence[tuple[int, int]], pad: str = "right", seed: int = 0, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, labels for rows of (prefix, suffix) tokens.

    A suffix begins with the invocation; labels stand after it. Padding repeats ordinary tokens, so
    that a leak of padding into the result would show.
    """
    generator = torch.Generator().manual_seed(seed)
    width = width or max(p + s for p, s in lengths) + 3
    ids = torch.randint(10, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for b, (p, s) in enumerate(lengths):
        lo = 0 if pad == "right" else width - p - s
        mask[b, lo : lo + p + s] = 1
        if s:
            ids[b, lo + p : lo + p + len(INVOCATION)] = torch.tensor(INVOCATION)
            answer = slice(lo + p + len(INVOCATION), lo + p + s)
            labels[b, answer] = ids[b, answer]
    return ids, mask, labels


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of the trained parameters, which are then cleared."""
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return grads


def alone(
    model: Any, ids: Tensor, mask: Tensor, labels: Tensor, count: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a plain model call on each row alone, unpadded.

    `count` is what the loss is divided by. It is no factor that could be applied afterwards: the
    models' RMSNorm rounds to float32 in float64 models too, so gradients are not exactly linear.
    """
    count = int((labels != -100).sum()) if count is None else count
    losses = []
    for b in range(len(ids)):
        real = mask[b].bool()
        logits = model(input_ids=ids[b][real][None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits, labels[b][real][1:], ignore_index=-100, reduction="sum"
        )
        (loss / count).backward()
        losses.append(loss.detach() / count)
    return sum(losses), gradients(model)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest error of a gradient relative to its norm."""
    assert got.keys() == want.keys() and got
    errors = []
    for name, reference in want.items():
        assert reference.norm() > 0, f"{name} has a zero reference gradient"
        errors.append(float((got[name] - reference).norm() / reference.norm()))
    return max(errors)
