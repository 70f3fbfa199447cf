"""Training rows without an invocation: they train nothing, which is said once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


class LonelyRows:
    """Warns once for each adapter, without waiting for the device."""

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.unread: tuple[str, Tensor, Any] | None = None

    def look(self, name: str, lonely: Tensor) -> None:
        """Take note of `lonely`, bool `[B]`: the rows of a training batch without `name`."""
        if name in self.warned:
            return
        if lonely.device.type == "cpu":
            rows = lonely.tolist()
        else:  # looked at in the next forward, when the copy has long arrived
            before, self.unread = self.unread, None
            event = torch.cuda.Event() if lonely.device.type == "cuda" else None
            self.unread = (name, lonely.to("cpu", non_blocking=event is not None), event)
            if event is not None:
                event.record()
            if before is None or (before[2] is not None and not before[2].query()):
                return
            name, rows = before[0], before[1].tolist()
        missing = [i for i, flag in enumerate(rows) if flag]
        if missing:
            self.warned.add(name)
            warnings.warn(
                f"adapter {name!r}: training row {', '.join(map(str, missing))} of this batch has "
                "no invocation, so it trains nothing; was it truncated away? (warned once)",
                stacklevel=2,
            )
