"""Rows without an invocation: they train nothing, or run the base model, which is said once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Looked = tuple[str, Sequence[int], bool]  # the adapter, its invocation, whether it is trained


class LonelyRows:
    """Warns once for each adapter, without waiting for the device."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.unread: tuple[Looked, Tensor, Any] | None = None

    def look(
        self, name: str, tokens: Sequence[int], lonely: Tensor | Sequence[bool], training: bool
    ) -> None:
        """Take note of `lonely`, `[B]`: the rows of whole sequences without `tokens`."""
        what: Looked = (name, tokens, training)
        if name in self.warned:
            return
        if not isinstance(lonely, Tensor):
            rows = list(lonely)
        elif lonely.device.type == "cpu":
            rows = lonely.tolist()
        else:  # looked at in the next forward, when the copy has long arrived
            before, self.unread = self.unread, None
            event = torch.cuda.Event() if lonely.device.type == "cuda" else None
            self.unread = (what, lonely.to("cpu", non_blocking=event is not None), event)
            if event is not None:
                event.record()
            if before is None or (before[2] is not None and not before[2].query()):
                return
            what, rows = before[0], before[1].tolist()
        self._say(*what, [i for i, flag in enumerate(rows) if flag])

    def _say(self, name: str, tokens: Sequence[int], training: bool, missing: list[int]) -> None:
        if not missing:
            return
        self.warned.add(name)
        rows = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        if training:
            warnings.warn(
                f"adapter {name!r}: training row {rows} of this batch has no invocation, so it "
                "trains nothing; was it truncated away? (warned once)",
                stacklevel=2,
            )
            return
        warnings.warn(
            f"adapter {name!r}: row {rows} of this batch does not contain the adapter's "
            f"invocation, the token ids {list(tokens)}, so it runs the base model. The same text "
            "can give other tokens beside other text (a space or a letter before it joins it): "
            "compare the token ids, and put the invocation in as token ids. For the base model "
            "on purpose, use disable_adapter() or adapter_scope(model, None). (warned once)",
            stacklevel=2,
        )
