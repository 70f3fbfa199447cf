"""examples/kv_reuse.py: a chain of steps on one cache."""

from __future__ import annotations

import re
from pathlib import Path

import kv_reuse
import pytest

from ..inference.tiny import CHAT_TEMPLATE, base_model, tokenizer


def test_kv_reuse_runs_each_step_on_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_model("gemma3", 6, max_position_embeddings=2048).save_pretrained(tmp_path / "base")
    tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "base")
    flags = ["--base_model", str(tmp_path / "base"), "--repeat", "1", "--max_new_tokens", "2"]
    assert kv_reuse.main([*flags, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    cached = int(re.search(r"The cache holds (\d+) tokens, once", printed).group(1))  # type: ignore[union-attr]
    assert cached > len(kv_reuse.DOCUMENT) + len(kv_reuse.QUESTION)
    assert printed.count("base answers") == 2 and "3 adapters in one batch" in printed
