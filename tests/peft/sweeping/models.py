"""Every causal architecture of the installed transformers, from a small config.

The config class gives the names and the defaults; `SIZES` says what a field of a name becomes, in
every nested config too. `OVERRIDES` holds what a single architecture needs beyond that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
FIRST, LAST = 16, 80  # ordinary tokens: [FIRST, LAST)
MOST_PARAMETERS = 20_000_000
MOST_LAYERS = 8

# A field whose name matches gets the value, where the class gives it a number by default.
SIZES: dict[str, Any] = {
    r"(decoder_)?vocab_size(_per_layer_input)?|unpadded_vocab_size": VOCAB,
    r"hidden_size|d_model|n_embd|(emb|embed|hidden)_dim|dim|width|word_embed_proj_dim": 32,
    r"(word_)?embedding_(size|dim)|(input|output)_embedding_size|lru_width": 32,
    r"attention_hidden_size|(out|backbone|depth|projector|cross)_hidden_size": 32,
    r"projection_dim|(projector_)?(input|output)_dim|hidden_size_global": 32,
    r"intermediate_size(_mlp)?|(encoder_|decoder_)?ffn_dim|d_ff|d_?inner|dff|dim_ff|mlp_dim": 48,
    r"n_inner|ffn_hidden_size|feed_forward_size|(dense|text)_intermediate_size": 48,
    r"moe_intermediate_size|expert_ffn_hidden_size|(moe_)?shared_experts?_intermediate_size": 24,
    r"(num|encoder|decoder|n|swa_num|num_encoder|num_decoder)_(attention_)?heads?": 4,
    r"attention_heads|num_(query|attention)_(heads|groups)": 4,
    r"(swa_)?head_dim|global_head_dim|d_head|dim_head|attention_head_size|kv_channels|d_kv": 8,
    r"q_lora_rank|kv_lora_rank|o_lora_rank": 12,
    r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim": 8,
    r"qk_head_dim": 16,
    r"rotary_dim": 4,
    r"(n_routed|num_local|num|moe_num)_experts": 4,
    r"zero_expert_num": 2,
    r"num_experts_per_to(k|ken)|moe_topk|moe_top_k|moe_k|top_k_experts": 2,
    r"n_group|topk_group|num_expert_group": 1,
    r"(n|num|moe_num)_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"sliding_window(_size)?|local_attention|attention_window_size|window_size": 16,
    r"attention_chunk_size": 16,
    r"index_head_dim": 8,
    r"index_n_heads": 4,
    r"index_topk": 64,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length": 256,
    r"max_(target|source)_positions|model_max_length": 256,
    r"(ssm_)?state_size|mamba_d_state": 8,
    r"mamba_d_head|mamba_head_dim|mamba_headdim": 8,
    r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)": 8,
    r"mamba_dt_rank|time_step_rank": 4,
    r"mamba_d_ssm": 64,
    r"n_groups": 2,
    r"(mamba_)?chunk_size": 8,
    r"linear_num_(key|value)_heads|linear_num_heads": 4,
    r"linear_(key|value)_head_dim|linear_head_dim": 8,
    r"hidden_size_per_layer_input|laurel_rank|adapter_rank|gated_norm_rank|loop_gate_rank": 8,
    r"type_vocab_size": 2,
    r".*(drop(out|_path)?|pdrop|layerdrop|jitter_noise|jitter)(_(prob|rate|p))?": 0.0,
    r"image_size": 16,
    r"patch_size": 4,
    r"num_nextn_predict_layers": 0,
    r"pretraining_tp": 1,
    r"num_codebooks": 1,
}
LAYERS = re.compile(
    r"(num|n|encoder|decoder|num_encoder|num_decoder|num_hidden|dec)_?(hidden_|decoder_)?layers?"
    r"|depth|num_blocks"
)
# What a config works out from its number of layers: all kinds that the default has must come up.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attention_layers")
SPECIAL = re.compile(r".*(token_id|token_index|token_ids)")
ORDINARY = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ALWAYS: dict[str, Any] = {"is_decoder": True, "use_cache": True, "tie_word_embeddings": False}

COMPASS_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MROPE_TEXT = {"text_config": {"rope_parameters": MROPE}}
INKLING_TOWERS = {f"{tower}_config": {"text_hidden_size": 32} for tower in ("vision", "audio")}
OMNI_TOKENS = {"vision_start_token_id": LAST + 1, "audio_start_token_id": LAST + 2}
TWO_INDEXED = {"num_hidden_layers": 2, "layer_types": ["indexed_attention"] * 2}
QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Beyond the rules: by architecture, or by the nested config's name within it. A function gets the
# number of layers.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bert-generation": {"is_decoder": True},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {"rope_parameters": COMPASS_ROPE},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "cohere_compass": {"text_config": {"rope_parameters": COMPASS_ROPE}},
    "cosmos3_edge": MROPE_TEXT,
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "max_window_layers": 1,
    },
    "dots3_note": {"text_config": TWO_INDEXED},
    "dots3_note_text": TWO_INDEXED,
    "falcon": {"num_kv_heads": 1},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), MROPE_TEXT),
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 0]}}},
    "gpt_neo": {"attention_types": lambda n: [[["global", "local"], n // 2]], "num_layers": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": MROPE}},
    "hy_v4_vl": {"text_config": {"rope_parameters": MROPE}},
    "inkling2": {
        "vision_config": {"text_hidden_size": 32},
        "audio_config": {"text_hidden_size": 32},
    },
    "inkling2_loop": INKLING_TOWERS,
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
    },
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "musicgen": {"part": "decoder"},
    "musicgen_melody": {"part": "decoder"},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": MROPE_TEXT,
    "qwen2_5_omni_thinker": {**MROPE_TEXT, **OMNI_TOKENS},
    "qwen2_5_vl": MROPE_TEXT,
    "qwen2_vl": MROPE_TEXT,
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "qwen4_exp_text": QWEN4_INDEXER,
    "qwen3_omni_moe_thinker": OMNI_TOKENS,
    "reformer": {
        "axial_pos_embds_dim": (8, 24),
        "axial_pos_shape": (16, 16),
        "attn_layers": ("local", "local"),
        "local_attn_chunk_length": 16,
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "voxtral": {"text_config": {"num_key_value_heads": 2}},
    "xlstm": {"hidden_size": 128, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "num_hidden_layers": 2, "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}


MAKERS: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "multimodal": transformers.AutoModelForImageTextToText,
    "audio": getattr(transformers, "AutoModelForMultimodalLM", None),
}


class NotMade(Exception):
    """An architecture that this file cannot make; says why."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of a mapping of transformers: its name and the model class."""

    name: str
    model: str
    family: str  # a key of MAKERS


def architectures() -> list[Architecture]:
    """All of `MODEL_FOR_CAUSAL_LM`, then what other mappings have of generating text.

    A name that several mappings have comes up once.
    """
    found: dict[str, Architecture] = {}
    for family, mapping in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("multimodal", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("audio", getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})),
    ):
        for name, model in mapping.items():
            if name not in found:
                found[name] = Architecture(name, model, family)
    return list(found.values())


def small_config(name: str) -> PretrainedConfig:
    """A small config of `name`, with as few layers as show every kind of layer that it has.

    Raises:
        NotMade: says which step failed.
    """
    config_class = CONFIG_MAPPING[name]
    default, config, failed = None, None, ""
    with contextlib.suppress(Exception), quiet():
        default = config_class()
    wanted = _kinds(default)
    for layers in range(2, MOST_LAYERS + 1):
        values = _values(config_class, default, layers, OVERRIDES.get(name, {}))
        try:
            with quiet():
                config = config_class(**values)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            continue
        if _kinds(config) >= wanted:
            break
    if config is None:
        raise NotMade(f"config: {failed}"[:300])
    return getattr(config, OVERRIDES.get(name, {}).get("part", ""), config)


def base_model(arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The model with random weights, in eval mode.

    Raises:
        NotMade: no config, no model, or more than `MOST_PARAMETERS`.
    """
    make = MAKERS[arch.family].from_config
    if "part" in OVERRIDES.get(arch.name, {}):
        make = getattr(transformers, arch.model)
    try:
        with torch.device("meta"), quiet():
            count = sum(p.numel() for p in make(small_config(arch.name)).parameters())
    except Exception:
        count = 0  # a model that cannot be made without values is counted below
    if count > MOST_PARAMETERS:
        raise NotMade(f"{count / 1e6:.0f}M parameters from the small config")
    torch.manual_seed(seed)
    try:
        with quiet():
            model = make(small_config(arch.name))
    except NotMade:
        raise
    except Exception as error:
        raise NotMade(f"model: {type(error).__name__}: {error}"[:300]) from error
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise NotMade(f"{count / 1e6:.0f}M parameters from the small config")
    model = model.to(dtype).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    randomise(model)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


@torch.no_grad()
def randomise(model: Any) -> None:
    """Weights that make tokens matter: a linear layer keeps the size of what it reads."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            module.weight.normal_(0, 1.2 / min(module.weight.shape) ** 0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
        elif isinstance(module, torch.nn.Embedding):
            module.weight.normal_(0, 1.0)
    for name, parameter in model.named_parameters():
        if "expert" in name and parameter.dim() == 3:
            parameter.normal_(0, 1.2 / min(parameter.shape[1:]) ** 0.5)
        elif not torch.isfinite(parameter).all():
            parameter.normal_(0, 0.1)


def _values(
    config_class: Any, default: Any, layers: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `config_class` for a small model."""
    values: dict[str, Any] = {}
    nested = getattr(config_class, "sub_configs", {})
    special = iter(range(VOCAB - 1, LAST, -1))
    for field in dataclasses.fields(config_class):
        name, declared = field.name, field.default
        if name in nested:
            part = getattr(default, name, None)
            if isinstance(part, PretrainedConfig):
                values[name] = _values(type(part), part, layers, overrides.get(name, {}))
                values[name].setdefault("model_type", part.model_type)
            continue
        if name in ALWAYS:
            values[name] = ALWAYS[name]
        elif name in ORDINARY:
            values[name] = ORDINARY[name]
        elif SPECIAL.fullmatch(name) and isinstance(declared, int):
            values[name] = next(special)
        elif isinstance(declared, bool) or not isinstance(declared, int | float):
            continue
        elif LAYERS.fullmatch(name):
            values[name] = layers
        else:
            for pattern, value in SIZES.items():
                if re.fullmatch(pattern, name):
                    values[name] = value
                    break
    _key_value_heads(config_class, values)
    values.update(
        {k: v(layers) if callable(v) else v for k, v in overrides.items() if k not in nested}
    )
    for name in nested:
        if name in overrides and name not in values:
            values[name] = overrides[name]
    values.pop("part", None)
    return values


def _key_value_heads(config_class: Any, values: dict[str, Any]) -> None:
    """Groups of two query heads, where the default has groups; one head where it has one."""
    declared = {f.name: f.default for f in dataclasses.fields(config_class)}
    for name in ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"):
        kept = declared.get(name)
        if not isinstance(kept, int):
            continue
        heads = declared.get("num_attention_heads", declared.get("n_heads"))
        values[name] = 1 if kept == 1 else 4 if kept == heads else 2


def _kinds(config: Any) -> set[str]:
    """The kinds of layers that a config and the configs in it list."""
    if config is None:
        return set()
    found = set()
    for part in [config, *(getattr(config, n, None) for n in type(config).sub_configs)]:
        for name in KINDS:
            kinds = getattr(part, name, None)
            if isinstance(kinds, list | tuple):
                found |= {f"{name}: {kind}" for kind in kinds if isinstance(kind, str)}
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
