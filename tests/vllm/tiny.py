"""Tiny models from their configurations, adapters made by PEFT, and what PEFT answers.

Everything is made in a folder of the test's own; nothing is fetched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

VOCAB = 128
EOS = 1
INVOCATION = (40, 41, 42)
LONGEST = 512
# A token may differ from the reference where the reference's best two logits are nearer than this.
CLOSE = 1e-4

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LONGEST,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def config(family: str, **sizes: int):
    """The configuration of a tiny model of a family."""
    from transformers import LlamaConfig, MistralConfig, Qwen3Config

    if family == "llama":
        return LlamaConfig(**SIZES | sizes)
    if family == "qwen3":
        return Qwen3Config(**SIZES | sizes, head_dim=32)
    assert family == "mistral"
    return MistralConfig(**SIZES | sizes, head_dim=32, sliding_window=None)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one word for each token: `t7` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCAB)}
    # What structured output needs to write: a digit each.
    words = {w if i < 100 or i > 109 else str(i - 100): i for w, i in words.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t1", pad_token="t2", unk_token="t3"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}t50 {% endif %}"
    )
    fast.save_pretrained(folder)


@dataclass(frozen=True)
class Tiny:
    """A model's folder, and its adapters' folders by name."""

    family: str
    folder: Path
    adapters: dict[str, Path]

    def answer(self, adapter: str | None, prompt: list[int], new: int) -> list[int]:
        """PEFT's greedy tokens, all recomputed for each of them, without a cache."""
        return list(answer(self, adapter, tuple(prompt), new))

    def __hash__(self) -> int:
        return hash(self.folder)


def make(family: str, folder: Path, **sizes: int) -> Tiny:
    """A model with adapters: two aLoRAs with one invocation, one with another, and a plain LoRA.

    `plain` has the very tensors of `first`; `other` has another invocation and rank.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # larger than at birth, so that answers vary
                parameter.normal_(std=0.15)
    base = folder / family
    model.save_pretrained(base)
    save_tokenizer(base)
    adapters = {}
    targets = {
        "first": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "second": ("q_proj", "k_proj", "v_proj"),
        "other": ("q_proj", "v_proj", "down_proj"),
    }
    for name, modules in targets.items():
        tokens = [60, 61] if name == "other" else list(INVOCATION)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=4 if name == "other" else 8,
            lora_alpha=16,
            target_modules=list(modules),
            alora_invocation_tokens=tokens,
            init_lora_weights=False,
        )
        peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.3)
        peft_model.save_pretrained(folder / name)
        adapters[name] = folder / name
    adapters["plain"] = plain_of(adapters["first"], folder / "plain")
    return Tiny(family, base, adapters)


def plain_of(adapter: Path, folder: Path) -> Path:
    """The same tensors as a plain LoRA."""
    return with_tokens(adapter, folder, None)


def with_tokens(adapter: Path, folder: Path, tokens: list[int] | None) -> Path:
    """The same tensors with another invocation."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["alora_invocation_tokens"] = tokens
    path.write_text(json.dumps(content))
    return folder


@lru_cache(maxsize=8)
def peft_model(tiny: Tiny):
    """The model with all of its adapters, in PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny.folder)
    names = list(tiny.adapters)
    model = PeftModel.from_pretrained(base, tiny.adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tiny.adapters[name], adapter_name=name)
    return model.eval()


def offset_of(tiny: Tiny, adapter: str | None, prompt: Sequence[int]) -> int | None:
    """PEFT's offset: tokens from the last invocation to the end. None: all of them, 0: none."""
    if adapter is None:
        return 0
    wanted = peft_model(tiny).peft_config[adapter].alora_invocation_tokens
    if wanted is None:
        return None
    places = range(len(prompt) - len(wanted) + 1)
    starts = [i for i in places if list(prompt[i : i + len(wanted)]) == list(wanted)]
    return len(prompt) - starts[-1] if starts else 0


@torch.no_grad()
def all_logits(
    tiny: Tiny, adapter: str | None, prompt: Sequence[int], answer: Sequence[int] = ()
) -> torch.Tensor:
    """PEFT's logits `[tokens, vocabulary]` of a prompt and an answer, computed without a cache.

    The invocation is looked for in the prompt alone.
    """
    model = peft_model(tiny)
    offset = offset_of(tiny, adapter, prompt)
    ids = torch.tensor([[*prompt, *answer]])
    if offset == 0:
        with model.disable_adapter():
            return model(ids).logits[0]
    model.set_adapter(adapter)
    if offset is None:
        return model(ids).logits[0]
    return model(ids, alora_offsets=[offset + len(answer)]).logits[0]


def logits(
    tiny: Tiny, adapter: str | None, prompt: Sequence[int], answer: Sequence[int]
) -> torch.Tensor:
    """The next token's of them."""
    return all_logits(tiny, adapter, prompt, answer)[-1]


@lru_cache(maxsize=4096)
def answer(tiny: Tiny, adapter: str | None, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
    """Greedy tokens."""
    tokens: list[int] = []
    for _ in range(new):
        tokens.append(int(logits(tiny, adapter, prompt, tokens).argmax()))
    return tuple(tokens)
