"""The example that people copy runs, and every adapter takes the base model's blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("rich")

pytestmark = pytest.mark.vllm
EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_pipeline.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ, "COLUMNS": "160", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], env=env, text=True, capture_output=True
    )


def test_every_adapter_takes_the_base_models_blocks() -> None:
    block = 32
    result = run("--tiny", "--block_size", str(block), "--repeat", "1", "--dtype", "float32")
    assert result.returncode == 0, result.stderr[-3000:]
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in result.stdout.split("\n")]
    steps = [c for c in cells if len(c) == 6 and c[1]]  # a long text wraps into rows of its own
    names = [c[0].partition(":")[0] for c in steps]
    assert names == ["base", "query_rewrite", "answerability", "base", "hallucination"]
    prompt, cached = ([int(c[i]) for c in steps] for i in (1, 2))
    assert cached[0] == 0
    # Each step takes what the base model has read: all of its last prompt but less than a block.
    for now, before in ((1, 0), (2, 0), (3, 0), (4, 3)):
        assert prompt[before] - block < cached[now] <= prompt[now]
        assert cached[now] % block == 0
    assert all(c[3].endswith(" ms") and c[4].endswith(" ms") for c in steps)


def test_a_wrong_adapter_flag_is_named() -> None:
    result = run("--adapter", "judge=/nowhere")
    assert result.returncode == 2
    assert "--adapter judge: expected NAME=DIR with one of query_rewrite" in result.stderr
