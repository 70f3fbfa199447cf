"""A session on disk: token ids and the base cache, in safetensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

from .views import shared_layers

if TYPE_CHECKING:
    from .session import Session

FORMAT = "alora_kernels.session.1"


def save_session(session: Session, folder: Path) -> Path:
    """Write `session.json` and `cache.safetensors` into a new folder, whole or not at all.

    Raises:
        FileExistsError: the folder exists and is not empty.
        TypeError: the cache holds more than keys and values (a recurrent model).
    """
    from safetensors.torch import save_file

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"Session.save: {folder} is not empty; give a new folder")
    if not shared_layers(session._cache):
        kinds = sorted({type(layer).__name__ for layer in session._cache.layers})
        raise TypeError(f"Session.save: only keys and values can be saved, not {', '.join(kinds)}")
    tensors = {}
    layers: list[Any] = list(session._cache.layers)
    for i, layer in enumerate(layers):
        if layer.keys is not None:
            tensors[f"{i}.keys"] = layer.keys.contiguous()
            tensors[f"{i}.values"] = layer.values.contiguous()
    header = {
        "format": FORMAT,
        "token_ids": list(session.token_ids),
        "cached_length": session.cached_length,
        "base": _identity(session),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, building / "cache.safetensors")
        (building / "session.json").write_text(json.dumps(header), encoding="utf8")
        if folder.exists():
            folder.rmdir()
        os.replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def load_session(session: Session, folder: Path) -> None:
    """Fill an empty session from `folder`.

    Raises:
        ValueError: the files were written for another model, or do not fit together.
    """
    from safetensors.torch import load_file

    header = json.loads((folder / "session.json").read_text(encoding="utf8"))
    if header.get("format") != FORMAT:
        raise ValueError(
            f"Session.load: {folder} has format {header.get('format')!r}, not {FORMAT}"
        )
    here = _identity(session)
    differ = [k for k in here if header["base"].get(k) != here[k]]
    if differ:
        raise ValueError(
            f"Session.load: {folder} was saved for another base model: "
            + ", ".join(f"{k} is {here[k]!r}, saved {header['base'].get(k)!r}" for k in differ)
        )
    tensors = load_file(folder / "cache.safetensors")
    cache = DynamicCache(config=session.base.config)
    length = int(header["cached_length"])
    layers: list[Any] = list(cache.layers)
    for i, layer in enumerate(layers):
        if length == 0:
            break
        keys, values = (tensors.get(f"{i}.{name}") for name in ("keys", "values"))
        window = getattr(layer, "sliding_window", None)
        stored = length if window is None else min(length, window - 1)
        if keys is None or values is None or keys.shape[-2] != stored:
            raise ValueError(f"Session.load: layer {i} in {folder} does not hold {stored} tokens")
        layer.update(keys.to(session.base.device), values.to(session.base.device))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    session._ids, session._cache = [int(i) for i in header["token_ids"]], cache


def _identity(session: Session) -> dict[str, Any]:
    """What the keys and values depend on: the base's shape, and a sample of its weights."""
    config = session.base.config
    total = 0.0
    for name, parameter in session.base.named_parameters():
        if "lora_" in name or "magnitude" in name:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        total += float(flat[::step].double().abs().sum())
    return {
        "model_type": config.model_type,
        "dtype": str(session.base.dtype),
        "weights": f"{total:.9g}",
    }
