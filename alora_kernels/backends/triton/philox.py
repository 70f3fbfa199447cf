"""Dropout's keep mask inside a kernel; the definition is `reference.keep_mask`."""

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed_ptr, threshold, rows, first_column, BLOCK: tl.constexpr):
    """bool [rows, BLOCK], true where kept; `first_column` is a multiple of four."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    group = (first_column // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
    row = rows.to(tl.uint32)[:, None]
    zero = row * 0 + group * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + row, zero, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words.to(tl.uint32, bitcast=True).to(tl.uint64) >= threshold
