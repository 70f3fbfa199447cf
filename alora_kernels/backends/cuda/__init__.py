"""The CUDA C++ backend. This module can be imported without the extension and without a GPU."""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
