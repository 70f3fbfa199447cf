"""How the models of the installed transformers are given a cache."""

from __future__ import annotations

import inspect
from typing import Any


def cache_name(model: Any) -> str:
    """The name of the cache argument of a forward, in this version of transformers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
