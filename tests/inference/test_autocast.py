"""A session under torch.autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .tiny import (
    GREEDY,
    INVOCATIONS,
    WINDOW,
    check_greedy,
    context,
    scratch_logits,
    session_of,
)


def bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def check(reference: Any, ids: list[int], answer: Any, adapter: str | None) -> None:
    """Greedy tokens of `adapter`, by logits that are at most twice as far from float32 as those
    of one forward under autocast by stock PEFT."""
    before, generated = [*ids, *answer.invocation], list(answer.token_ids)
    row = (reference, adapter, [*before, *generated], answer.invocation_start)
    exact = scratch_logits(*row)
    with bf16():
        error = float((scratch_logits(*row) - exact).abs().max())
    # Two logits, each at most 2 · error away.
    check_greedy(reference, adapter, before, answer.invocation_start, generated, gap=4 * error)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("whole", [True, False])
def test_answers(kind: str, whole: bool, seed: int) -> None:
    """Alone, streamed by another thread, and all in one batch; over a cache of either dtype.

    Drawn anew until some answer of an adapter could not be the base model's.
    """
    for draw in range(seed, seed + 10):
        session, reference = session_of(kind, draw)
        ids = context(2 * WINDOW, draw)
        dtypes = set()
        layer = session.base.model.layers[0].self_attn.q_proj
        with bf16() if whole else torch.no_grad():
            session.extend(ids)
        layer.register_forward_hook(lambda _, args, out, dtypes=dtypes: dtypes.add(out.dtype))
        with bf16():
            alone = [session.generate(name, **GREEDY) for name in (None, *INVOCATIONS)]
            streamed = "".join(session.stream("red", **GREEDY))
            together = session.ask([None, *INVOCATIONS], **GREEDY)
        assert dtypes == {torch.bfloat16}
        assert streamed == alone[1].text
        assert not torch.is_autocast_enabled("cpu")
        for answer in [*alone, *together]:
            check(reference, ids, answer, answer.adapter)
        try:
            for answer in [*alone[1:], *together[1:]]:
                check(reference, ids, answer, None)
        except AssertionError:
            return
    pytest.fail("every answer of an adapter could be the base model's")
