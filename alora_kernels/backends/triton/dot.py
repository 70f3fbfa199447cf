"""One tile product with float32 accumulation."""

import os

import triton
import triton.language as tl

# The interpreter multiplies bf16 tiles as raw integers; in float32 the products are the same.
INTERPRETED = tl.constexpr(
    os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
