"""Inference over one base cache: every adapter answers on what the base model read once."""

from .session import Session
from .turns import Answer, ContextOverflow
from .views import CacheError, view_of

__all__ = ["Answer", "CacheError", "ContextOverflow", "Session", "view_of"]
