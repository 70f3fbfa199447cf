"""The fine-tuning example on a tiny model: its folder of files, and a call."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .tiny import CHAT_TEMPLATE, base_model, tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = ("alora_finetuning", "display", "kv_reuse", "loading", "rows", "scoring", "make_appointments")


def importable(monkeypatch: Any) -> Iterator[None]:
    """The examples import each other by name; nothing of them stays imported."""
    import sys

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "data"))
    yield
    for name in OWN:
        sys.modules.pop(name, None)


def chats(count: int = 12) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"it is {i}"},
        ]
        for i in range(count)
    ]


def make_folder(folder: Path) -> Path:
    """`base`: a tiny Gemma 3 with a tokenizer; `rows.jsonl`: twelve chats."""
    base_model("gemma3", 6).save_pretrained(folder / "base")
    tokenizer(CHAT_TEMPLATE).save_pretrained(folder / "base")
    with (folder / "rows.jsonl").open("w") as file:
        for chat in chats():
            file.write(json.dumps({"messages": chat}) + "\n")
    return folder


def run(folder: Path, *flags: str) -> int:
    """The script's exit status. Later flags win over the ones given here."""
    script = importlib.import_module("alora_finetuning")
    return int(
        script.main(
            [
                *("--base_model", str(folder / "base"), "--data_path", str(folder / "rows.jsonl")),
                *("--heldout_path", str(folder / "rows.jsonl"), "--val_set_size", "4"),
                *("--output_dir", str(folder / "out"), "--invocation_string", "<a>"),
                *("--device", "cpu", *flags),
            ]
        )
    )
