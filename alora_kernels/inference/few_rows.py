"""The output layer of a few rows on a CPU.

It is a model's widest product, and PyTorch mostly forms x Wᵀ of a few float32 rows slower than
(W xᵀ)ᵀ, the same sums. Measured on an AMD EPYC with MKL, K 512 to 4096, N 32,000 to 262,144, times
slower: two to five rows 1.1 to 6.2 (once 0.9); six to eight rows 1.3 to 2.8 with two threads, 0.5
to 2.9 with one.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 8

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("alora_few_rows", default=False)
_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@contextmanager
def few_rows(model: Any) -> Iterator[None]:
    """Within the block, in this thread, `model`'s output layer takes the faster order for few rows.

    The layer has a forward of its own while anybody is in such a block; to other threads it is
    `nn.Linear`'s. A layer that is not plain, or has such a forward already, is left alone.
    """
    head = model.get_output_embeddings()
    with _lock:
        served = head in _users or (type(head) is nn.Linear and "forward" not in head.__dict__)
        if served:
            _users[head] = _users.get(head, 0) + 1
            head.__dict__["forward"] = functools.partial(_forward, head)
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)
        if served:
            with _lock:
                _users[head] -= 1
                if _users[head] == 0:
                    del _users[head], head.__dict__["forward"]


def _forward(head: nn.Linear, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    few = _inside.get() and 1 < rows <= FEW and x.device.type == "cpu"
    if few and x.dtype == head.weight.dtype == torch.float32 and not torch.is_grad_enabled():
        return turned_linear(x, head.weight, head.bias)
    return F.linear(x, head.weight, head.bias)


def turned_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(W xᵀ)ᵀ + b: x `[..., K]`, weight `[N, K]`, the result `[..., N]`, contiguous."""
    y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    if bias is not None:
        y = y + bias
    return y.contiguous().view(*x.shape[:-1], weight.shape[0])
