"""A PTX interpreter over numpy: compiled GPU kernels run, checked, on a CPU.

parser (text to kernels) · formats, registers, arithmetic, bits, warp (threads and values) ·
memory, atomics, racecheck (every access checked) · barriers, async_copies, maps, tensormaps (who
waits for what) · tensor_cores, wgmma, tcgen05 (fragments) · wave (the scheduler) · counters,
report · machine (the device) · triton_driver (Triton launches on it) · nvcc, cutlass (compile
for it).
"""

from .formats import PtxError
from .machine import Machine
from .parser import Module

__all__ = ["Machine", "Module", "PtxError"]
