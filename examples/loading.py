"""The base model of the examples: a hub name, a folder, a GGUF file, or Gemma 3 270M."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from alora_kernels.gguf import convert_gguf, gemma_270m


class HubError(RuntimeError):
    """The hub cannot be reached, or refuses the request."""


class FlagError(ValueError):
    """A flag asks for something impossible on this machine or with this model."""


def device_of(name: str) -> str:
    """The device of a flag. `auto` is a GPU if there is one; other names must exist here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FlagError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


def check_hub(push: bool, name: str | None) -> None:
    """Fail before any work if the result could not be pushed."""
    if not push:
        return
    if not name:
        raise HubError("--push_to_hub needs --hub_model_id")
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        raise HubError(
            f"--push_to_hub: no valid login for the hub ({type(error).__name__}); set HF_TOKEN or "
            "log in first, or leave the flag out: the adapter is saved locally either way"
        ) from error


def load_base(name: str | None, output_dir: Path, quantize: bool, device: str) -> tuple[Any, str]:
    """The model, and the folder or name that holds its tokenizer."""
    if name is None:
        source = str(gemma_270m())
    elif name.endswith(".gguf"):
        folder = output_dir / "base-model"
        source = str(folder if (folder / "config.json").is_file() else convert_gguf(name, folder))
    else:
        source = name
    options: dict[str, Any] = {}
    if quantize:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("--quantize needs bitsandbytes: pip install bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        )
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:
        if Path(source).exists():
            raise
        raise HubError(
            f"--base_model {source}: not a local folder, and the hub says: {error}"
        ) from error
    if quantize:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.to(device)
    return model, source


def load_tokenizer(source: str, template: Path) -> Any:
    """The tokenizer, with its own chat template or, if it knows Gemma's turns, with Gemma's."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template is None:
        turns = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
        if None in turns or tokenizer.unk_token_id in turns:
            raise FlagError(
                f"--base_model {source} has no chat template and not Gemma's turns; set one in its "
                "tokenizer"
            )
        tokenizer.chat_template = template.read_text(encoding="utf8")
    return tokenizer
