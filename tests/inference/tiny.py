"""Small models from config, with three aLoRA adapters whose weights are random, not zero."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from alora_kernels.inference import Session

VOCABULARY = 96
WINDOW = 16
# The model generates freely: every id from 3 on is an ordinary token; 2 ends.
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
INVOCATIONS = {"red": [5, 9, 5], "green": [11], "blue": [7, 7, 13, 21]}

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Weights of a size at which the tokens of the context matter for the next one.
    "initializer_range": 0.2,
}


def base_model(kind: str, seed: int, attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(seed)
    common = {**_COMMON, **changes}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, attn_implementation=attention))
    elif kind == "mistral":
        config = MistralConfig(**common, sliding_window=WINDOW, attn_implementation=attention)
        model = MistralForCausalLM(config)
    elif kind == "gemma3":
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(
            **common,
            sliding_window=WINDOW,
            layer_types=types,
            query_pre_attn_scalar=8,
            attn_implementation=attention,
        )
        model = Gemma3ForCausalLM(config)
    elif kind == "bamba":
        model = BambaForCausalLM(_bamba(attention, common))
    else:
        raise ValueError(kind)
    return model.eval()


def _bamba(attention: str, common: dict[str, Any]) -> BambaConfig:
    """Recurrent layers beside those of attention."""
    sizes = {k: v for k, v in common.items() if k != "head_dim"}
    return BambaConfig(
        **sizes,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=8,
        attn_implementation=attention,
    )


def peft_model(
    kind: str, seed: int, attention: str = "sdpa", plain: bool = False, **changes: Any
) -> PeftModel:
    """With the adapters of INVOCATIONS, and a plain LoRA named "plain" if asked."""
    model = base_model(kind, seed, attention, **changes)
    wrapped: Any = None
    names: dict[str, list[int] | None] = dict(INVOCATIONS)
    if plain:
        names["plain"] = None
    for name, tokens in names.items():
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            alora_invocation_tokens=tokens,
        )
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    return wrapped.eval()


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character: ids 3 to 95, "§" ends a turn (2), "^" begins a text (1)."""
    characters = [chr(c) for c in range(32, 127) if chr(c) not in "^"][: VOCABULARY - 4]
    vocabulary = {"_pad": 0, "^": 1, "§": 2, "\n": 3}
    for character in characters:
        vocabulary[character] = len(vocabulary)
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="^",
        eos_token="§",
        pad_token="_pad",
        chat_template=chat_template,
    )


CHAT_TEMPLATE = (
    "^{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '§\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def context(length: int, seed: int) -> list[int]:
    """Random ordinary tokens in which no invocation occurs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, VOCABULARY, (length,), generator=generator).tolist()
    return [1, *ids[1:]]


@torch.no_grad()
def scratch_logits(model: PeftModel, adapter: str | None, ids: list[int], start: int | None) -> Any:
    """Float logits `[T, V]` of one forward over all tokens without any cache, by PEFT alone.

    `model` must not be accelerated.
    """
    tokens = torch.tensor([ids])
    if adapter is None:
        with model.disable_adapter():
            return model(input_ids=tokens).logits[0]
    model.set_adapter(adapter)
    assert start is not None
    return model(input_ids=tokens, alora_offsets=[len(ids) - start]).logits[0]


def check_greedy(
    model: PeftModel,
    adapter: str | None,
    before: list[int],
    start: int | None,
    generated: list[int],
    gap: float = 1e-4,
) -> int:
    """Assert that `generated` is what greedy decoding from scratch gives; returns the ties.

    A token may differ only where the reference's best two logits are closer than `gap`; the
    comparison then goes on from the token that was generated.
    """
    logits = scratch_logits(model, adapter, [*before, *generated], start)
    ties = 0
    for i, token in enumerate(generated):
        row = logits[len(before) + i - 1]
        if int(row.argmax()) != token:
            best = row.topk(2).values
            assert float(best[0] - row[token]) < gap, (
                f"token {i} is {token}, from scratch {int(row.argmax())}; "
                f"logits {row[token]:.5f} and {best[0]:.5f}"
            )
            ties += 1
    return ties


def session_of(kind: str, seed: int, attention: str = "sdpa") -> tuple[Session, Any]:
    """A session, and the same model for stock PEFT."""
    return (
        Session(peft_model(kind, seed, attention), tokenizer(CHAT_TEMPLATE)),
        peft_model(kind, seed, attention),
    )


def check(reference: Any, before: list[int], answer: Any) -> int:
    return check_greedy(
        reference,
        answer.adapter,
        [*before, *answer.invocation],
        answer.invocation_start,
        list(answer.token_ids),
    )
