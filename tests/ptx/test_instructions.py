"""Instruction families against plain numpy: one thread per element, one instruction per kernel."""

from __future__ import annotations

import numpy as np
import pytest

from . import Machine, Module, PtxError
from .formats import bf16_to_f32, f32_to_bf16

BITS = {"u16": 2, "u32": 4, "s32": 4, "f32": 4, "b32": 4, "u64": 8, "s64": 8, "f64": 8, "b64": 8}
NUMPY = {"u32": np.uint32, "s32": np.int32, "f32": np.float32, "u64": np.uint64, "s64": np.int64}


def run(text: str, ins: list[np.ndarray], out: str, dtype: type | None = None) -> np.ndarray:
    """Run `text` over registers %a0.. (one element of each input a thread); returns %d."""
    kinds = [{2: "u16", 4: "u32", 8: "u64"}[x.dtype.itemsize] for x in ins]
    n = len(ins[0])
    params = ", ".join(f".param .u64 p{i}" for i in range(len(ins) + 1))
    decl = "".join(f".reg .b{8 * BITS[k]} %a{i};\n" for i, k in enumerate(kinds))
    load = ""
    for i, k in enumerate(kinds):
        load += f"ld.param.u64 %q, [p{i}];\nmul.wide.u32 %o, %t, {BITS[k]};\nadd.s64 %q, %q, %o;\n"
        load += f"ld.global.{k} %a{i}, [%q];\n"
    body = f"""
.visible .entry k({params})
{{
.reg .pred %p; .reg .b32 %t; .reg .b64 %q; .reg .b64 %o; .reg .b{8 * BITS[out]} %d;
{decl}mov.u32 %t, %tid.x;
{load}{text}
ld.param.u64 %q, [p{len(ins)}];
mul.wide.u32 %o, %t, {BITS[out]};
add.s64 %q, %q, %o;
st.global.b{8 * BITS[out]} [%q], %d;
ret;
}}
"""
    gpu = Machine(1 << 20)
    result = gpu.empty((n,), dtype or NUMPY[out])
    gpu.launch(Module(body), "k", (1,), n, [*(gpu.put(x) for x in ins), result])
    assert gpu.unwritten(result) == 0
    return gpu.get(result)


def integers(rng: np.random.Generator, dtype: type, n: int = 64) -> np.ndarray:
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max, n, dtype, endpoint=True)
    x[:4] = info.min, info.max, 0, 1
    return rng.permutation(x)


def floats(rng: np.random.Generator, n: int = 64) -> np.ndarray:
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4, n)).astype(np.float32)


@pytest.mark.parametrize(
    "name, ty, fn",
    [
        ("add.s32", np.int32, np.add),
        ("sub.s32", np.int32, np.subtract),
        ("mul.lo.s32", np.int32, np.multiply),
        ("min.s32", np.int32, np.minimum),
        ("max.u32", np.uint32, np.maximum),
        ("and.b32", np.uint32, np.bitwise_and),
        ("or.b32", np.uint32, np.bitwise_or),
        ("xor.b32", np.uint32, np.bitwise_xor),
    ],
)
def test_integer_binary(name: str, ty: type, fn: np.ufunc, rng: np.random.Generator) -> None:
    x, y = integers(rng, ty), integers(rng, ty)
    kind = "s32" if ty is np.int32 else "u32"
    np.testing.assert_array_equal(run(f"{name} %d, %a0, %a1;", [x, y], kind), fn(x, y))


def test_multiply_high_is_the_upper_half(rng: np.random.Generator) -> None:
    x, y = integers(rng, np.uint32), integers(rng, np.uint32)
    expected = (x.astype(np.uint64) * y >> np.uint64(32)).astype(np.uint32)
    np.testing.assert_array_equal(run("mul.hi.u32 %d, %a0, %a1;", [x, y], "u32"), expected)
    x, y = integers(rng, np.int32), integers(rng, np.int32)
    wide = x.astype(np.int64) * y
    np.testing.assert_array_equal(run("mul.wide.s32 %d, %a0, %a1;", [x, y], "s64"), wide)


def test_shifts_clamp_at_the_width(rng: np.random.Generator) -> None:
    x, n = integers(rng, np.uint32), rng.integers(0, 64, 64).astype(np.uint32)
    n[:2] = 32, 31
    left = np.array([int(a) << int(b) & 0xFFFFFFFF for a, b in zip(x, n)], np.uint32)
    right = np.array([int(a) >> int(b) for a, b in zip(x, n)], np.uint32)
    np.testing.assert_array_equal(run("shl.b32 %d, %a0, %a1;", [x, n], "u32"), left)
    np.testing.assert_array_equal(run("shr.u32 %d, %a0, %a1;", [x, n], "u32"), right)
    s = x.view(np.int32)
    signed = np.array([int(a) >> min(int(b), 31) for a, b in zip(s, n)], np.int32)
    np.testing.assert_array_equal(run("shr.s32 %d, %a0, %a1;", [s, n], "s32"), signed)


def test_division_rounds_towards_zero(rng: np.random.Generator) -> None:
    x, y = integers(rng, np.int64), integers(rng, np.int64) >> rng.integers(0, 63, 64)
    y[y == 0] = 3
    x[x == np.iinfo(np.int64).min] = 5
    quotient = np.array([abs(int(a)) // abs(int(b)) * (1 if (a < 0) == (b < 0) else -1)
                         for a, b in zip(x, y)])  # fmt: skip
    np.testing.assert_array_equal(run("div.s64 %d, %a0, %a1;", [x, y], "s64"), quotient)
    rest = run("rem.s64 %d, %a0, %a1;", [x, y], "s64")
    np.testing.assert_array_equal(rest, x - quotient * y)


def test_bit_searches(rng: np.random.Generator) -> None:
    x = integers(rng, np.uint32) >> rng.integers(0, 32, 64).astype(np.uint32)
    length = np.array([int(v).bit_length() for v in x])
    np.testing.assert_array_equal(run("clz.b32 %d, %a0;", [x], "u32"), 32 - length)
    found = np.where(length == 0, 0xFFFFFFFF, length - 1).astype(np.uint32)
    np.testing.assert_array_equal(run("bfind.u32 %d, %a0;", [x], "u32"), found)
    turned = np.array([int(f"{v:032b}"[::-1], 2) for v in x], np.uint32)
    np.testing.assert_array_equal(run("brev.b32 %d, %a0;", [x], "u32"), turned)
    np.testing.assert_array_equal(run("popc.b32 %d, %a0;", [x], "u32"), np.bitwise_count(x))


def test_floats_become_integers_by_rounding_and_saturating() -> None:
    x = np.array([2.5, -2.5, 1e20, -1e20, np.nan, 0.49, 3e9, -0.5] * 4, np.float32)
    nearest = [2, -2, 2**31 - 1, -(2**31), 0, 0, 2**31 - 1, 0] * 4
    np.testing.assert_array_equal(run("cvt.rni.s32.f32 %d, %a0;", [x], "s32"), nearest)
    towards = [2, 0, 2**32 - 1, 0, 0, 0, 3 * 10**9, 0] * 4
    np.testing.assert_array_equal(run("cvt.rzi.u32.f32 %d, %a0;", [x], "u32"), towards)


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x01])
def test_lop3_is_its_truth_table(table: int, rng: np.random.Generator) -> None:
    x, y, z = (integers(rng, np.uint32) for _ in range(3))
    got = run(f"lop3.b32 %d, %a0, %a1, %a2, {table};", [x, y, z], "u32")
    for bit in range(32):
        index = (x >> bit & 1) * 4 + (y >> bit & 1) * 2 + (z >> bit & 1)
        np.testing.assert_array_equal(got >> bit & 1, table >> index & 1)


def test_prmt_picks_bytes_and_replicates_signs(rng: np.random.Generator) -> None:
    x, y = integers(rng, np.uint32), integers(rng, np.uint32)
    both = np.stack([x, y], 1).view(np.uint8)
    got = run("prmt.b32 %d, %a0, %a1, 0xD074;", [x, y], "u32").view(np.uint8).reshape(-1, 4)
    np.testing.assert_array_equal(got[:, :3], both[:, [4, 7, 0]])
    np.testing.assert_array_equal(got[:, 3], np.where(both[:, 5] & 0x80, 0xFF, 0))


def test_float_arithmetic(rng: np.random.Generator) -> None:
    x, y, z = floats(rng), floats(rng), floats(rng)
    fused = (x.astype(np.float64) * y + z).astype(np.float32)
    np.testing.assert_array_equal(run("fma.rn.f32 %d, %a0, %a1, %a2;", [x, y, z], "f32"), fused)
    np.testing.assert_array_equal(run("mul.f32 %d, %a0, %a1;", [x, y], "f32"), x * y)
    three = np.maximum(np.maximum(x, y), z)
    np.testing.assert_array_equal(run("max.f32 %d, %a0, %a1, %a2;", [x, y, z], "f32"), three)


def test_mixed_precision_widens_the_first_operands(rng: np.random.Generator) -> None:
    x, y = f32_to_bf16(floats(rng)), floats(rng)
    pairs = np.stack([x, x], 1).view(np.uint32)[:, 0]
    half = "{ .reg .b16 %lo, %hi; mov.b32 {%lo, %hi}, %a0;"
    got = run(half + "add.rn.f32.bf16 %d, %lo, %a1; }", [pairs, y], "f32")
    np.testing.assert_array_equal(got, bf16_to_f32(x) + y)
    got = run(half + "fma.rn.f32.bf16 %d, %lo, %hi, %a1; }", [pairs, y], "f32")
    exact = bf16_to_f32(x).astype(np.float64) ** 2 + y
    np.testing.assert_array_equal(got, exact.astype(np.float32))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str, rng: np.random.Generator) -> None:
    x, y, z = floats(rng), floats(rng), floats(rng)
    got = run(f"fma.{mode}.f32 %d, %a0, %a1, %a2;", [x, y, z], "f32").astype(np.float64)
    exact = x.astype(np.float64) * y + z
    assert (np.abs(got - exact) <= np.spacing(np.abs(got).astype(np.float32))).all()
    if mode == "rz":
        assert (np.abs(got) <= np.abs(exact)).all()
    else:
        assert (got <= exact).all() if mode == "rm" else (got >= exact).all()


def test_an_unknown_modifier_is_refused(rng: np.random.Generator) -> None:
    x = integers(rng, np.uint32)
    with pytest.raises(PtxError, match=r"opcode not known: add\.cc\.u32"):
        run("add.cc.u32 %d, %a0, %a0;", [x], "u32")


def test_max_drops_a_nan_unless_told_to_keep_it(rng: np.random.Generator) -> None:
    x, y = floats(rng), floats(rng)
    x[::3] = np.nan
    np.testing.assert_array_equal(run("max.f32 %d, %a0, %a1;", [x, y], "f32"), np.fmax(x, y))
    kept = run("max.NaN.f32 %d, %a0, %a1;", [x, y], "f32")
    np.testing.assert_array_equal(kept, np.maximum(x, y))


def test_packed_float_pairs(rng: np.random.Generator) -> None:
    x, y = floats(rng, 128), floats(rng, 128)
    pair = [x.view(np.uint64), y.view(np.uint64)]
    got = run("add.rn.f32x2 %d, %a0, %a1;", pair, "u64").view(np.float32)
    np.testing.assert_array_equal(got, x + y)
    bx, by = f32_to_bf16(x), f32_to_bf16(y)
    got = run("mul.bf16x2 %d, %a0, %a1;", [bx.view(np.uint32), by.view(np.uint32)], "u32")
    exact = f32_to_bf16(bf16_to_f32(bx) * bf16_to_f32(by))
    np.testing.assert_array_equal(got.view(np.uint16), exact)


def test_bf16_conversion_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies halfway between two bf16 numbers, 1 and 1 + 2^-7; so does 1 + 3 * 2^-8.
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.0] * 8, np.float32)
    low = np.zeros_like(x)
    got = run("cvt.rn.bf16x2.f32 %d, %a0, %a1;", [x, low], "u32")
    expected = np.array([1, 1 + 2**-6, -1, 3.0] * 8, np.float32).view(np.uint32)
    np.testing.assert_array_equal(got, expected)


def test_predicates_guard_and_select(rng: np.random.Generator) -> None:
    x, y = integers(rng, np.int32), integers(rng, np.int32)
    text = "setp.lt.s32 %p, %a0, %a1; mov.b32 %d, %a0; @!%p mov.b32 %d, %a1;"
    np.testing.assert_array_equal(run(text, [x, y], "s32"), np.minimum(x, y))


@pytest.mark.parametrize("offset", [1, 2, 4, 8, 16])
def test_butterfly_shuffle(offset: int, rng: np.random.Generator) -> None:
    x = integers(rng, np.uint32)
    got = run(f"shfl.sync.bfly.b32 %d, %a0, {offset}, 31, -1;", [x], "u32")
    np.testing.assert_array_equal(got, x[np.arange(64) ^ offset])


def test_redux_reduces_each_warp(rng: np.random.Generator) -> None:
    x = integers(rng, np.int32)
    got = run("redux.sync.max.s32 %d, %a0, -1;", [x], "s32")
    np.testing.assert_array_equal(got, np.repeat(x.reshape(2, 32).max(1), 32))


def test_an_unknown_opcode_is_refused_by_name(rng: np.random.Generator) -> None:
    with pytest.raises(PtxError, match=r"opcode not known: frobnicate\.b32"):
        run("frobnicate.b32 %d, %a0;", [integers(rng, np.uint32)], "u32")


@pytest.mark.parametrize(
    "text, message",
    [
        ("add.s64 %q, %q, 1; ld.global.u32 %d, [%q];", "misaligned 4-byte"),
        ("add.s64 %q, %q, 4096; ld.global.u32 %d, [%q];", "outside every allocation"),
        ("ld.param.u64 %q, [p1]; ld.global.u32 %d, [%q];", "uninitialised global"),
        ("setp.lt.u32 %p, %t, 7; @%p redux.sync.max.s32 %d, %a0, -1;", "part of a warp"),
    ],
)
def test_faults_name_kernel_block_and_line(
    text: str, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(PtxError, match=rf"k block \(0, 0, 0\) thread \d+ line \d+: .*{message}"):
        run(text, [integers(rng, np.uint32)], "u32")
