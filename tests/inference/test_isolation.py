"""A call leaves the session as it was: when it ends, is cancelled, fails, or runs beside others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from alora_kernels.inference import Session
from alora_kernels.inference.views import tensors_of

from .tiny import GREEDY, INVOCATIONS, WINDOW, check, context, session_of


def test_a_stream_gives_the_same_text_and_can_be_cancelled(seed: int) -> None:
    session, _ = session_of("gemma3", seed)
    session.extend(context(2 * WINDOW, seed))
    before = [t.clone() for t in tensors_of(session.cache)]
    whole = session.generate("red", **GREEDY)
    assert "".join(session.stream("red", **GREEDY)) == whole.text
    stream = session.stream("red", max_new_tokens=200, min_new_tokens=200, do_sample=False)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "alora-stream"]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(session.cache)))
    assert session.generate("red", **GREEDY) == whole
    with pytest.raises(ValueError, match="unknown adapter 'grey'"):
        list(session.stream("grey"))


def test_a_stream_keeps_its_answer_only_when_it_ends(seed: int) -> None:
    session, reference = session_of("gemma3", seed)
    ids = context(2 * WINDOW, seed)
    session.extend(ids)
    stream = session.stream("red", keep=True, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    next(stream)
    stream.close()
    assert list(session.token_ids) == ids
    finished, run = threading.Event(), session._runner.answer

    def seen(*args: Any) -> Any:
        out = run(*args)
        finished.set()
        return out

    session._runner.answer = seen  # type: ignore[method-assign]
    stream = session.stream("red", keep=True, **GREEDY)
    next(stream)
    finished.wait()  # the answer is there, but was not read to its end
    stream.close()
    assert list(session.token_ids) == ids
    wanted = session.generate("red", **GREEDY)
    assert "".join(session.stream("red", keep=True, **GREEDY)) == wanted.text
    assert list(session.token_ids) == [*ids, *wanted.invocation, *wanted.token_ids]
    later = session.generate("blue", **GREEDY)
    assert check(reference, list(session.token_ids), later) == 0


def test_an_exception_inside_the_model_changes_nothing(seed: int) -> None:
    session, _ = session_of("gemma3", seed)
    session.extend(context(2 * WINDOW, seed))
    before = [t.clone() for t in tensors_of(session.cache)]
    wanted = session.generate("red", **GREEDY)
    many = session.ask(["red", "green"], **GREEDY)

    forwards = 0

    def fail(*args: Any) -> None:
        nonlocal forwards
        forwards -= 1
        if not forwards:
            raise FloatingPointError("halfway")

    handle = session.base.model.layers[1].mlp.register_forward_hook(fail)
    long: dict[str, Any] = {**GREEDY, "min_new_tokens": 10}
    for call, most in (
        (lambda: session.generate("red", keep=True, **long), 4),
        (lambda: session.ask(["red", None], **long), 4),
        (lambda: session.extend(context(5, seed)), 1),
        (lambda: list(session.stream("blue", **long)), 4),
    ):
        for at in sorted({1, most}):  # in the first forward, and among generated tokens
            forwards = at
            with pytest.raises(FloatingPointError):
                call()
    handle.remove()
    assert session.base.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(session.cache)))
    assert len(session) == 2 * WINDOW
    assert session.generate("red", **GREEDY) == wanted
    assert session.ask(["red", "green"], **GREEDY) == many


def test_threads_equal_serial_runs(seed: int) -> None:
    """Four threads, different adapters and the base, one model; two sessions, also in batches."""
    session, _ = session_of("gemma3", seed)
    session.extend(context(2 * WINDOW, seed))
    other = Session(session.model, session.tokenizer).extend(context(9, seed + 1))
    jobs: list[Any] = [
        lambda s=s, n=n: s.generate(n, **GREEDY)
        for s in (session, other)
        for n in (None, *INVOCATIONS)
    ]
    jobs += [lambda s=s: s.ask(["blue", None, "red"], **GREEDY) for s in (session, other)]
    wanted = [job() for job in jobs]
    got: list[list[Any]] = [[] for _ in range(4)]

    def work(i: int) -> None:
        # Every thread starts elsewhere, so that different adapters meet.
        for k in range(len(jobs)):
            index = (k + 3 * i) % len(jobs)
            got[i].append((index, jobs[index]()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in got:
        assert len(results) == len(jobs)
        for index, answer in results:
            assert answer == wanted[index]
    assert session.base.config._attn_implementation == "sdpa"


def test_an_answer_is_not_kept_behind_another_context(seed: int) -> None:
    """Whether what came meanwhile reached the cache, or is held back as part of an invocation."""
    *begun, last = INVOCATIONS["blue"]
    for more in ([last], context(5, seed)[1:]):
        session, _ = session_of("llama", seed)
        session.extend([*context(9, seed), *begun])
        cache = session.cache

        def extend(ids: Any, scores: Any, session: Session = session, more: Any = more) -> Any:
            if len(session) == 9 + len(begun):
                session.extend(more)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        with pytest.raises(RuntimeError, match="the context changed while an answer"):
            session.generate("red", keep=True, stopping_criteria=[extend], **GREEDY)
        assert (session.cache is cache) == (more == [last])
        assert list(session.token_ids) == [*context(9, seed), *begun, *more]
