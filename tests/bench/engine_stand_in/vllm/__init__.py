"""Stands for vLLM in a process that has none: it answers at once, and its cache counts blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__version__ = "0.0"


class SamplingParams:
    """How many tokens to generate."""

    def __init__(self, *, max_tokens: int, **others: Any) -> None:
        self.max_tokens = max_tokens


class LLM:
    """What the benchmark asks of an engine. An aLoRA reads the blocks of the base model."""

    def __init__(self, model: str, *, block_size: int, **others: Any) -> None:
        self.block = block_size
        self.known: set[tuple[int, ...]] = set()  # prefixes of whole blocks
        self.waiting: list[Any] = []
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=block_size),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        )

    def add_lora(self, request: Any) -> None:
        assert request.path

    def collective_rpc(self, function: Any) -> list[Any]:
        return [function(self)]

    def reset_prefix_cache(self) -> bool:
        self.known.clear()
        return True

    def add_request(self, key: str, prompt: Any, parameters: Any, lora_request: Any) -> None:
        ids, count = prompt["prompt_token_ids"], parameters.max_tokens
        new = [(sum(ids) + i) % 100 for i in range(count)]
        blocks = [tuple(ids[:end]) for end in range(self.block, len(ids) + 1, self.block)]
        plain = lora_request is not None and lora_request.name.startswith("p")
        found = [prefix for prefix in blocks if prefix in self.known and not plain]
        if lora_request is None:
            whole = [*ids, *new[:-1]]
            ends = range(self.block, len(whole) + 1, self.block)
            self.known.update(tuple(whole[:end]) for end in ends)
        self.waiting.append(
            SimpleNamespace(
                request_id=key,
                finished=True,
                num_cached_tokens=max(map(len, found), default=0),
                outputs=[SimpleNamespace(token_ids=new)],
            )
        )

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        done, self.waiting = self.waiting, []
        return done
