"""The kernels' parameter structs, as `csrc/params.h` declares them, and the bits of `flags`."""

from __future__ import annotations

import struct

MAX_COLUMN_BLOCKS = 16  # of sixteen columns each, in one launch of shrink

ADAPTER_FLOAT = 1
DROPOUT = 2
ADD = 4
ACTIVE_ONLY = 8
VECTOR_ADAPTER = 16
VECTOR_OUT = 32
FLOAT_OUT = 64
CONVERT_UP = 128
PAIRS_ADAPTER = 256
CONVERT_DOWN = 512
VECTOR_UP = 1024
ALONG_N = 2048
STRIDED = 4096
ONEPASS = 8192

# Tensor maps, pointers, strides, 32-bit numbers, in the order of the fields.
LAYOUTS = {
    "GemmParams": struct.Struct("=11Q11q4i2f2I"),
    "GemmSm90Params": struct.Struct("=128s128s128s128s128s6Q3q4if3I24x"),
    "FusedSm90Params": struct.Struct("=128s128s128s128s128s128s6Q3q4if3I24x5Q3qfI56x"),
    "OnePassSm90Params": struct.Struct("=128s128s128s128s128s128s6Q3q4if3I24x2Q3qfI16x"),
    "DecodeParams": struct.Struct("=10Q7q5i2fI"),
    "ShrinkParams": struct.Struct("=5Q5q2i2I" + "Qif" * MAX_COLUMN_BLOCKS),
    "ExpandParams": struct.Struct("=7Q5q2if3I"),
    "GradParams": struct.Struct("=6Q3q3i3I"),
    "GradBParams": struct.Struct("=7Q4q5iI"),
    "ReduceParams": struct.Struct("=4Q2q5if2I"),
}
