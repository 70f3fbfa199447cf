"""The plugin's entry: vLLM calls `register` in each of its processes, before it makes an engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from .adapter import invocation_tokens
from .patch import MARK, Touch, find, function_of, mismatches

logger = logging.getLogger("alora_kernels.vllm")

SUPPORTED = ">=0.32,<0.33"


def register() -> None:
    """Teaches vLLM to serve aLoRA, or leaves it as it is and says why. May be called again."""
    problems = version_problems() or mismatches(touched())
    if problems:
        refuse(problems)
        return
    for module in modules():
        module.install()


def modules() -> tuple[Any, ...]:
    """One module for each touched place."""
    from . import admission, block_hashes, mapping, mapping_v2, ops, peft_config, validate

    return peft_config, validate, admission, block_hashes, mapping, mapping_v2, ops


def touched() -> tuple[Touch, ...]:
    """Every place that must be as expected, except the V2 runner's, which is checked by itself."""
    from . import mapping_v2

    return tuple(t for module in modules() if module is not mapping_v2 for t in module.TOUCHED)


def version_problems() -> list[str]:
    """Why this vLLM is not a supported one; empty when it is."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version
    from vllm.version import __version__

    try:
        supported = SpecifierSet(SUPPORTED).contains(Version(__version__), prereleases=True)
    except InvalidVersion:
        supported = False
    return [] if supported else [f"this is vLLM {__version__}"]


def message(problems: list[str]) -> str:
    """What the user is told when this vLLM is not supported."""
    return (
        f"alora_kernels serves Activated LoRA with vLLM {SUPPORTED}; it did not touch this one: "
        + "; ".join(problems)
    )


def refuse(problems: list[str]) -> None:
    """Warns, and makes vLLM refuse aLoRA adapters with the reason. Nothing else is changed.

    Without it an older vLLM would run them as plain LoRA.
    """
    text = message(problems)
    logger.warning("%s. Activated LoRA adapters are refused.", text)
    try:
        owner, attribute, value = find("vllm.lora.peft_helper.PEFTHelper.from_dict")
    except LookupError:
        return
    function = function_of(value)
    if not hasattr(function, MARK):
        new = functools.wraps(function)(_refusing(function, text))
        setattr(new, MARK, function)
        setattr(owner, attribute, classmethod(new))


def _refusing(function: Callable[..., Any], text: str) -> Callable[..., Any]:
    def refusing(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, dict) and invocation_tokens(config) is not None:
            raise ValueError(f"an Activated LoRA adapter: {text}")
        return function(cls, config, *args, **kwargs)

    return refusing
