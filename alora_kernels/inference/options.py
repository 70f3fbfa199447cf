"""The options of transformers' `generate`: what is in effect, and what a session sets itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What to do instead.
OWN_OPTIONS = {
    "input_ids": "give text with prompt=, or extend() the session",
    "inputs": "give text with prompt=, or extend() the session",
    "inputs_embeds": "a session works on token ids",
    "attention_mask": "a session's context has no padding",
    "position_ids": "a session's context has no padding",
    "past_key_values": "the session has its own cache",
    "cache": "the session has its own cache",
    "cache_implementation": "the session has its own cache",
    "return_dict_in_generate": "the answer has the token ids",
    # Seen on transformers 5.24: the first step runs the whole prompt again on the filled cache.
    "assistant_model": "transformers' assisted decoding is wrong on a cache that is filled already",
    "prompt_lookup_num_tokens": "transformers' assisted decoding is wrong on a cache that is "
    "filled already",
}


def setting(options: Mapping[str, Any], name: str, defaults: Any = None) -> Any:
    """The value in effect: the option, else that of its generation_config, else the model's own."""
    for value in (
        options.get(name),
        getattr(options.get("generation_config"), name, None),
        getattr(defaults, name, None),
    ):
        if value is not None:
            return value
    return None


def check_options(options: Mapping[str, Any], defaults: Any, where: str) -> None:
    """Refuse what would bypass the session's cache.

    Raises:
        ValueError: names the option, and what to do instead.
    """
    for name, instead in OWN_OPTIONS.items():
        value = setting(options, name)
        if value is not None and value is not False:
            raise ValueError(f"{where}: {name} is not an option of a session; {instead}")
    if setting(options, "use_cache") is False:
        raise ValueError(f"{where}: use_cache=False; a session is a cache")
    if getattr(defaults, "prefill_chunk_size", None) is not None:
        raise ValueError(
            f"{where}: the model's generation_config sets prefill_chunk_size, which older "
            "transformers read wrongly on a cache that is filled already; set it to None and give "
            "prefill_chunk_size with the call"
        )


def check_one_answer(options: Mapping[str, Any], defaults: Any) -> None:
    """Refuse what a batch of adapters cannot have.

    Raises:
        ValueError: several answers of one row, a prompt in chunks, a streamer, or keep=True.
    """
    several = [
        name
        for name in ("num_beams", "num_return_sequences")
        if int(setting(options, name, defaults) or 1) > 1
    ]
    several += [name for name in ("prefill_chunk_size",) if setting(options, name)]
    for name in (*several, *(name for name in ("streamer", "keep") if options.get(name))):
        raise ValueError(f"Session.ask: {name} is for one adapter at a time; use generate()")
