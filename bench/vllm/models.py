"""What vLLM serves in the benchmark: the folder of a model, and adapters in PEFT's format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.models.gemma import gemma_folder

INVOCATION_LENGTH = 5


def layers_of(sizes: dict[str, Any]) -> dict[str, tuple[int, list[int]]]:
    """in_features and output slices of the four adapted layers that vLLM has in each block."""
    hidden, inner, heads = (
        sizes["hidden_size"],
        sizes["intermediate_size"],
        sizes["num_attention_heads"],
    )
    head = sizes.get("head_dim") or hidden // heads
    q, kv = heads * head, sizes["num_key_value_heads"] * head
    return {
        "qkv_proj": (hidden, [q, kv, kv]),
        "o_proj": (q, [hidden]),
        "gate_up_proj": (hidden, [inner, inner]),
        "down_proj": (inner, [hidden]),
    }


def model_folder(o: argparse.Namespace, scratch: Path) -> Path:
    """The folder of the model of `--model` or `--small`; by default Gemma 3 270M."""
    if o.small:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(o.seed)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,  # vLLM's CPU attention needs at least 32 columns a head
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * max(o.context),
        )
        LlamaForCausalLM(config).save_pretrained(scratch / "tiny")
        return scratch / "tiny"
    if o.model:
        return o.model
    return gemma_folder()


def write_adapters(scratch: Path, sizes: dict[str, Any], o: argparse.Namespace) -> dict[str, str]:
    """Write folders in PEFT's format: a0… (aLoRA), and p0… (plain LoRA with the same tensors)."""
    outs: dict[str, tuple[int, int]] = {}
    names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for layer, (depth, widths) in layers_of(sizes).items():
        for name, width in zip(names.get(layer, (layer,)), widths):
            outs[name] = depth, width
    folders = {}
    for i in range(o.adapters):
        generator = torch.Generator().manual_seed(o.seed + i)
        tensors = {}
        for block in range(sizes["num_hidden_layers"]):
            for name in o.targets.split(","):
                depth, width = outs[name]
                kind = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                at = f"base_model.model.model.layers.{block}.{kind}.{name}"
                for part, shape in (("A", (o.rank, depth)), ("B", (width, o.rank))):
                    value = torch.randn(shape, generator=generator) * 0.02
                    tensors[f"{at}.lora_{part}.weight"] = value
        for kind in "ap":
            folder = scratch / f"{kind}{i}"
            folder.mkdir()
            save_file(tensors, folder / "adapter_model.safetensors")
            config: dict[str, Any] = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": o.rank,
                "lora_alpha": o.rank,
                "target_modules": o.targets.split(","),
                "bias": "none",
            }
            if kind == "a":
                config["alora_invocation_tokens"] = [10 + i] * INVOCATION_LENGTH
            (folder / "adapter_config.json").write_text(json.dumps(config))
            folders[folder.name] = str(folder)
    return folders
