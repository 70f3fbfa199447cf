"""Gives an answer piece by piece, while another thread generates it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


def stream_answer(
    generate: Callable[..., Any],
    tokenizer: Any,
    stopping_criteria: Sequence[Any] | None,
    device: str,
) -> Iterator[str]:
    """The text that `generate` makes, in pieces. Closing the iterator stops it and keeps nothing.

    Args:
        generate: takes the options that make it a stream, and a function that says whether its
            answer is still wanted.
        stopping_criteria: those of the caller.
        device: the model's type of device. Autocast of this thread for that type holds in the
            other thread, too.
    """
    autocast = torch.autocast(
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
        torch.is_autocast_cache_enabled(),
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled, over = threading.Event(), threading.Event()
    extra = {
        "stopping_criteria": StoppingCriteriaList([*(stopping_criteria or ()), _Stop(cancelled)]),
        "streamer": streamer,
    }
    failure: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def wanted() -> bool:
        over.wait()  # the iterator may be closed before the whole answer was read
        return not cancelled.is_set()

    def work() -> None:
        try:
            with autocast:
                generate(extra, wanted)
        except BaseException as error:
            failure.put(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, name="alora-stream", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    except BaseException:
        cancelled.set()
        raise
    finally:
        over.set()
        thread.join()
    if not failure.empty():
        raise failure.get()


class _Stop(StoppingCriteria):
    """Stops a generation when another thread sets an event."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
