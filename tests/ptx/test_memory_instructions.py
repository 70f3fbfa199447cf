"""Memory, atomics, fragments and checks, one instruction at a time, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from . import Machine, Module, PtxError
from .formats import bf16_to_f32, f32_to_bf16

HEAD = """.visible .entry k(.param .u64 a, .param .u64 b)
{
.reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<24>; .reg .f32 %f<16>; .reg .b64 %d<8>;
.shared .align 128 .b8 buffer[4096];
mov.u32 %r0, %tid.x; ld.param.u64 %d0, [a]; ld.param.u64 %d1, [b];
mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
mov.u32 %r1, buffer; mad.lo.s32 %r2, %r0, 4, %r1;
"""


def run(
    body: str, a: np.ndarray, out: tuple[int, ...], dtype: type, threads: int = 32
) -> np.ndarray:
    """Run `body` with %d3 and %d4 at the thread's word of `a` and of the output."""
    gpu = Machine(1 << 20)
    result = gpu.empty(out, dtype)
    gpu.launch(Module(HEAD + body + "\nret;\n}\n"), "k", (1,), threads, [gpu.put(a), result])
    return gpu.get(result)


@pytest.mark.parametrize(
    "op, fn",
    [
        ("add.u32", np.add),
        ("max.s32", np.maximum),
        ("min.u32", np.minimum),
        ("or.b32", np.bitwise_or),
    ],
)
def test_atomics_serialise_a_warp(op: str, fn: np.ufunc, rng: np.random.Generator) -> None:
    kind = np.int32 if "s32" in op else np.uint32
    x = rng.integers(0, 1 << 20, 33).astype(kind)
    gpu = Machine(1 << 20)
    cell, out = gpu.put(x[:1]), gpu.empty((32,), kind)
    body = f"ld.param.u64 %d5, [c]; ld.global.u32 %r3, [%d3]; atom.global.{op} %r4, [%d5], %r3;"
    head = HEAD.replace(".param .u64 b)", ".param .u64 b, .param .u64 c)")
    module = Module(head + body + "st.global.u32 [%d4], %r4;\nret;\n}\n")
    gpu.launch(module, "k", (1,), 32, [gpu.put(x[1:]), out, cell])
    running = fn.accumulate(x)
    np.testing.assert_array_equal(gpu.get(out), running[:-1])
    assert gpu.get(cell)[0] == running[-1]


def test_compare_and_swap_lets_one_thread_win() -> None:
    x = np.zeros(32, np.uint32)
    body = """add.u32 %r3, %r0, 7; atom.global.cas.b32 %r4, [%d0], 0, %r3;
st.global.u32 [%d4], %r4;"""
    np.testing.assert_array_equal(run(body, x, (32,), np.uint32), [0] + [7] * 31)


def test_packed_bf16_reduction_rounds_each_half(rng: np.random.Generator) -> None:
    x = f32_to_bf16(rng.standard_normal(64).astype(np.float32))
    body = """ld.global.u32 %r3, [%d3]; st.global.u32 [%d4], 0;
red.global.add.noftz.bf16x2 [%d4], %r3; red.global.add.noftz.bf16x2 [%d4], %r3;"""
    got = run(body, x.view(np.uint32), (32,), np.uint32).view(np.uint16)
    np.testing.assert_array_equal(got, f32_to_bf16(2 * bf16_to_f32(x)))


@pytest.mark.parametrize("vector, words", [("v2", 2), ("v4", 4)])
def test_vector_access_keeps_the_order(vector: str, words: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, 1 << 31, 32 * words).astype(np.uint32)
    regs = ", ".join(f"%r{4 + i}" for i in range(words))
    back = ", ".join(f"%r{4 + i}" for i in reversed(range(words)))
    body = f"""mul.wide.u32 %d2, %r0, {4 * words}; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
ld.global.{vector}.b32 {{{regs}}}, [%d3]; st.global.{vector}.b32 [%d4], {{{back}}};"""
    got = run(body, x, (32 * words,), np.uint32)
    np.testing.assert_array_equal(got.reshape(32, words), x.reshape(32, words)[:, ::-1])


def test_signed_bytes_are_extended(rng: np.random.Generator) -> None:
    x = rng.integers(-128, 128, 32).astype(np.int8)
    body = """cvt.u64.u32 %d5, %r0; add.s64 %d3, %d0, %d5; ld.global.s8 %r3, [%d3];
st.global.u32 [%d4], %r3;"""
    np.testing.assert_array_equal(run(body, x, (32,), np.int32), x)


def test_votes_matches_and_election(rng: np.random.Generator) -> None:
    x = rng.integers(0, 3, 32).astype(np.uint32)
    body = """ld.global.u32 %r3, [%d3]; setp.eq.u32 %p0, %r3, 1;
vote.sync.ballot.b32 %r4, %p0, -1; match.any.sync.b32 %r5, %r3, -1; elect.sync %r6|%p1, -1;
selp.u32 %r7, 1, 0, %p1; shl.b32 %r7, %r7, 31; xor.b32 %r4, %r4, %r5; xor.b32 %r4, %r4, %r7;
st.global.u32 [%d4], %r4;"""
    bits = 1 << np.arange(32, dtype=np.uint64)
    same = ((x[:, None] == x[None, :]) * bits).sum(1)
    expected = ((x == 1) * bits).sum() ^ same ^ (np.arange(32) == 0) * np.uint64(1 << 31)
    np.testing.assert_array_equal(run(body, x, (32,), np.uint32), expected.astype(np.uint32))


@pytest.mark.parametrize("op, kind", [("popc", "u32"), ("or", "pred"), ("and", "pred")])
def test_a_reducing_barrier_counts_the_block(op: str, kind: str, rng: np.random.Generator) -> None:
    for x in (rng.integers(0, 2, 96), np.zeros(96), np.ones(96)):
        out = "%r4" if kind == "u32" else "%p1"
        body = f"""ld.global.u32 %r3, [%d3]; setp.ne.u32 %p0, %r3, 0;
bar.red.{op}.{kind} {out}, 0, %p0; {"" if kind == "u32" else "selp.u32 %r4, 1, 0, %p1;"}
st.global.u32 [%d4], %r4;"""
        expected = {"popc": x.sum(), "or": x.any(), "and": x.all()}[op]
        got = run(body, x.astype(np.uint32), (96,), np.uint32, threads=96)
        np.testing.assert_array_equal(got, np.full(96, expected, np.uint32))


def test_mma_fragments_lie_as_the_isa_draws_them(rng: np.random.Generator) -> None:
    a, b = (f32_to_bf16(rng.standard_normal(s).astype(np.float32)) for s in ((16, 16), (16, 8)))
    # Figures of mma.m16n8k16: thread t holds rows t / 4 (+ 8), columns 2 (t % 4) + {0, 1} (+ 8).
    lane = np.arange(32)
    g, t = lane // 4, lane % 4 * 2
    fa = [a[g + r, t + c + e] for c in (0, 8) for r in (0, 8) for e in (0, 1)]
    fb = [b[t + k + e, g] for k in (0, 8) for e in (0, 1)]
    packed = np.stack(fa + fb, 1).astype(np.uint16).view(np.uint32)  # [32, 6]
    body = """mul.wide.u32 %d2, %r0, 24; add.s64 %d3, %d0, %d2;
ld.global.v2.b32 {%r4, %r5}, [%d3]; ld.global.v2.b32 {%r6, %r7}, [%d3+8];
ld.global.v2.b32 {%r8, %r9}, [%d3+16]; mov.f32 %f0, 0f00000000;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4},
  {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%f0, %f0, %f0, %f0};
mul.wide.u32 %d2, %r0, 16; add.s64 %d4, %d1, %d2; st.global.v4.f32 [%d4], {%f1, %f2, %f3, %f4};"""
    got = run(body, np.ascontiguousarray(packed), (32, 4), np.float32)
    exact = bf16_to_f32(a).astype(np.float64) @ bf16_to_f32(b)
    drawn = np.stack([exact[g + r, t + e] for r in (0, 8) for e in (0, 1)], 1)
    np.testing.assert_allclose(got, drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", ["", ".trans"])
def test_ldmatrix_gives_each_lane_two_elements(turned: str, rng: np.random.Generator) -> None:
    x = rng.integers(0, 1 << 16, (8, 8)).astype(np.uint16)
    body = f"""ld.global.u32 %r3, [%d3]; st.shared.u32 [%r2], %r3; bar.warp.sync -1;
and.b32 %r4, %r0, 7; mad.lo.s32 %r4, %r4, 16, %r1;
ldmatrix.sync.aligned.m8n8.x1{turned}.shared.b16 {{%r5}}, [%r4]; st.global.u32 [%d4], %r5;"""
    got = run(body, x.reshape(-1).view(np.uint32), (32,), np.uint32).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(got, x.T if turned else x)


def test_cp_async_fills_with_zeros_past_its_source(rng: np.random.Generator) -> None:
    x = rng.integers(1, 1 << 31, 32).astype(np.uint32)
    body = """setp.lt.u32 %p0, %r0, 20; selp.u32 %r3, 4, 0, %p0;
cp.async.ca.shared.global [%r2], [%d3], 4, %r3; cp.async.wait_all;
ld.shared.u32 %r4, [%r2]; st.global.u32 [%d4], %r4;"""
    np.testing.assert_array_equal(
        run(body, x, (32,), np.uint32), np.where(np.arange(32) < 20, x, 0)
    )


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("swizzle", [0, 3])
def test_tensor_copy_of_any_rank(rank: int, swizzle: int, rng: np.random.Generator) -> None:
    """A box that hangs over the edge: zeros outside, the swizzle as the ISA defines it."""
    dims, box = (72, 3, 4, 2, 3)[:rank], (64, 2, 2, 1, 2)[:rank]
    start = (16, 2, 1, 1, 2)[:rank]
    x = rng.integers(1, 1 << 16, dims[::-1]).astype(np.uint16)
    gpu = Machine(1 << 21)
    source, out = gpu.put(x), gpu.empty((int(np.prod(box)),), np.uint16)
    strides = [2 * int(np.prod(dims[: i + 1])) for i in range(rank - 1)]
    text = f"""
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 out)
{{
.reg .pred %p; .reg .b32 %r<8>; .reg .b64 %d<8>;
.shared .align 1024 .b8 buffer[2048]; .shared .align 8 .b8 bar[8];
mov.b64 %d0, map; ld.param.u64 %d1, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, buffer;
mov.u32 %r2, bar; setp.eq.u32 %p, %r0, 0;
@%p mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
@%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {2 * int(np.prod(box))};
@%p cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
  [%r1], [%d0, {{{", ".join(map(str, start))}}}], [%r2];
again: mbarrier.try_wait.parity.shared::cta.b64 %p, [%r2], 0; @!%p bra again;
loop: shl.b32 %r4, %r0, 2; setp.ge.u32 %p, %r4, {2 * int(np.prod(box))}; @%p bra done;
add.u32 %r5, %r1, %r4; ld.shared.u32 %r6, [%r5]; cvt.u64.u32 %d2, %r4; add.s64 %d2, %d2, %d1;
st.global.u32 [%d2], %r6; add.u32 %r0, %r0, 32; bra loop;
done: ret;
}}"""
    raw = gpu.tensor_map(source, dims, strides, box, 2, swizzle)
    gpu.launch(Module(text), "k", (1,), 32, [raw, out])
    whole = np.zeros([d + 64 for d in dims[::-1]], np.uint16)
    whole[tuple(slice(0, d) for d in dims[::-1])] = x
    at = tuple(slice(s, s + b) for s, b in zip(start[::-1], box[::-1]))
    flat = whole[at].reshape(-1)
    place = 2 * np.arange(len(flat))
    if swizzle:  # 16-byte chunks of a 128-byte row, exclusive-or with the row's number
        place ^= (place >> 7 & 7) << 4
    expected = np.zeros_like(flat)
    expected[place // 2] = flat
    np.testing.assert_array_equal(gpu.get(out), expected)


@pytest.mark.parametrize(
    "body, message",
    [
        ("st.global.u32 [%d4], %r9;", "register %r9, which was never written"),
        ("setp.lt.u32 %p0, %r0, 9; @%p0 mov.u32 %r3, 1; st.global.u32 [%d4], %r3;",
         "register %r3, which this thread never wrote"),
        ("ld.shared.u32 %r3, [%r2];", "uninitialised shared"),
        ("ld.shared.u32 %r3, [%r1+4096];", "out of bounds shared"),
        ("st.shared.u32 [%r1], %r0;", "two threads write different values"),
        ("atom.global.add.u32 %r3, [%d0+4096], 1;", "bytes behind one"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r1];", "no mbarrier was initialised"),
        ("setmaxnreg.dec.sync.aligned.u32 20;", "setmaxnreg of 20"),
        ("bar.sync 1, 64;", "deadlock: barrier 1 of block .*32 of 64"),
    ],
)  # fmt: skip
def test_faults(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message) as caught:
        run(body, np.zeros(32, np.uint32), (32,), np.uint32)
    assert caught.value.kernel == "k" and caught.value.line


def test_use_of_a_freed_buffer() -> None:
    gpu = Machine(1 << 20)
    x, y = gpu.put(np.zeros(32, np.uint32)), gpu.empty((32,), np.uint32)
    gpu.free(x)
    with pytest.raises(PtxError, match="use of a freed buffer"):
        gpu.launch(Module(HEAD + "ld.global.u32 %r3, [%d3];\nret;\n}\n"), "k", (1,), 32, [x, y])


def test_blocks_that_are_not_resident_cannot_be_waited_for() -> None:
    body = """mov.u32 %r3, %ctaid.x; setp.ne.u32 %p0, %r3, 0; @%p0 bra set;
again: ld.acquire.gpu.global.u32 %r4, [%d0]; setp.eq.u32 %p1, %r4, 0; @%p1 bra again; bra out;
set: st.release.gpu.global.u32 [%d0], 1; out: ret;
}"""
    for resident, good in ((2, True), (1, False)):
        gpu = Machine(1 << 20)
        args = [gpu.put(np.zeros(32, np.uint32)), 0]
        if good:
            gpu.launch(Module(HEAD + body), "k", (2,), 32, args, resident=resident)
        else:
            with pytest.raises(PtxError, match="polls a flag that no one sets"):
                gpu.launch(Module(HEAD + body), "k", (2,), 32, args, resident=resident)
