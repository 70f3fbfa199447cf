"""The files of a saved session: a context and its identity in JSON, its cache in safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..files import whole_folder
from .context import Context
from .identity import Identity
from .views import shared_layers

FORMAT = "alora_kernels.session.2"
FIRST_FORMAT = "alora_kernels.session.1"  # token ids alone, and a sample of the weights
_HEADER, _TENSORS = "session.json", "cache.safetensors"


@dataclass(frozen=True)
class Saved:
    """What `session.json` says.

    Attributes:
        context: all tokens of the session.
        cached_length: how many of them are in the cache.
        identity: of the base model that computed the cache.
        first_format: an older version wrote the folder: the identity holds a sample of the
            weights, and the context no text and no messages.
    """

    context: Context
    cached_length: int
    identity: Identity
    first_format: bool = False


def check_can_save(folder: Path, context: Context, cache: Cache) -> None:
    """Refuse what `save` could not write, before the weights are hashed for it.

    Raises:
        FileExistsError: the folder exists and is not empty.
        TypeError: the cache holds more than keys and values (a recurrent model), or a message more
            than JSON can hold.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"Session.save: {folder} is not empty; give a new folder")
    if not shared_layers(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise TypeError(f"Session.save: only keys and values can be saved, not {', '.join(kinds)}")
    try:
        json.dumps(context.messages)
    except TypeError as error:
        raise TypeError(
            f"Session.save: a message holds what JSON cannot: {error}; give messages of text"
        ) from error


def save(folder: Path, context: Context, cache: Cache, identity: Identity) -> Path:
    """Write `session.json` and `cache.safetensors` into a new folder, whole or not at all.

    Raises:
        FileExistsError, TypeError: as `check_can_save`.
    """
    from safetensors.torch import save_file

    check_can_save(folder, context, cache)
    tensors = {}
    layers: list[Any] = list(cache.layers)
    for i, layer in enumerate(layers):
        if layer.keys is not None:
            tensors[f"{i}.keys"] = layer.keys.contiguous()
            tensors[f"{i}.values"] = layer.values.contiguous()
    header = {
        "format": FORMAT,
        "token_ids": list(context.ids),
        "cached_length": cache.get_seq_length(),
        "context": {name: value for name, value in vars(context).items() if name != "ids"},
        "base": identity.settings,
        "config": identity.config,
    }
    with whole_folder(folder) as building:
        save_file(tensors, building / _TENSORS)
        (building / _HEADER).write_text(json.dumps(header), encoding="utf8")
    return folder


def read_header(folder: Path) -> Saved:
    """Read `session.json`.

    Raises:
        ValueError: the folder has another format.
    """
    header = json.loads((folder / _HEADER).read_text(encoding="utf8"))
    first = header.get("format") == FIRST_FORMAT
    if not first and header.get("format") != FORMAT:
        raise ValueError(
            f"Session.load: {folder} has format {header.get('format')!r}, not {FORMAT}"
        )
    ids = tuple(int(i) for i in header["token_ids"])
    if first:
        context = Context(ids=ids, border=len(ids))
    else:
        given = header["context"]
        context = Context(**{**given, "ids": ids, "messages": tuple(given["messages"])})
    identity = Identity(header["base"], header.get("config", {}))
    return Saved(context, int(header["cached_length"]), identity, first)


def fill_cache(folder: Path, length: int, cache: Cache, device: torch.device) -> None:
    """Read `cache.safetensors` into an empty cache.

    Args:
        length: how many tokens the file holds.
        cache: an empty cache of the model's kinds of layers.

    Raises:
        ValueError: a layer of the file does not hold that many tokens.
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / _TENSORS)
    if length == 0:
        return
    layers: list[Any] = list(cache.layers)
    for i, layer in enumerate(layers):
        keys, values = (tensors.get(f"{i}.{name}") for name in ("keys", "values"))
        window = getattr(layer, "sliding_window", None)
        stored = length if window is None else min(length, window - 1)
        if keys is None or values is None or keys.shape[-2] != stored:
            raise ValueError(f"Session.load: layer {i} in {folder} does not hold {stored} tokens")
        layer.update(keys.to(device), values.to(device))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
