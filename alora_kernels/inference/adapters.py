"""The adapters that a session can invoke."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..invocation import invocation_of


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
            from ..peft import accelerate  # a plain model needs no peft

            accelerate(model)

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
        return invocation_of(config) or None

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
        """Run the adapters `names`, in this thread or task, while the block lasts.

        Args:
            names: one adapter for all rows, or one for each row; None is the base model.
            starts: for each row, the position in the cache from which on its adapter is active.
        """
        if not self.is_peft:
            return nullcontext()
        from ..peft import adapter_scope

        return adapter_scope(self.model, names, starts=starts)
