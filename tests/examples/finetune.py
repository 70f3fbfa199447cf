"""The fine-tuning example on a tiny model: its folder of files, and a call."""

from __future__ import annotations

import json
from pathlib import Path

import alora_finetuning

from ..inference.tiny import CHAT_TEMPLATE, base_model, tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    return int(
        alora_finetuning.main(
            [
                *("--base_model", str(folder / "base"), "--data_path", str(folder / "rows.jsonl")),
                *("--heldout_path", str(folder / "rows.jsonl"), "--val_set_size", "4"),
                *("--output_dir", str(folder / "out"), "--invocation_string", "<a>"),
                *("--device", "cpu", *flags),
            ]
        )
    )
