"""PrefixStore: keeps prefixes across steps and epochs, in memory or on disk, with a byte budget."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_whole
from .fingerprint import fingerprint
from .kv import KeyValue

_FORMAT = "2"
_SUFFIX = ".safetensors"


class PrefixStore:
    """Stores keys and values of prefixes; over the budget it drops the least recently used.

    The key of an entry covers the token ids, the position ids, every byte of the base weights, the
    config, dtypes, quantisation and attention implementation. So a stale entry is never found.

    Args:
        max_bytes: the budget for keys and values. A larger entry is not kept.
        directory: a folder for the entries, as safetensors files that runs and processes share. By
            default entries are in memory (pinned if the model is on a GPU).
        check: every step checks every byte of the weights, whichever value is given: "full", or
            "sample", which is kept for older code.

    Attributes:
        hits, misses: how many prefixes were found, and how many were not.
        evictions: how many entries were dropped for the budget.
        bytes: the size of all entries now.
    """

    def __init__(
        self,
        max_bytes: int = 4 << 30,
        directory: str | os.PathLike[str] | None = None,
        check: str = "full",
    ) -> None:
        if check not in ("sample", "full"):
            raise ValueError(f"PrefixStore: check must be 'sample' or 'full', got {check!r}")
        if max_bytes <= 0:
            raise ValueError(f"PrefixStore: max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes
        self.directory = None if directory is None else Path(directory)
        self.hits = self.misses = self.evictions = self.bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # oldest first
        self._memory: dict[str, list[KeyValue]] = {}
        self._warned_too_big = False
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            files = [(p.stat().st_mtime_ns, p) for p in self.directory.glob(f"*{_SUFFIX}")]
            for _, path in sorted(files):
                self._sizes[path.stem] = path.stat().st_size
            self.bytes = sum(self._sizes.values())
            self._evict()

    def __len__(self) -> int:
        return len(self._sizes)

    def key(self, name: str, token_ids: Tensor, positions: Tensor) -> str:
        """The key of one prefix, from the model's `name` and int64 `[P]` ids and positions."""
        digest = hashlib.blake2b(f"{_FORMAT}:{name}:".encode(), digest_size=20)
        digest.update(token_ids.to(torch.int64).cpu().contiguous().numpy().tobytes())
        digest.update(positions.to(torch.int64).cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def name(self, model: nn.Module, extra: str = "") -> str:
        """The fingerprint of `model`, computed anew."""
        return fingerprint(model, extra)

    def get(self, key: str, device: torch.device) -> list[KeyValue] | None:
        """Keys and values `[H, n, D]` of all layers, on `device`; None if there is no entry."""
        layers = self._memory.get(key) if self.directory is None else self._read(key)
        if layers is None:
            self.misses += 1
            return None
        self.hits += 1
        if key in self._sizes:
            self._sizes.move_to_end(key)
        return [
            (k.to(device, non_blocking=True), v.to(device, non_blocking=True)) for k, v in layers
        ]

    def put(self, key: str, layers: Sequence[KeyValue]) -> None:
        """Keep a copy of an entry; drops older entries if there is no room."""
        size = sum(t.numel() * t.element_size() for pair in layers for t in pair)
        if size > self.max_bytes:
            if not self._warned_too_big:
                self._warned_too_big = True  # once per store, because each has its own budget
                warnings.warn(
                    f"PrefixStore: a prefix of {size:,} bytes is above the budget of "
                    f"{self.max_bytes:,} and is computed anew each time; raise max_bytes",
                    stacklevel=2,
                )
            return
        self._forget(key)
        if self.directory is None:
            self._memory[key] = [(_keep(k), _keep(v)) for k, v in layers]
        else:
            size = self._write(key, layers)
        self._sizes[key] = size
        self.bytes += size
        self._evict()

    def clear(self) -> None:
        """Drop all entries, and delete their files."""
        for key in list(self._sizes):
            self._drop(key)

    def _evict(self) -> None:
        while self.bytes > self.max_bytes and self._sizes:
            self._drop(next(iter(self._sizes)))
            self.evictions += 1

    def _forget(self, key: str) -> None:
        self.bytes -= self._sizes.pop(key, 0)

    def _drop(self, key: str) -> None:
        self._forget(key)
        self._memory.pop(key, None)
        if self.directory is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path(key).unlink()

    # ------------------------------------------------------------------ files

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}{_SUFFIX}"

    def _write(self, key: str, layers: Sequence[KeyValue]) -> int:
        from safetensors.torch import save

        tensors = {}
        for index, (k, v) in enumerate(layers):
            tensors[f"{index:04d}.key"] = k.detach().contiguous().cpu()
            tensors[f"{index:04d}.value"] = v.detach().contiguous().cpu()
        data = save(tensors, metadata={"prefix": f"{key} {_checksum(tensors)}"})
        write_whole(self._path(key), data)
        return len(data)

    def _read(self, key: str) -> list[KeyValue] | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if metadata.get("prefix") != f"{key} {_checksum(tensors)}":
                raise SafetensorError("checksum does not match")
            os.utime(path)
        except FileNotFoundError:
            self._forget(key)
            return None
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(
                f"PrefixStore: {path} is damaged ({error}); its prefix is computed anew",
                stacklevel=3,
            )
            self._drop(key)
            return None
        if key not in self._sizes:  # another process wrote it
            self._sizes[key] = path.stat().st_size
            self.bytes += self._sizes[key]
        values = list(tensors.values())
        return list(zip(values[::2], values[1::2]))


def _keep(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, pinned if the tensor is on a GPU."""
    if tensor.device.type == "cpu":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor.detach())


def _checksum(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        data = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
