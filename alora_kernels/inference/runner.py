"""Runs a model on a cache: reads tokens into it, and generates behind them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .adapters import AdapterTable
from .options import Settings
from .turns import ContextOverflow, Turn
from .views import CacheError, check_states, is_recurrent, view_of


class Runner:
    """One model with its adapters, and what its forward takes. It keeps nothing between calls.

    Attributes:
        adapters: the model's adapters.
        base: the model without them.
        cache_argument: what the forward calls its cache.
        takes_positions: the forward takes `position_ids`.
    """

    def __init__(self, adapters: AdapterTable) -> None:
        self.adapters = adapters
        self.base = adapters.base
        parameters = inspect.signature(self.base.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self.takes_positions = "position_ids" in parameters
        self._limits_logits = "logits_to_keep" in parameters

    def own_settings(self) -> Any:
        """The model's generation_config. A PeftModel's own is given to its base, as PEFT does."""
        own = getattr(self.adapters.model, "generation_config", None)
        if self.adapters.is_peft and own is not None and own is not self.base.generation_config:
            self.base.generation_config = own
        return own

    def check_length(self, length: int, where: str) -> None:
        """Refuse more tokens than the model has positions.

        Raises:
            ContextOverflow: says both numbers.
        """
        config = self.base.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ContextOverflow(
                f"{where}: {length} tokens, but the model has {limit} positions; "
                "shorten the context, the prompt or max_new_tokens"
            )

    def held(self, ids: list[int]) -> int:
        """How many tokens at the end of a context are held back from its cache."""
        return max(self.adapters.longest_tail(ids), 1)

    def prefill(self, ids: list[int], cache: Cache, step: int) -> Cache:
        """A cache of all of `ids` except the tokens held back. `cache` is continued, not written.

        Args:
            step: tokens of one forward.

        Raises:
            CacheError: the model does not keep in the cache what it has read.
        """
        done, end = cache.get_seq_length(), len(ids) - self.held(ids)
        if end <= done:
            return cache
        view = view_of(cache)
        if is_recurrent(view):
            step = 1 if done else end
        with torch.no_grad(), self.adapters.scope(None, [None]):
            self._read(ids[:end], view, step)
        if view.get_seq_length() != end:
            raise CacheError(
                f"Session: {type(self.base).__name__} does not keep what it has read in a "
                "transformers Cache, so calls cannot share it"
            )
        check_states(view, self.base)
        return view

    def answer(self, turn: Turn, view: Cache, settings: Settings, rows: int = 1) -> Any:
        """What transformers' `generate` returns for one turn.

        Args:
            view: of the turn's cache, with `rows` rows. The tokens of the turn are written to it.
        """
        ids = torch.tensor([turn.ids])
        # transformers up to 5.20 reads a prompt in chunks from its beginning, whatever is cached.
        step = settings.get("prefill_chunk_size")
        if is_recurrent(view):
            step = 1
        with torch.no_grad(), self.adapters.scope(turn.adapter, [turn.start] * rows):
            if step:
                last = (len(turn.suffix) - 1) // step * step  # `generate` reads the rest
                self._read(turn.ids[: len(turn.cached) + last], view, step, rows)
            return self.generate(ids, torch.ones_like(ids), view, settings.keywords())

    def generate(self, ids: Tensor, mask: Tensor, cache: Cache, options: dict[str, Any]) -> Any:
        """transformers' `generate` behind a cache. The caller chooses the adapters.

        Args:
            ids, mask: int64 `[B, T]`, the tokens in the cache among them.
            options: those of transformers.
        """
        device = self.base.device
        return self.base.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            **{self.cache_argument: cache},
            **options,
        )

    def _read(self, ids: Sequence[int], view: Cache, step: int, rows: int = 1) -> None:
        """Run the tokens of `ids` that `view` does not hold yet, `step` of them at a time."""
        device = self.base.device
        extra: dict[str, Any] = {"logits_to_keep": 1} if self._limits_logits else {}
        extra[self.cache_argument] = view
        for begin in range(view.get_seq_length(), len(ids), step):
            chunk = torch.tensor([ids[begin : begin + step]] * rows, device=device)
            if self.takes_positions:
                # Some models count from 0 again when they are not told (Bamba, transformers 5.24).
                positions = torch.arange(begin, begin + chunk.shape[1], device=device)
                extra["position_ids"] = positions.expand(rows, -1)
            self.base(input_ids=chunk, use_cache=True, **extra)
