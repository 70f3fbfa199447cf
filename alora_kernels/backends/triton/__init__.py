"""The Triton backend. Importing this module does not import triton."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
