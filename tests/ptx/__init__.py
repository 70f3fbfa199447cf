"""A PTX interpreter over numpy: compiled GPU kernels run, checked, on a CPU."""

from .formats import PtxError
from .machine import Machine
from .parser import Module

__all__ = ["Machine", "Module", "PtxError"]
