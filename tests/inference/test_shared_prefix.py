"""Attention over a prefix that is stored once."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from alora_kernels.inference import Session, shared_prefix
from alora_kernels.inference.shared_prefix import shared_prefix_attention

from .tiny import INVOCATIONS, context, peft_model, tokenizer


def reference(
    q: torch.Tensor,
    pk: torch.Tensor,
    pv: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    pm: torch.Tensor,
    sm: torch.Tensor,
) -> torch.Tensor:
    """Row by row, head by head, over the whole of prefix and suffix."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = torch.cat([pk[0, h // group], k[b, h // group]])
            values = torch.cat([pv[0, h // group], v[b, h // group]])
            scores = q[b, h] @ keys.T * scale
            scores = scores.masked_fill(~torch.cat([pm[b], sm[b]], -1), -torch.inf)
            out[b, h] = scores.softmax(-1) @ values
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "queries", "prefix", "suffix"),
    [(1, 1, 1, 1, 1, 1), (3, 2, 3, 1, 17, 5), (2, 1, 4, 5, 9, 7), (5, 3, 1, 2, 33, 2)],
)
def test_attention_equals_the_reference(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    group: int,
    queries: int,
    prefix: int,
    suffix: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    # More dimensions and values that are not those of keys, strided and offset.
    q = draw(batch, queries, heads * group, 8).transpose(1, 2)
    pk, pv = draw(1, heads, prefix + 2, 8)[:, :, 2:], draw(1, heads, prefix, 6)
    k, v = draw(batch, heads, suffix, 8), draw(batch, heads, suffix, 6)
    pm = torch.rand(batch, queries, prefix, generator=g) < 0.7
    sm = torch.rand(batch, queries, suffix, generator=g) < 0.7
    sm[..., -1] = True
    exact = reference(*(t.double() for t in (q, pk, pv, k, v)), 0.3, pm, sm)
    plain = reference(q, pk, pv, k, v, 0.3, pm, sm)
    # In float64 the reference is its own oracle: a few roundings are allowed.
    allowed = 2 * (plain.double() - exact).abs().max().item() + 8 * torch.finfo(dtype).eps
    for limit in (1 << 24, 3 * prefix):
        monkeypatch.setattr(shared_prefix, "MAX_SCORES", limit)
        got = shared_prefix_attention(q, pk, pv, k, v, 0.3, pm, sm)
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max().item() <= allowed
    free = shared_prefix_attention(q, pk, pv, k, v, 0.3)
    every = reference(
        *(t.double() for t in (q, pk, pv, k, v)), 0.3, torch.ones_like(pm), torch.ones_like(sm)
    )
    assert (free.double() - every).abs().max().item() <= 2 * allowed


def test_a_side_that_sees_nothing_has_no_weight() -> None:
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 2, 1, 4, generator=g) for _ in range(3))
    pk, pv = (torch.full((1, 2, 3, 4), 1e4) for _ in range(2))
    no, yes = torch.zeros(2, 1, 3, dtype=torch.bool), torch.ones(2, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(shared_prefix_attention(q, pk, pv, k, v, 1.0, no, yes), v)
    nothing = shared_prefix_attention(q, pk, pv, k, v, 1.0, no, ~yes)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def counted(session: Session) -> tuple[list[int], Any]:
    """The batch size of every forward."""
    batches: list[int] = []
    handle = session.base.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"].shape[0]),
        with_kwargs=True,
    )
    return batches, handle


def test_ask_is_one_batch() -> None:
    session = Session(peft_model("gemma3", 4), tokenizer()).extend(context(40, 4))
    session.ask(["green", "red"], max_new_tokens=1)  # the first is also compared with rows alone
    batches, handle = counted(session)
    session.ask([None, *INVOCATIONS, "red"], max_new_tokens=4, min_new_tokens=4)
    handle.remove()
    assert batches == [5, 5, 5, 5]


def test_a_model_that_cannot_share_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    session = Session(peft_model("llama", 4), tokenizer()).extend(context(40, 4))
    wanted = session.ask(["red", None, "blue"], max_new_tokens=5, do_sample=False)
    session.base.config.attn_logit_softcapping = 30.0  # Llama ignores it
    batches, handle = counted(session)
    with caplog.at_level(logging.WARNING, "alora_kernels"):
        assert session.ask(["red", None, "blue"], max_new_tokens=5, do_sample=False) == wanted
        session.ask(["red"], max_new_tokens=1)
    handle.remove()
    assert set(batches) == {1}
    said = [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
    assert len(said) == 1 and "attn_logit_softcapping" in said[0]


class _Peak(TorchDispatchMode):
    """The most bytes of storages that were made inside and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata
            for t in tree_iter((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in inputs:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return out


def test_five_adapters_hold_one_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most what one adapter needs, and five suffixes, and 5 %."""
    # Keys and values outweigh the token ids here, as in a real model: 8 KiB a token.
    model = peft_model(
        "llama",
        4,
        num_hidden_layers=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
    )
    monkeypatch.setattr(shared_prefix, "MAX_SCORES", 1 << 14)
    new, names = 6, ["red", "green", "blue", "red", "green"]
    session = Session(model, tokenizer()).extend(context(1500, 4))
    prefix = sum(layer.keys.nbytes + layer.values.nbytes for layer in session.cache.layers)

    def peak(ask: list[str | None]) -> int:
        with _Peak() as mode:
            session.ask(ask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return prefix + mode.peak

    one, five = peak(["red"]), peak(list(names))
    tokens = 1 + max(map(len, INVOCATIONS.values())) + new
    suffix = tokens * prefix // session.cached_length
    print(f"prefix {prefix}, one adapter {one}, five {five}, a suffix {suffix} bytes")
    assert five <= 1.05 * (one + 5 * suffix)
    # A copy of the prefix for each row, as `batch_repeat_interleave` makes them, breaks the bound.
    with _Peak() as copied:
        session.cache.layers[0].keys.repeat_interleave(5, 0)
    assert prefix + 2 * len(session.cache.layers) * copied.peak > 1.05 * (one + 5 * suffix)
