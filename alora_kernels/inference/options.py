"""The options of transformers' `generate`: what is in effect, and what a session sets itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_ASSISTED = "transformers' assisted decoding is wrong on a cache that is filled already"
_PROMPT = "give text with prompt=, or extend() the session"
_PADDING = "a session's context has no padding"
_CACHE = "the session has its own cache"
_SEARCH = "transformers runs it by code of its own; use sampling or num_beams"

# What a session refuses, and what to do instead.
OWN_OPTIONS = {
    "input_ids": _PROMPT,
    "inputs": _PROMPT,
    "inputs_embeds": "a session works on token ids",
    "attention_mask": _PADDING,
    "position_ids": _PADDING,
    "cache_position": _PADDING,
    "past_key_values": _CACHE,
    "cache": _CACHE,
    "cache_params": _CACHE,
    "return_dict_in_generate": "the answer has the token ids; leave it out",
    # Seen on transformers 5.24: the first step runs the whole prompt again on the filled cache.
    "assistant_model": _ASSISTED,
    "assistant_tokenizer": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "use_mtp": _ASSISTED,
    "custom_generate": _SEARCH,
    "penalty_alpha": _SEARCH,
    "dola_layers": _SEARCH,
    "num_beam_groups": _SEARCH,
    "constraints": _SEARCH,
    "force_words_ids": _SEARCH,
    "token_healing": "it would replace tokens that are in the context",
}
# When a value of these options has no effect, although it is neither None nor empty.
_IDLE: dict[str, Callable[[Any], bool]] = {
    "num_beam_groups": lambda value: value <= 1,
    "penalty_alpha": lambda value: value <= 0,
}
# Options that do not change an answer's tokens, and the value that a session needs of them.
_HARMLESS = {
    "use_cache": True,
    "cache_implementation": None,
    "prefill_chunk_size": None,  # the session reads the chunks itself
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
}
# These read the tokens before the one that they judge, and so the padding, too.
_READ_TOKENS = (
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "watermarking_config",
)
# Code of the caller, which may depend on the row that it sees.
_CALLED = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")


class Settings:
    """What is in effect for one call of `generate`.

    An option means the same whether it is a keyword of the call, a field of its
    `generation_config=`, or a field of the model's own `generation_config`. The first of these that
    sets it decides. A keyword also decides with the value None.

    Args:
        options: the keywords of the call.
        own: the model's generation_config as it is now.
        tokenizer: ends an answer if nothing else says how, and reads `stop_strings`.
        where: the method that was called, for errors.
    """

    def __init__(self, options: Mapping[str, Any], own: Any, tokenizer: Any, where: str) -> None:
        self.options, self.own, self.tokenizer, self.where = options, own, tokenizer, where
        for name, instead in OWN_OPTIONS.items():
            value = self.get(name)
            if name in _IDLE and isinstance(value, int | float):
                off = _IDLE[name](value)
            else:
                off = _empty(value)
            if not off:
                raise ValueError(
                    f"{where}: {name} is not an option of a session; {instead}{self._source(name)}"
                )

    def get(self, name: str) -> Any:
        """The value in effect; None if nobody sets it, or if a keyword sets it to None."""
        if name in self.options:
            return self.options[name]
        for config in (self.options.get("generation_config"), self.own):
            value = getattr(config, name, None)
            if value is not None:
                return value
        return None

    def number(self, name: str) -> int:
        """A count. It is one if nothing sets it."""
        return int(self.get(name) or 1)

    @property
    def rows(self) -> int:
        """How many rows transformers makes of a prompt."""
        return max(self.number("num_beams"), self.number("num_return_sequences"))

    @property
    def stop_strings(self) -> list[str]:
        value = self.get("stop_strings")
        return [value] if isinstance(value, str) and value else list(value or [])

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer: the model's, or else the tokenizer's."""
        value = self.get("eos_token_id")
        if value is None and "eos_token_id" not in self.options:
            value = getattr(self.tokenizer, "eos_token_id", None)
        return _ids(value)

    def length(self, prompt: int) -> int:
        """How long a prompt of `prompt` tokens and its answer can get, as far as options say."""
        new = self.get("max_new_tokens")
        if new is not None:
            return prompt + int(new)
        return max(prompt + 1, int(self.get("max_length") or 0))

    def keywords(self) -> dict[str, Any]:
        """The options of the call, in the form that transformers gets."""
        given = {k: v for k, v in self.options.items() if k not in OWN_OPTIONS and k != "keep"}
        for name in OWN_OPTIONS:
            value = self._configured(name)
            if name not in _IDLE and value is not None:  # it is off, or it was refused before
                given[name] = False if isinstance(value, bool) else None
        for name, value in _HARMLESS.items():
            if name in given or self.get(name) not in (None, value):
                given[name] = value
        given["use_cache"] = True
        for name in ("num_beams", "num_return_sequences"):
            if name in given and given[name] is None:
                given[name] = 1
        ends = self.ends
        if ends and self.get("eos_token_id") is None:
            given["eos_token_id"] = sorted(ends)
        if self.get("pad_token_id") is None:
            pad = getattr(self.tokenizer, "pad_token_id", None)
            given["pad_token_id"] = min(ends, default=None) if pad is None else pad
        if self.stop_strings:
            if given.get("tokenizer") is None:
                given["tokenizer"] = self.tokenizer
        elif self.get("stop_strings") is not None:
            given["stop_strings"] = None
        return given

    # ------------------------------------------------------------------ what each call accepts

    def check_one_adapter(self) -> None:
        """Refuse options that a batch of adapters does not accept.

        Raises:
            ValueError: several answers of one row, a prompt in chunks, guidance by another
                prompt, a streamer, or keep=True.
        """
        several = [n for n in ("num_beams", "num_return_sequences") if self.number(n) > 1]
        several += ["guidance_scale"] if self.get("guidance_scale") not in (None, 1) else []
        several += [n for n in ("prefill_chunk_size", "streamer", "keep") if self.get(n)]
        for name in several:
            raise ValueError(
                f"{self.where}: {name} is for one adapter at a time; use generate()"
                f"{self._source(name)}"
            )

    def check_stream(self) -> None:
        """Refuse options that do not work piece by piece.

        Raises:
            ValueError: several answers, beams, or a streamer beside the session's.
        """
        for name in ("num_beams", "num_return_sequences"):
            if self.number(name) > 1:
                raise ValueError(
                    f"{self.where}: {name} makes several rows, which cannot be streamed; use "
                    f"generate(){self._source(name)}"
                )
        if self.get("streamer") is not None:
            raise ValueError(f"{self.where}: streamer is the stream's own; use generate()")

    def why_alone(self, padded: bool) -> str | None:
        """Why a batch could answer differently from its rows alone; None if it cannot.

        Args:
            padded: the rows differ in length, so that some have padding before their own tokens.
        """
        for name in _CALLED:
            value = self.get(name)
            if value is not None and not _empty(value):
                return f"{name} may tell the rows of a batch from one row alone"
        if not padded:
            return None
        for name in _READ_TOKENS:
            if not _empty(self.get(name)):
                return f"{name} reads the tokens before, and the rows differ in length"
        for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self.get(name) and self.get(instead) is None:
                return f"{name} counts the prompt, and the rows differ in length"
        return None

    def _configured(self, name: str) -> Any:
        """The value that a generation config would bring into the call."""
        for config in (self.options.get("generation_config"), self.own):
            value = getattr(config, name, None)
            if value is not None:
                return value
        return None

    def _source(self, name: str) -> str:
        if name in self.options:
            return ""
        if getattr(self.options.get("generation_config"), name, None) is not None:
            return " (set in generation_config)"
        return " (set in the model's own generation_config; set it to None there)"


def _empty(value: Any) -> bool:
    """Whether it is None, False, 0, or an empty collection."""
    if value is None:
        return True
    if isinstance(value, bool | int | float | str | list | tuple | dict | set):
        return not value
    return False


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    if hasattr(value, "tolist"):  # a tensor
        value = value.tolist()
    return set(value) if isinstance(value, list | tuple | set) else {int(value)}
