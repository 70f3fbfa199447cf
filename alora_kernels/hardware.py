"""The peak rates of each GPU, from its data sheet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Data-sheet rates of one GPU (dense, without sparsity)."""

    name: str
    tensor: float  # 16-bit tensor-core FLOP/s with float32 accumulation
    float32: float  # IEEE float32 FLOP/s
    bandwidth: float  # bytes/s of device memory
    sms: int


# Source: NVIDIA's data sheets and architecture papers (Ampere, Ada, Hopper, Blackwell).
GPUS: dict[str, Rates] = {
    r.name: r
    for r in (
        Rates("A100", 312e12, 19.5e12, 2.04e12, 108),  # SXM, 80 GB
        Rates("A10", 125e12, 31.2e12, 0.60e12, 72),
        Rates("L40S", 362e12, 91.6e12, 0.864e12, 142),
        Rates("RTX 4090", 165e12, 82.6e12, 1.008e12, 128),
        Rates("H100", 989e12, 67e12, 3.35e12, 132),  # SXM
        Rates("H200", 989e12, 67e12, 4.8e12, 132),  # SXM
        Rates("B200", 2250e12, 75e12, 8.0e12, 148),
        Rates("RTX 5090", 210e12, 105e12, 1.79e12, 170),
        Rates("MI300X", 1307e12, 163e12, 5.3e12, 304),  # AMD's data sheets
        Rates("MI355X", 2517e12, 157e12, 8.0e12, 256),
    )
}
ARCHS = {
    80: "A100",
    86: "A10",
    89: "L40S",
    90: "H100",
    100: "B200",
    120: "RTX 5090",
    942: "MI300X",
    950: "MI355X",
}
# The fraction of the peak rate that mma.sync reaches on architectures whose full rate needs newer
# instructions.
OLD_INSTRUCTIONS = {90: 0.62, 100: 0.30}


def rates_of(arch: int) -> Rates:
    """The rates of `arch` (80, 90, ...), or of the nearest older architecture in `ARCHS`."""
    known = [a for a in ARCHS if a <= arch]
    return GPUS[ARCHS[max(known) if known else 80]]
