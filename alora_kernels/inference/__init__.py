"""Inference over one base cache: every adapter answers on what the base model read once."""

from .calls import Answer, ContextOverflow
from .session import Session
from .views import CacheError, view_of

__all__ = ["Answer", "CacheError", "ContextOverflow", "Session", "view_of"]
