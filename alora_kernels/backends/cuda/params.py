"""The parameter structs of the kernels, with the field names of `csrc/params.h`.

`csrc/fields.h` exports names, kinds and offsets, as the compiler sees them. `extension` compares
them with this file when it loads the extension. If a field was moved or renamed on one side only,
the error names it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_COLUMN_BLOCKS = 16  # per launch of shrink; a block has sixteen columns

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

MAP_BYTES = 128


class Kind(NamedTuple):
    """A C++ type: its letter in `struct` and in `csrc/fields.h`, its size and its alignment."""

    letter: str
    size: int
    alignment: int


POINTER, INT64 = Kind("P", 8, 8), Kind("q", 8, 8)
INT32, UINT32, FLOAT = Kind("i", 4, 4), Kind("I", 4, 4), Kind("f", 4, 4)
MAP = Kind("M", MAP_BYTES, 64)  # a tensor map, encoded by the driver


class Field(NamedTuple):
    """One field of a struct."""

    kind: Kind
    offset: int


class Struct:
    """A C++ struct, laid out by the rules of C++ compilers.

    Each of `members` is a kind and the names of the fields of this kind, separated by spaces. Or it
    is a struct and the name of the field that contains it; the inner fields are then called
    `name.field`.
    """

    def __init__(self, name: str, *members: tuple[Kind | Struct, str]) -> None:
        self.name, self.size = name, 0
        self.fields: dict[str, Field] = {}
        self.alignment, end = 1, 0
        for kind, names in members:
            for own in names.split():
                begin = -(-end // kind.alignment) * kind.alignment
                if isinstance(kind, Struct):
                    inner = {f"{own}.{n}": f for n, f in kind.fields.items()}
                else:
                    inner = {own: Field(kind, 0)}
                for n, f in inner.items():
                    self.fields[n] = f._replace(offset=begin + f.offset)
                end = begin + kind.size
                self.alignment = max(self.alignment, kind.alignment)
        self.size = -(-end // self.alignment) * self.alignment
        self.maps = tuple([n for n, f in self.fields.items() if f.kind is MAP])

    def pack(self, values: Mapping[str, float]) -> bytes:
        """The struct's bytes, with zeros in place of pointers and tensor maps.

        Raises:
            TypeError: a field has no value, or a value has no field.
        """
        numbers = {n: f for n, f in self.fields.items() if f.kind not in (POINTER, MAP)}
        if values.keys() != numbers.keys():
            odd = sorted(values.keys() ^ numbers.keys())
            raise TypeError(f"{self.name}: given without a field, or not given: {', '.join(odd)}")
        data = bytearray(self.size)
        for name, (kind, offset) in numbers.items():
            struct.pack_into(kind.letter, data, offset, values[name])
        return bytes(data)

    def exported(self) -> tuple[int, dict[str, tuple[str, int]]]:
        """The size, and the letter and offset of each field, in the form that C++ exports."""
        return self.size, {n: (f.kind.letter, f.offset) for n, f in self.fields.items()}


GEMM = Struct(
    "GemmParams",
    (POINTER, "left right bias low up down lora_bias out low_out row_adapter seed"),
    (INT64, "left_m left_k right_k right_n low_m up_r up_n down_r down_k out_m low_out_m"),
    (INT32, "m n k r"),
    (FLOAT, "scale lora_bias_scale"),
    (UINT32, "threshold flags"),
)
GEMM_SM90 = Struct(
    "GemmSm90Params",
    (MAP, "left right low up out"),
    (POINTER, "bias up_values lora_bias out_values row_adapter seed"),
    (INT64, "up_r up_n out_m"),
    (INT32, "m n k r"),
    (FLOAT, "lora_bias_scale"),
    (UINT32, "threshold flags"),
)
ONEPASS_SM90 = Struct(
    "OnePassSm90Params",
    (MAP, "down"),
    (GEMM_SM90, "gemm"),
    (POINTER, "down_values low_out"),
    (INT64, "down_r down_k low_m"),
    (FLOAT, "scale"),
)
FUSED_SM90 = Struct(
    "FusedSm90Params",
    (MAP, "down"),
    (GEMM_SM90, "gemm"),
    (POINTER, "down_values low_out active_rows active_count ready"),
    (INT64, "down_r down_k low_m"),
    (FLOAT, "scale"),
)
DECODE = Struct(
    "DecodeParams",
    (POINTER, "left weight bias up down lora_bias out part arrived row_adapter"),
    (INT64, "left_m weight_n up_r up_n down_r down_k out_m"),
    (INT32, "m n k r k_slice"),
    (FLOAT, "scale lora_bias_scale"),
    (UINT32, "flags"),
)
COLUMN = Struct("ColumnBlock", (POINTER, "right"), (INT32, "valid"), (FLOAT, "scale"))
SHRINK = Struct(
    "ShrinkParams",
    (POINTER, "left out active_rows active_count seed"),
    (INT64, "left_m left_k right_r right_k out_m"),
    (INT32, "k blocks"),
    (UINT32, "threshold flags"),
    (COLUMN, " ".join([f"columns[{i}]" for i in range(MAX_COLUMN_BLOCKS)])),
)
EXPAND = Struct(
    "ExpandParams",
    (POINTER, "low up lora_bias out active_rows active_count seed"),
    (INT64, "low_m up_r up_n out_m out_n"),
    (INT32, "n r"),
    (FLOAT, "lora_bias_scale"),
    (UINT32, "threshold flags"),
)
GRAD = Struct(
    "GradParams",
    (POINTER, "wide low part active_rows active_count seed"),
    (INT64, "wide_m wide_p low_m"),
    (INT32, "p r16 split_rows"),
    (UINT32, "threshold flags"),
)
GRAD_B = Struct(
    "GradBParams",
    (POINTER, "dy low up part low_part active_rows active_count"),
    (INT64, "dy_m low_m up_n up_r"),
    (INT32, "n r r16 split_rows slots"),
    (UINT32, "flags"),
)
REDUCE = Struct(
    "ReduceParams",
    (POINTER, "part out active_rows active_count"),
    (INT64, "out_p out_r"),
    (INT32, "p r r16 split_rows splits"),
    (FLOAT, "scale"),
    (UINT32, "flags"),
)

STRUCTS = {
    s.name: s
    for s in (
        GEMM, GEMM_SM90, ONEPASS_SM90, FUSED_SM90, DECODE, SHRINK, EXPAND, GRAD, GRAD_B, REDUCE
    )
}  # fmt: skip

FLAGS = {
    "kAdapterFloat": ADAPTER_FLOAT,
    "kDropout": DROPOUT,
    "kAdd": ADD,
    "kActiveOnly": ACTIVE_ONLY,
    "kVectorAdapter": VECTOR_ADAPTER,
    "kVectorOut": VECTOR_OUT,
    "kFloatOut": FLOAT_OUT,
    "kConvertUp": CONVERT_UP,
    "kPairsAdapter": PAIRS_ADAPTER,
    "kConvertDown": CONVERT_DOWN,
    "kVectorUp": VECTOR_UP,
    "kAlongN": ALONG_N,
    "kStrided": STRIDED,
    "kOnePass": ONEPASS,
}


def exported() -> dict[str, Any]:
    """The values that the extension must export to agree with this file."""
    return {
        "structs": {name: struct.exported() for name, struct in STRUCTS.items()},
        "flags": FLAGS,
        "max_column_blocks": MAX_COLUMN_BLOCKS,
    }
