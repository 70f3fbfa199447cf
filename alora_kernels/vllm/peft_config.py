"""Touched place: the check of PEFT's configuration.

vLLM refuses `alora_invocation_tokens`; the plugin accepts them. It refuses what vLLM would
overlook: an empty list, and the older format with `invocation_string`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from .adapter import invocation_tokens
from .patch import Touch, wrap

FEATURES = Touch(
    "vllm.lora.peft_helper.PEFTHelper._validate_features",
    "(self)",
    "vLLM refuses every adapter with an invocation",
)
PARSE = Touch(
    "vllm.lora.peft_helper.PEFTHelper.from_dict",
    "(cls, config_dict)",
    "vLLM overlooks an empty invocation and the older format, and would run a plain LoRA",
)
TOUCHED: tuple[Touch, ...] = (FEATURES, PARSE)


def install() -> None:
    """Accepts a well-formed invocation, refuses any other."""
    wrap(FEATURES, _accepting)
    wrap(PARSE, _parsing)


def _accepting(function: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    def _validate_features(self: Any) -> list[str]:
        if not self.alora_invocation_tokens:
            return function(self)
        plain = copy.copy(self)
        plain.alora_invocation_tokens = None
        return function(plain)

    return _validate_features


def _parsing(function: Callable[..., Any]) -> Callable[..., Any]:
    def from_dict(cls: Any, config_dict: dict[str, Any]) -> Any:
        invocation_tokens(config_dict)
        return function(cls, config_dict)

    return from_dict
