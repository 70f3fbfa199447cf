"""Tiny models from config with LoRA and aLoRA adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCAB = 64
ASK = [5, 6, 7]  # the invocation of adapter "ask"
SUM = [8, 9]  # that of adapter "sum"
FIRST = 10  # the first token that no invocation holds

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def base_model(kind: str = "llama", **changes: Any) -> Any:
    """A tiny decoder from config, in eval mode."""
    sizes = {**SIZES, **changes}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
        return transformers.OPTForCausalLM(config).eval()
    if kind in ("qwen3", "gemma3"):
        sizes["head_dim"] = 8
    if kind == "gemma3":
        sizes["sliding_window"] = 8
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes)).eval()
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    return model_class(config_class(**sizes)).eval()


def lora(tokens: list[int] | None = None, **changes: Any) -> LoraConfig:
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "init_lora_weights": False,  # random B: an adapter that does nothing tests nothing
        "alora_invocation_tokens": tokens,
    }
    return LoraConfig(**{**settings, **changes})


def adapted(base: Any, **changes: Any) -> Any:
    """`base` with the aLoRA adapters ask and sum and the plain LoRA plain; ask is active."""
    model = get_peft_model(base, lora(ASK, **changes), adapter_name="ask")
    model.add_adapter("sum", lora(SUM, r=6, **changes))
    model.add_adapter("plain", lora(None, **changes))
    model.set_adapter("ask")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def twins(
    kind: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2, **changes: Any
) -> Any:
    """The same adapted model twice: to accelerate, and as PEFT runs it."""
    from alora_kernels.peft import accelerate

    stock = adapted(base_model(kind, num_hidden_layers=layers).to(dtype), **changes)
    return accelerate(copy.deepcopy(stock), strict=True), stock


def prompt(batch: int = 2, length: int = 14, **places: int) -> torch.Tensor:
    """Random tokens `[batch, length]` without any invocation."""
    return torch.randint(FIRST, VOCAB, (batch, length))


def put(ids: torch.Tensor, row: int, place: int, tokens: list[int]) -> torch.Tensor:
    """Write `tokens` into a row, in place."""
    ids[row, place : place + len(tokens)] = torch.tensor(tokens)
    return ids


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The cache under the name that this transformers gives it."""
    import inspect

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(base.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


def oracle(
    model: Any, prompts: torch.Tensor, tokens: int, starts: list[int | None]
) -> torch.Tensor:
    """Greedy continuation by PEFT's own model, recomputed from scratch for every token."""
    ids = prompts
    for _ in range(tokens):
        offsets = [None if s is None else ids.shape[1] - s for s in starts]
        with torch.no_grad():
            logits = model(input_ids=ids, alora_offsets=offsets, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def layers(model: Any) -> Any:
    """Three LoRA layers of the first block."""
    base = model.get_base_model()
    if hasattr(base, "transformer"):  # GPT-2, whose base layers are Conv1D
        block = base.transformer.h[0]
        return block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj
    block = base.model.layers[0]
    return block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj
