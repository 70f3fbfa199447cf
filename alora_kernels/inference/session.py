"""`Session`: a context that the base model reads once, and that every adapter answers on."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from . import storage
from .adapters import AdapterTable
from .ask import answer_together
from .chat import Message
from .context import Context, kind_of
from .endings import check_stop_strings, until_end
from .identity import identity_of
from .options import Settings
from .runner import Runner
from .streaming import stream_answer
from .text import Encoder
from .turns import Answer, State, Turn, plan
from .views import check_cache, check_model, view_of

logger = logging.getLogger("alora_kernels")


class Session:
    """A context that the base model reads once and that every adapter answers on.

    session = Session(model, tokenizer)
    session.extend([{"role": "user", "content": document}])
    answer = session.generate(adapter="summary", max_new_tokens=64)

    The last token of the context is held back from the cache, since a model needs a token to
    answer. If the context ends with an adapter's invocation, all of it is held back. Whoever
    generates runs the tokens held back. No call writes to the cache: each gets a view of it.

    Args:
        model: a PeftModel with Activated LoRA adapters (accelerated here if it is not yet), or a
            plain transformers model. It must be in eval mode.
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
        check_model(self.base)
        self._runner = Runner(self.adapters)
        self._state = State(Context(), DynamicCache(config=self.base.config))
        check_cache(self._state.cache)

    # ------------------------------------------------------------------ the context

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the context."""
        return self._state.context.ids

    @property
    def cached_length(self) -> int:
        """How many tokens of the context are in the base cache."""
        return self.cache.get_seq_length()

    @property
    def cache(self) -> Cache:
        """The base cache. Do not write to it: `view_of` makes a cache from it that can grow."""
        return self._state.cache

    def __len__(self) -> int:
        return len(self.token_ids)

    def extend(
        self,
        content: str | Sequence[Message] | Sequence[int],
        *,
        add_generation_prompt: bool = False,
    ) -> Session:
        """Append text, chat messages or token ids, and let the base model read them.

        Text continues the text before it: together they have the tokens of one text. BOS comes only
        at the start. Messages are rendered behind the session's own by the tokenizer's chat
        template. Tokens that came as ids, or were generated, stay as they are.

        Raises:
            ValueError: nothing to append; messages without a chat template, or that do not go on
                where the chat in the context ends; text that would change tokens that have been
                read.
            ContextOverflow: the context would be longer than the model's positions.
        """
        with self._lock:
            state = self._state
            context = self._extended(state, content, add_generation_prompt)
            if context == state.context:
                raise ValueError("Session.extend: nothing to append")
            self._runner.check_length(len(context.ids), "Session.extend")
            self._state = self._read(context, state.cache)
        return self

    def _extended(self, state: State, content: Any, add_generation_prompt: bool) -> Context:
        context, encoder = state.context, self._encoder
        cached = state.cache.get_seq_length()
        kind = "text"
        if not isinstance(content, str):
            content = content.tolist() if hasattr(content, "tolist") else list(content)
            if not content:
                return context
            kind = kind_of(content)
        if kind == "messages":
            own = self._runner.own_settings()
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
            keep: make what was added and generated part of the context. The base model reads it,
                so later turns see it as if everything had been prefilled from scratch.
            **options: those of transformers' `generate`: max_new_tokens, do_sample, temperature,
                top_p, num_beams, stop_strings, stopping_criteria, streamer.

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
        """Answer as `generate` does, piece by piece. Closing the iterator stops the generation.

        The arguments are those of `generate`. `keep=True` takes effect when the stream ends. A
        stream that is closed before its end keeps nothing.

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
            adapters: names; None is the base model. A name may occur twice.
            prompt: one for all adapters, or a list with one text for each.
            **options: those of `generate`, except for several answers of one row.

        Returns:
            One answer for each adapter, in order. If the model cannot share the prefix, they answer
            one by one, and the logger says so once.
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
        state = self._now()  # one for all rows, whatever another thread appends meanwhile
        turns = [self._plan(state, a, p) for a, p in zip(adapters, prompts)]
        for turn in turns:
            self._runner.check_length(settings.length(len(turn.ids)), "Session.ask")
        outs = answer_together(self._runner, turns, settings)
        return [self._answer(turn, out, settings) for turn, out in zip(turns, outs)]

    # ------------------------------------------------------------------ storage

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the context and its cache to a folder (safetensors), whole or not at all."""
        folder, state = Path(folder), self._now()
        storage.check_can_save(folder, state.context, state.cache)
        return storage.save(folder, state.context, state.cache, identity_of(self.base))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any, tokenizer: Any) -> Session:
        """Read what `save` wrote, for the same base model.

        Raises:
            ValueError: the cache is another model's, or the files do not fit together.
        """
        folder, session = Path(folder), cls(model, tokenizer)
        saved = storage.read_header(folder)
        here = identity_of(session.base, sampled=saved.first_format)
        if differences := here.differences(saved.identity):
            raise ValueError(
                f"Session.load: {folder} was saved for another base model: "
                + ", ".join(differences)
            )
        cache = session.cache  # of a new session, so it is empty
        storage.fill_cache(folder, saved.cached_length, cache, session.base.device)
        if saved.first_format:
            logger.warning(
                "Session.load: %s was written by an older version, which compares a sample of the "
                "weights only and keeps no messages; save the session again",
                folder,
            )
        session._state = State(saved.context, cache)
        return session

    # ------------------------------------------------------------------ how

    def _now(self) -> State:
        """What the session has read. If a thread is just appending something, this waits for it."""
        with self._lock:
            return self._state

    def _plan(self, state: State, adapter: str | None, prompt: Any) -> Turn:
        return plan(state, self._encoder, self.adapters, adapter, prompt)

    def _generate(
        self,
        adapter: str | None,
        prompt: str | Sequence[int] | None,
        settings: Settings,
        keep: bool,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Any:
        """Answer, and keep the answer if the caller asked for it and still wants it."""
        state = self._now()
        turn = self._plan(state, adapter, prompt)
        self._runner.check_length(settings.length(len(turn.ids)), settings.where)
        several = settings.number("num_return_sequences") > 1
        if several and keep:
            raise ValueError(f"{settings.where}: keep=True takes one answer, not several")
        view = view_of(turn.cache)
        rows = settings.rows
        if rows > 1:
            view.batch_repeat_interleave(rows)
        out = self._runner.answer(turn, view, settings, rows)
        answers = [self._answer(turn, row[len(turn.ids) :].tolist(), settings) for row in out]
        if keep and wanted():
            self._keep(state, turn, answers[0], view if adapter is None and rows == 1 else None)
        return answers if several else answers[0]

    def _read(self, context: Context, cache: Cache) -> State:
        """Let the base model read what `cache` does not hold of a context."""
        cache = self._runner.prefill(list(context.ids), cache, self.prefill_chunk)
        return State(context, cache)

    def _keep(self, state: State, turn: Turn, answer: Answer, view: Cache | None) -> None:
        """Append what a turn added and generated, and let the base model read it.

        Args:
            state: what the turn began from.
            view: the turn's cache, if the base model itself wrote it.
        """
        with self._lock:
            if self._state is not state:
                raise RuntimeError(
                    "Session: the context changed while an answer was generated that is to be kept"
                )
            context = state.context.with_answer(turn.added, answer, self._encoder)
            ids, cache = list(context.ids), state.cache
            # The base model's own keys and values are what a prefill would compute again.
            if view is not None and view.get_seq_length() <= len(ids) - self._runner.held(ids):
                cache = view
            self._state = self._read(context, cache)

    def _answer(self, turn: Turn, generated: list[int], settings: Settings) -> Answer:
        generated = until_end(turn.ids, generated, settings)
        text = self.tokenizer.decode(generated, skip_special_tokens=True)
        return Answer(text, tuple(generated), turn.adapter, tuple(turn.added), turn.start)

    def _settings(self, options: dict[str, Any], where: str) -> Settings:
        """The settings of a call. The model's own are read each time: they may have changed."""
        settings = Settings(options, self._runner.own_settings(), self.tokenizer, where)
        check_stop_strings(settings)
        return settings
