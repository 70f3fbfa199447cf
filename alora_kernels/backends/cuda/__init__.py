"""The CUDA C++ backend. Importing this module needs neither the extension nor a GPU."""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
