"""Adapter folders that no engine can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .serving import RANK

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def _first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def _cut(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def _wider(tensors: dict[str, torch.Tensor]) -> None:
    name = _first(tensors, "lora_A")
    tensors[name] = torch.zeros(tensors[name].shape[0], 2 * tensors[name].shape[1])


def _embedding(tensors: dict[str, torch.Tensor]) -> None:
    for part in "AB":
        tensors[f"base_model.model.model.norm.lora_{part}.weight"] = torch.zeros(RANK, RANK)


# What is done to a good adapter's folder, the status of the answer, and a part of its message.
BAD: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no folder": (shutil.rmtree, 404, "is not a folder"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), 404, "holds no adapter_config.json"),
    "not JSON": (lambda f: (f / CONFIG).write_text("{"), 400, "adapter_config.json"),
    "a JSON list": (lambda f: (f / CONFIG).write_text("[1]"), 400, "expected a JSON object"),
    "no rank": (lambda f: _config(f, r=None), 400, "expected a whole number as rank r"),
    "too high a rank": (lambda f: _config(f, r=64), 400, "LoRA rank 64 is greater"),
    "DoRA": (lambda f: _config(f, use_dora=True), 400, "DoRA"),
    "an empty invocation": (
        lambda f: _config(f, alora_invocation_tokens=[]), 400, "at least one token id"
    ),
    "the older format": (
        lambda f: _config(f, alora_invocation_tokens=None, invocation_string="x"),
        400, "invocation_string",
    ),
    "no tensors": (lambda f: (f / TENSORS).unlink(), 400, "holds no adapter_model.safetensors"),
    "cut safetensors": (_cut, 400, "not a readable safetensors file"),
    "random bytes": (
        lambda f: (f / TENSORS).write_bytes(bytes(range(256)) * 9), 400, "not a readable"
    ),
    "another rank in the tensors": (lambda f: _config(f, r=4), 400, "says r=4"),
    "A without B": (
        lambda f: _tensors(f, lambda t: t.pop(_first(t, "lora_B"))), 400, "has lora_A alone"
    ),
    "another model's sizes": (lambda f: _tensors(f, _wider), 400, "another model's adapter?"),
    "a layer that takes none": (lambda f: _tensors(f, _embedding), 400, "adapts no layer like"),
    "an unknown name": (
        lambda f: _tensors(f, lambda t: t.update({"x.y": torch.zeros(2)})), 400, "x.y"
    ),
}  # fmt: skip


def make_bad(good: Path, folder: Path, what: str) -> Path:
    """A copy of the adapter `good` that was spoilt as `BAD[what]` says."""
    shutil.copytree(good, folder)
    BAD[what][0](folder)
    return folder
