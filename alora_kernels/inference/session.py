"""One base cache, many adapters: `Session`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .adapters import AdapterTable
from .batch import ask_together
from .calls import Answer, Call, ContextOverflow
from .chat import Message
from .context import Context, kind_of
from .endings import check_stop_strings, until_end
from .options import Settings
from .planning import plan
from .streaming import stream_answer
from .text import Encoder
from .views import CacheError, check_cache, check_model, check_states, is_recurrent, view_of


class Session:
    """A context that the base model reads once and that every adapter answers on.

    session = Session(model, tokenizer)
    session.extend([{"role": "user", "content": document}])
    answer = session.generate(adapter="summary", max_new_tokens=64)

    The last token of the context, or the last tokens when they are an adapter's invocation, are
    held back from the cache: whoever generates runs them. The cache is never written by a call:
    each gets a view of it.

    Args:
        model: a PeftModel with Activated LoRA adapters (accelerated here if it is not yet), or a
            plain transformers model. It stays in the mode (train or eval) that it is in: eval.
        tokenizer: the model's.
        prefill_chunk: tokens of one forward while the context is read; bounds its memory. A model
            with recurrent layers reads its first context whole, and what follows token by token.

    Raises:
        TypeError: the model cannot generate, or keeps its state in a cache that calls cannot
            share (`CacheError` says which).
    """

    def __init__(self, model: Any, tokenizer: Any, *, prefill_chunk: int = 2048) -> None:
        if prefill_chunk < 1:
            raise ValueError(f"Session: prefill_chunk must be at least 1, got {prefill_chunk}")
        self.adapters = AdapterTable(model)
        self.model, self.tokenizer = model, tokenizer
        self.base = self.adapters.base
        if self.base.training:
            raise ValueError("Session: the model is in training mode; call model.eval() first")
        self.prefill_chunk = prefill_chunk
        self._encoder = Encoder(tokenizer)
        self._lock = threading.RLock()
        self._context = Context()
        check_model(self.base)
        self._cache: Cache = DynamicCache(config=self.base.config)
        check_cache(self._cache)

    # ------------------------------------------------------------------ the context

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The context."""
        return self._context.ids

    @property
    def cached_length(self) -> int:
        """How many tokens of the context are in the base cache."""
        return self._cache.get_seq_length()

    def __len__(self) -> int:
        return len(self._context.ids)

    def extend(
        self,
        content: str | Sequence[Message] | Sequence[int],
        *,
        add_generation_prompt: bool = False,
    ) -> Session:
        """Append text, chat messages or token ids, and let the base model read them.

        Text goes on where the text before it ended: both get the tokens of the whole. BOS comes
        only at the start. Messages are rendered behind the session's own by the tokenizer's chat
        template. Tokens that came as ids, or were generated, stay as they are.

        Raises:
            ValueError: nothing to append; messages without a chat template, or that do not go on
                where the chat in the context ends; text that would change tokens that have been
                read.
            ContextOverflow: the context would be longer than the model's positions.
        """
        with self._lock:
            context = self._extended(content, add_generation_prompt)
            if context == self._context:
                raise ValueError("Session.extend: nothing to append")
            self._check_length(len(context.ids), "Session.extend")
            cache = self._prefill(list(context.ids), self._cache)
            self._context, self._cache = context, cache
        return self

    def _extended(self, content: Any, add_generation_prompt: bool) -> Context:
        context, encoder = self._context, self._encoder
        cached = self.cached_length
        kind = "text"
        if not isinstance(content, str):
            content = content.tolist() if hasattr(content, "tolist") else list(content)
            if not content:
                return context
            kind = kind_of(content)
        if kind == "messages":
            own = self.adapters.own_settings()
            ends = Settings({}, own, self.tokenizer, "Session.extend").ends
            return context.with_messages(content, add_generation_prompt, cached, encoder, ends)
        if add_generation_prompt:
            raise ValueError(
                "Session.extend: add_generation_prompt belongs to messages; write the prompt into "
                "the text"
            )
        if kind == "text":
            return context.with_text(content, cached, encoder)
        return context.with_ids(encoder.check_ids(content, "Session.extend"), encoder)

    # ------------------------------------------------------------------ one answer

    def generate(
        self,
        adapter: str | None = None,
        prompt: str | Sequence[int] | None = None,
        *,
        keep: bool = False,
        **options: Any,
    ) -> Any:
        """Answer with the base model, or with an adapter from its invocation on.

        Args:
            adapter: a name, or None for the base model. Its invocation is appended as token ids,
                unless the prompt contains it or the context ends with it.
            prompt: text or token ids for this call only, after the context.
            keep: make what was added and generated part of the context, read by the base model:
                later turns see it as if everything had been prefilled from scratch.
            **options: of transformers' `generate`: max_new_tokens, do_sample, temperature, top_p,
                num_beams, stop_strings, stopping_criteria, streamer.

        Returns:
            An `Answer`; with `num_return_sequences` > 1 a list of them.

        Raises:
            ValueError: an unknown adapter, an empty context, an option that the session sets.
            ContextOverflow: context, prompt and answer are longer than the model's positions.
        """
        settings = self._settings(options, "Session.generate")
        return self._generate(adapter, prompt, settings, keep)

    def stream(
        self,
        adapter: str | None = None,
        prompt: str | Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """`generate`, piece by piece. Closing the iterator stops the generation.

        The arguments are those of `generate`; `keep=True` takes effect when the stream ends, and
        not at all when it is closed before.

        Raises:
            ValueError: as `generate`, and for options that make several rows.
        """
        keep = bool(options.pop("keep", False))
        where = "Session.stream"
        self._settings(options, where).check_stream()

        def generate(extra: dict[str, Any], wanted: Callable[[], bool]) -> Any:
            settings = self._settings({**options, **extra}, where)
            return self._generate(adapter, prompt, settings, keep, wanted)

        given = options.get("stopping_criteria")
        return stream_answer(generate, self.tokenizer, given, self.base.device.type)

    # ------------------------------------------------------------------ many answers

    def ask(
        self,
        adapters: Sequence[str | None],
        prompt: str | Sequence[int] | Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Let many adapters answer on the same context in one batch, over one copy of the cache.

        Args:
            adapters: names; None is the base model. A name may come twice.
            prompt: for all, or a list of texts, one for each adapter.
            **options: of `generate`, except those that make several answers of one row.

        Returns:
            One answer for each adapter, in order. A model that cannot share the prefix answers one
            by one, and says so once.
        """
        if not adapters:
            raise ValueError("Session.ask: adapters is empty")
        prompts: Sequence[Any]
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if not prompt or isinstance(prompt, str) or hasattr(prompt[0], "__index__"):
            prompts = [prompt] * len(adapters)
        else:
            prompts = prompt
        if len(prompts) != len(adapters):
            raise ValueError(
                f"Session.ask: {len(adapters)} adapters but {len(prompts)} prompts; give one for "
                "all, or one for each"
            )
        settings = self._settings(options, "Session.ask")
        settings.check_one_adapter()
        with self._lock:  # all rows on the same state of the session
            calls = [self._plan(a, p) for a, p in zip(adapters, prompts)]
        for call in calls:
            self._check_length(settings.length(len(call.ids)), "Session.ask")
        outs = ask_together(self, calls, settings)
        return [self._answer(call, out, settings) for call, out in zip(calls, outs)]

    # ------------------------------------------------------------------ storage

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the context and its cache to a folder (safetensors), whole or not at all."""
        from .storage import save_session

        with self._lock:
            return save_session(self, Path(folder))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any, tokenizer: Any) -> Session:
        """Read what `save` wrote, for the same base model.

        Raises:
            ValueError: the cache is another model's, or the files do not fit together.
        """
        from .storage import load_session

        session = cls(model, tokenizer)
        load_session(session, Path(folder))
        return session

    # ------------------------------------------------------------------ how

    def _plan(self, adapter: str | None, prompt: Any) -> Call:
        with self._lock:
            context, cache = self._context, self._cache
        return plan(context, cache, self._encoder, self.adapters, adapter, prompt)

    def _generate(
        self,
        adapter: str | None,
        prompt: str | Sequence[int] | None,
        settings: Settings,
        keep: bool,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Any:
        """`generate`; an answer to keep is kept if it is still wanted when it is there."""
        call = self._plan(adapter, prompt)
        self._check_length(settings.length(len(call.ids)), settings.where)
        several = settings.number("num_return_sequences") > 1
        if several and keep:
            raise ValueError(f"{settings.where}: keep=True takes one answer, not several")
        view = view_of(call.cache)
        rows = settings.rows
        if rows > 1:
            view.batch_repeat_interleave(rows)
        out = self._run(call, view, settings, rows)
        answers = [self._answer(call, row[len(call.ids) :].tolist(), settings) for row in out]
        if keep and wanted():
            self._keep(call, answers[0], view if adapter is None and rows == 1 else None)
        return answers if several else answers[0]

    def _run(self, call: Call, view: Cache, settings: Settings, rows: int) -> Tensor:
        ids = torch.tensor([call.ids])
        # transformers up to 5.20 reads a prompt in chunks from its beginning, whatever is cached.
        step = settings.get("prefill_chunk_size")
        if is_recurrent(view):
            step = 1
        with torch.no_grad(), self.adapters.scope(call.adapter, [call.start] * rows):
            if step:
                last = (len(call.suffix) - 1) // step * step  # the rest is generate's
                self._read(call.ids[: len(call.cached) + last], view, step, rows)
            return self.base.generate(
                ids.to(self.base.device),
                attention_mask=torch.ones_like(ids).to(self.base.device),
                **{self.adapters.cache_argument: view},
                **settings.keywords(),
            )

    def _prefill(self, ids: list[int], cache: Cache) -> Cache:
        """A cache of all of `ids` but the tail that is held back; `cache` stays as it is."""
        held = max(self.adapters.longest_tail(ids), 1)
        done, end = cache.get_seq_length(), len(ids) - held
        if end <= done:
            return cache
        view = view_of(cache)
        step = self.prefill_chunk
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

    def _read(self, ids: list[int], view: Cache, step: int, rows: int = 1) -> None:
        """Run what `view` does not hold of `ids`, `step` tokens at a time."""
        device = self.base.device
        extra: dict[str, Any] = {"logits_to_keep": 1} if self.adapters.limits_logits else {}
        extra[self.adapters.cache_argument] = view
        for begin in range(view.get_seq_length(), len(ids), step):
            chunk = torch.tensor([ids[begin : begin + step]] * rows, device=device)
            if self.adapters.takes_positions:
                # Some models count from 0 again when they are not told (Bamba, transformers 5.24).
                positions = torch.arange(begin, begin + chunk.shape[1], device=device)
                extra["position_ids"] = positions.expand(rows, -1)
            self.base(input_ids=chunk, use_cache=True, **extra)

    def _keep(self, call: Call, answer: Answer, view: Cache | None) -> None:
        """Append what a call added and generated; the base model reads it, if it has not yet."""
        with self._lock:
            if self._cache is not call.cache:
                raise RuntimeError(
                    "Session: the context changed while an answer was generated that is to be kept"
                )
            context = self._context.with_answer(call.added, answer, self._encoder)
            ids = list(context.ids)
            held = max(self.adapters.longest_tail(ids), 1)
            # The base model's own keys and values are what a prefill would compute again.
            if view is not None and view.get_seq_length() <= len(ids) - held:
                self._cache = view
            cache = self._prefill(ids, self._cache)
            self._context, self._cache = context, cache

    def _answer(self, call: Call, generated: list[int], settings: Settings) -> Answer:
        generated = until_end(call.ids, generated, settings)
        text = self.tokenizer.decode(generated, skip_special_tokens=True)
        return Answer(text, tuple(generated), call.adapter, tuple(call.added), call.start)

    def _settings(self, options: dict[str, Any], where: str) -> Settings:
        """What is in effect for a call; the model's own settings are read each time."""
        settings = Settings(options, self.adapters.own_settings(), self.tokenizer, where)
        check_stop_strings(settings)
        return settings

    def _max_length(self) -> int | None:
        return getattr(
            self.base.config.get_text_config(decoder=True), "max_position_embeddings", None
        )

    def _check_length(self, length: int, where: str) -> None:
        limit = self._max_length()
        if limit is not None and length > limit:
            raise ContextOverflow(
                f"{where}: {length} tokens, but the model has {limit} positions; "
                "shorten the context, the prompt or max_new_tokens"
            )
