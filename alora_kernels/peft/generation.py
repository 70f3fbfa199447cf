"""One call of `generate`: where its adapters begin, and which forwards belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import caches

Starts = Sequence[int | None]


class Generation:
    """One call of `generate`.

    Attributes:
        prompt: the token ids `[B, P]` of the prompt, if they are known.
        custom: it runs the user's own decoding method (`custom_generate`), which may move rows.
        starts: by adapter, the absolute start in each row of the prompt (None = base).
        every: the starts of all adapters, if `adapter_scope` gave them.
        fed: the tensor (ids or embeddings) that the next own forward will get.
        width: the length of the rows whose last tokens are `fed`.
        before: the number of tokens in its cache before the first token of the prompt.
        position: the number of tokens that its own forwards have read, those in the cache included.
        awaited: the inputs of its next own forward are prepared, but that forward has not run yet.
        begun: the tokens that were read include all starts.
        seen: an own forward has run.
        cache: the cache that its last own forward wrote.
    """

    def __init__(self, prompt: Tensor | None, custom: bool) -> None:
        self.prompt, self.custom = prompt, custom
        self.starts: dict[str, Starts] = {}
        self.every: Starts | None = None
        self.fed: Any = None
        self.width = 0
        self.before = self.position = 0
        self.awaited = self.begun = self.seen = False
        self.cache: Any = None

    def starts_of(self, name: str) -> Starts | None:
        return self.starts.get(name) if self.every is None else self.every

    def expect(self, rows: Any, inputs: dict[str, Any]) -> None:
        """The next own forward gets `inputs`, the last tokens of `rows`."""
        fed = inputs.get("input_ids")
        self.fed = inputs.get("inputs_embeds") if fed is None else fed
        self.width = rows.shape[1] if isinstance(rows, Tensor) else 0
        self.awaited = self.fed is not None

    def owns(self, tokens: Tensor, ids: Tensor | None, cache: Any) -> bool:
        """Whether a forward of `tokens` is this generation's own."""
        if torch.compiler.is_compiling():
            return self.awaited  # only `generate` compiles what it prepared
        length = caches.length_of(cache) if self.custom or not self.seen else None
        fresh = length is not None and not int(length)
        if self.custom and not fresh:
            return False  # rows may have moved; the cache's record follows them
        own = self._is_fed(tokens) or (fresh and self._is_prompt(ids))
        self.seen = self.seen or own
        return own

    def _is_fed(self, tokens: Tensor) -> bool:
        if not self.awaited:
            return False
        fed: Tensor = self.fed
        if tokens is fed:
            return True
        if tokens.shape != fed.shape or tokens.dtype != fed.dtype:
            return False
        return torch.equal(tokens.to(fed.device), fed)  # a copy, perhaps on another device

    def _is_prompt(self, ids: Tensor | None) -> bool:
        if ids is None or self.prompt is None or ids.shape[0] % max(len(self.prompt), 1):
            return False
        own = self.prompt.repeat_interleave(ids.shape[0] // max(len(self.prompt), 1), 0)
        begin = ids[:, : own.shape[1]]
        return begin.shape == own.shape and torch.equal(begin.to(own.device), own)

    def past(self, seq_len: int, length: Any, cache: Any) -> Any:
        """The number of tokens before an own forward of `seq_len` tokens.

        `length` is the length that the cache reports. It can be None: recurrent layers do not
        report one, and some models keep their state in their own modules.
        """
        if torch.compiler.is_compiling():
            if length is not None or not self.begun:
                return length
            return self._last_start()  # all rows are decided from here on
        if length is not None and (cache is not None or self.width <= seq_len):
            return length
        return self.before + self.width - seq_len if self.width > seq_len else self.position

    def wrote(self, cache: Any, position: int) -> None:
        """An own forward has read all tokens before `position`, and `cache` holds them."""
        self.cache, self.position = cache, position
        self.begun = position >= self._last_start()

    def _last_start(self) -> int:
        rows = [*self.starts.values(), *([] if self.every is None else [self.every])]
        return max((s for starts in rows for s in starts if s is not None), default=0)
