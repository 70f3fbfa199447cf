"""Engines for the tests, and the comparison of their answers with PEFT's."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from . import tiny

BLOCK = 32

# No network, no usage report; one thread, so that sums have one order.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 5,
    "max_lora_rank": 8,
    "enable_prefix_caching": True,
    "block_size": BLOCK,
    "max_model_len": tiny.LONGEST,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
    "seed": 0,
    "disable_log_stats": False,
}


@contextmanager
def environment(**more: str) -> Iterator[None]:
    """The engines' environment variables, put back afterwards."""
    wanted = ENVIRONMENT | more
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@dataclass
class Answer:
    """What one request got."""

    tokens: list[int]
    cached: int
    output: Any


@dataclass
class Offline:
    """An offline engine in this process, over a tiny model and its adapters."""

    model: tiny.Tiny
    llm: Any
    loras: dict[str, Any] = field(default_factory=dict)

    def lora(self, name: str | None) -> Any:
        """The LoRARequest of an adapter; None for the base model."""
        from vllm.lora.request import LoRARequest

        if name is not None and name not in self.loras:
            path = str(self.model.adapters[name])
            self.loras[name] = LoRARequest(name, len(self.loras) + 1, path)
        return self.loras.get(name) if name is not None else None

    def ask(
        self, names: Sequence[str | None], prompts: Sequence[list[int]], new: int = 10, **more: Any
    ) -> list[Answer]:
        """All of these requests at once; greedy. `salt` keys the cache, the rest is sampling's."""
        from vllm import SamplingParams

        salt = more.pop("salt", None)
        params = SamplingParams(
            **{"temperature": 0.0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
            | more
        )
        inputs = [{"prompt_token_ids": p} | ({"cache_salt": salt} if salt else {}) for p in prompts]
        loras = [self.lora(name) for name in names]
        outputs = self.llm.generate(inputs, params, lora_request=loras, use_tqdm=False)
        return [Answer(list(o.outputs[0].token_ids), o.num_cached_tokens, o) for o in outputs]

    def check(
        self, names: Sequence[str | None], prompts: Sequence[list[int]], new: int = 10, **more: Any
    ) -> list[int]:
        """Asks, holds every answer against PEFT's, and returns how many tokens were cached."""
        answers = self.ask(names, prompts, new, **more)
        for name, prompt, got in zip(names, prompts, answers):
            same(self.model, name, prompt, got.tokens)
        return [answer.cached for answer in answers]

    def one(self, name: str | None, prompt: list[int], new: int = 10, **more: Any) -> int:
        """`check` for one request."""
        return self.check([name], [prompt], new, **more)[0]

    def metric(self, name: str) -> float:
        """A counter of the engine."""
        return sum(getattr(m, "value", 0) for m in self.llm.get_metrics() if m.name == name)

    def forget(self) -> None:
        """Empties the prefix cache."""
        assert self.llm.reset_prefix_cache()


# Near ties seen and tokens compared, in this process.
TIES: list[str] = []
COMPARED = [0]


def same(model: tiny.Tiny, name: str | None, prompt: list[int], got: list[int]) -> None:
    """Asserts PEFT's tokens, up to one whose best two logits are a near tie."""
    rows = tiny.all_logits(model, name, prompt, got)[len(prompt) - 1 : -1]
    want = rows.argmax(-1).tolist()  # after the same tokens before it, so the first one decides
    COMPARED[0] += len(got)
    if got == want:
        return
    where = next(i for i, (g, w) in enumerate(zip(got, want)) if g != w)
    best = rows[where].topk(2).values
    gap = float(best[0] - best[1])
    text = f"{model.family} {name}, prompt of {len(prompt)}: token {where} of {got}, PEFT {want}"
    assert gap < tiny.CLOSE, f"{text}; the best two logits are {gap:.2g} apart"
    TIES.append(text)
    assert len(TIES) <= max(1, COMPARED[0] // 100), f"too many near ties: {TIES}"


@contextmanager
def offline(
    model: tiny.Tiny, env: dict[str, str] | None = None, **options: Any
) -> Iterator[Offline]:
    """An engine whose scheduler and worker run in this process."""
    with environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        from vllm import LLM
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm = LLM(model=str(model.folder), **(OPTIONS | options))
        try:
            yield Offline(model, llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


def start_of(prompt: list[int], tokens: Sequence[int] = tiny.INVOCATION) -> int:
    """Where the last invocation begins."""
    return max(i for i in range(len(prompt)) if prompt[i : i + len(tokens)] == list(tokens))


def full(tokens: int, block: int = BLOCK) -> int:
    """How many of the first `tokens` tokens lie in full blocks."""
    return tokens // block * block
