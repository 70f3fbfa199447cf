"""The adapters that a session can invoke, and what the model calls its cache."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

Names = "str | None | list[str | None]"


class AdapterTable:
    """The Activated LoRA adapters of one model: names, invocations, and how to choose one.

    Args:
        model: a PeftModel, which is accelerated if it is not yet, or a plain transformers model,
            which has no adapter.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_peft = hasattr(model, "peft_config")
        self.base = model.get_base_model() if self.is_peft else model
        if not hasattr(self.base, "generate"):
            raise TypeError(
                f"Session: {type(self.base).__name__} cannot generate; give a causal language "
                "model, or a PeftModel around one"
            )
        if self.is_peft:
            from ..peft import accelerate

            accelerate(model)
        parameters = inspect.signature(self.base.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self.limits_logits = "logits_to_keep" in parameters
        self.takes_positions = "position_ids" in parameters

    def own_settings(self) -> Any:
        """The model's generation_config; a PeftModel's goes to its base, as PEFT does it."""
        own = getattr(self.model, "generation_config", None)
        if self.is_peft and own is not None and own is not self.base.generation_config:
            self.base.generation_config = own
        return own

    def names(self) -> list[str]:
        """Every adapter that can be invoked."""
        if not self.is_peft:
            return []
        return [name for name in self.model.peft_config if self.invocation(name) is not None]

    def invocation(self, name: str) -> list[int] | None:
        """The invocation's token ids; None for an adapter that is not an Activated LoRA.

        Raises:
            ValueError: no adapter of that name.
        """
        config = self.model.peft_config.get(name) if self.is_peft else None
        if config is None:
            known = ", ".join(map(repr, self.names())) or "none"
            raise ValueError(f"unknown adapter {name!r}; this model has: {known}")
        tokens = getattr(config, "alora_invocation_tokens", None)
        return list(tokens) if tokens else None

    def tokens(self, name: str) -> list[int]:
        """The invocation's token ids.

        Raises:
            ValueError: the adapter is unknown or a plain LoRA, whose keys and values differ from
                the base model's from the first token on, so that it cannot read a base cache.
        """
        tokens = self.invocation(name)
        if tokens is None:
            raise ValueError(
                f"adapter {name!r} is not an Activated LoRA (no alora_invocation_tokens): it would "
                "change the context's keys and values, so it cannot run on the base model's cache"
            )
        return tokens

    def longest_tail(self, token_ids: list[int]) -> int:
        """Length of the longest invocation that `token_ids` ends with, 0 if none."""
        found = 0
        for name in self.names():
            tokens = self.tokens(name)
            if len(tokens) > found and token_ids[-len(tokens) :] == tokens:
                found = len(tokens)
        return found

    def scope(
        self, names: str | list[str | None] | None, starts: list[int | None]
    ) -> AbstractContextManager[Any]:
        """Run `names` (one for all rows, or one a row; None: the base) from `starts` on.

        `starts` are positions in the cache, one a row. The choice belongs to this thread or task.
        """
        if not self.is_peft:
            from contextlib import nullcontext

            return nullcontext()
        from ..peft import adapter_scope

        return adapter_scope(self.model, names, starts=starts)
