"""Reads the invocation of an adapter from its folder, and notices when the folder's files change.

The workers read an adapter's files once. The process that admits requests must go by the same
files: it reads them at the adapter's first request, and compares their sizes and times afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def invocation_tokens(config: dict[str, Any]) -> tuple[int, ...] | None:
    """The invocation of a PEFT configuration; None for a plain LoRA.

    Raises ValueError for an Activated LoRA that vLLM would run as a plain one.
    """
    tokens = config.get("alora_invocation_tokens")
    if tokens is None:
        if config.get("invocation_string"):
            raise ValueError(
                "adapter_config.json has invocation_string, the older format of Activated LoRA, "
                "which would run as an always-on LoRA. Give alora_invocation_tokens, the token "
                "ids of that string, instead."
            )
        return None
    good = isinstance(tokens, list) and tokens and all(type(t) is int and t >= 0 for t in tokens)
    if not good:
        raise ValueError(
            f"adapter_config.json has alora_invocation_tokens={tokens!r}: expected a list of at "
            "least one token id, or null for a plain LoRA."
        )
    return tuple(tokens)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files at one moment.

    `tokens` is its invocation, None for a plain LoRA. `stamp` differs when other files lie at the
    path.
    """

    tokens: tuple[int, ...] | None
    stamp: tuple[tuple[str, int, int], ...]

    @property
    def identity(self) -> str:
        """A digest of the tokens and the files. It is part of the keys of cached blocks."""
        return hashlib.sha256(repr((self.tokens, self.stamp)).encode()).hexdigest()[:32]


def stamp(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files of an adapter."""
    found = []
    for name in (CONFIG, *WEIGHTS):
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError:
            continue
        found.append((name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def read(folder: str) -> Adapter:
    """Reads a folder. Raises OSError or ValueError if it holds no adapter."""
    seen = stamp(folder)
    with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
        return Adapter(invocation_tokens(json.load(file)), seen)


class Adapters:
    """The adapters that requests have named so far, with their files as they were then."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str, str], tuple[str, Adapter]] = {}

    def of(self, lora_request: Any) -> Adapter:
        """The adapter of a vLLM LoRARequest.

        A request with `load_inplace` makes the workers read the files again, so this method does it
        too. Otherwise it refuses files that have changed or are gone, if the old or the new version
        is an aLoRA: the workers may hold either of them. Raises ValueError.
        """
        key = (lora_request.lora_int_id, lora_request.lora_name, lora_request.lora_path)
        folder, known = self._known.get(key, ("", None))
        if known is None:
            from vllm.lora.utils import get_adapter_absolute_path

            folder = get_adapter_absolute_path(lora_request.lora_path)
        elif stamp(folder) == known.stamp:
            return known
        try:
            now = read(folder)
        except OSError as error:
            if known is not None and known.tokens is None:
                return known
            raise ValueError(
                f"{CONFIG} of adapter {lora_request.lora_name!r} cannot be read, which says "
                f"whether it is an Activated LoRA: {error}"
            ) from error
        if known is not None and not lora_request.load_inplace:
            if known.tokens is None and now.tokens is None:
                return known
            raise ValueError(
                f"the files of adapter {lora_request.lora_name!r} at {folder} have changed since "
                "it was first used: load it again (load_inplace), or under another name"
            )
        self._known[key] = (folder, now)
        return now
