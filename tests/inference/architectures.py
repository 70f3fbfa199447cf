"""Small models of many architectures, made from their configs.

`python -m tests.inference.architectures [NAME ...]` compares `ask` with `generate` on every causal
architecture of the installed transformers, or on those named, and prints a table.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alora_kernels import once
from alora_kernels.inference import Session

from .tiny import VOCABULARY, tokenizer

LARGEST = 20_000_000  # parameters
WINDOW = 12
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": WINDOW,
    "attention_chunk_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def small_config(model_type: str, **changes: Any) -> Any:
    """The config of an architecture with the sizes above, as far as it knows them."""
    default = AutoConfig.for_model(model_type)
    known = default.to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    if "text_config" in known:  # the decoder of a model of several parts
        inner = small_config(default.text_config.model_type)
        return type(default)(**{"text_config": inner.to_dict(), **changes})
    if "qk_rope_head_dim" in sizes:  # latent attention
        sizes.update(head_dim=sizes["qk_rope_head_dim"], num_key_value_heads=4)
    if getattr(default, "layer_types", None) is not None:
        kinds = list(dict.fromkeys(default.layer_types))
        sizes["layer_types"] = [kinds[i % len(kinds)] for i in range(4)]
    while True:
        try:
            return type(default)(**{**sizes, **changes})
        except AttributeError as error:  # one that is computed from others
            name = str(error).partition("property '")[2].partition("'")[0]
            name = "layer_types" if name == "layers_block_type" else name
            if name not in sizes:
                raise
            del sizes[name]


def small_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model in float64, or None where the sizes above do not make it small."""
    import transformers

    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = small_config(model_type, **changes)
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    config._experts_implementation = "eager"  # the others take no float64
    torch.manual_seed(seed)
    model = kind(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                parameter.normal_(std=0.1)
            if parameter.dim() == 1 and "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class Said(logging.Handler):
    """What the package's logger said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Said:

        once.forget()
        logging.getLogger("alora_kernels").addHandler(self)
        return self

    def __exit__(self, *args: Any) -> None:
        logging.getLogger("alora_kernels").removeHandler(self)


def compare(model: Any, context: int = 40, new: int = 8) -> tuple[bool, str]:
    """Whether `ask` answers as `generate` on prompts of one length and of several; how it did."""
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (context,), generator=generator).tolist()
    session = Session(model, tokenizer()).extend(ids)
    equal, how = True, []
    for prompts in (
        [[11, 12, 13], [30, 31, 32], [44, 45, 46]],
        [[11], [30, 31, 32, 33, 34, 35], [44, 45, 46]],
    ):
        with Said() as said:
            together = session.ask([None] * 3, prompts, **options)
        alone = [session.generate(prompt=p, **options) for p in prompts]
        equal = equal and [a.token_ids for a in together] == [a.token_ids for a in alone]
        how.append(said.lines[0].partition("(")[2].rpartition(")")[0] if said.lines else "batch")
    return equal, " / ".join(dict.fromkeys(how))


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.getLogger("alora_kernels").propagate = False
    wrong = 0
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model = small_model(name)
            for context in (40, 7):
                equal, how = compare(model, context)
                wrong += not equal
                print(f"{name:28} {context:3} {'equal' if equal else 'WRONG':6} {how}", flush=True)
        except Exception as error:
            line = str(error).splitlines()[0][:110] if str(error) else ""
            print(f"{name:28}     not run {type(error).__name__}: {line}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
