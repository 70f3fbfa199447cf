"""The boundary to C++: what a launch carries, by name, and the extension where it is built."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import alora_kernels
from alora_kernels.activation import Activation
from alora_kernels.backends.cuda import CudaBackend
from alora_kernels.backends.cuda.params import MAP, STRUCTS, exported
from alora_kernels.backends.cuda.steps import Address, Packed
from alora_kernels.contract import DEFAULTS, Call, Needs, Problem, Projection

from .stub import COUNTERS, STREAM, Extension, filled

M, K, N, R = 130, 72, 136, 24  # nothing is as large as something else
R16 = 32


class Layer:
    """One layer's tensors, each in memory of its own."""

    def __init__(self, rows: int = M, k: int = K) -> None:
        self.tensors = {
            "x": torch.randn(rows, k).bfloat16(),
            "weight": torch.randn(N, k).bfloat16(),
            "bias": torch.randn(N).bfloat16(),
            "lora_a": torch.randn(R, k).bfloat16(),
            "lora_b": torch.randn(N, R).bfloat16(),
            "lora_bias": torch.randn(N).bfloat16(),
            "dy": torch.randn(rows, N).bfloat16(),
            "seed": torch.tensor([7]),
        }
        self.activation = Activation.from_offsets([rows // 2], rows)

    def run(self, backend: CudaBackend, strategy: str, dropout_p: float, save: bool) -> None:
        """Forward, and backward with `save`; the results join the tensors."""
        t, act = self.tensors, self.activation
        names = ("row_adapter", "active_rows", "active_count")
        t.update({name: getattr(act, name) for name in names})
        call = Call(
            act, (1.5,), DEFAULTS._replace(dropout_p=dropout_p), t["seed"] if dropout_p else None
        )
        p = Projection(t["weight"], t["bias"], t["lora_a"], t["lora_b"], t["lora_bias"])
        (t["y"],), xa = backend.forward(call, strategy, t["x"], [p], None, save)
        if save:
            assert xa is not None
            t["xa"] = xa
            needs = Needs(True, (True,), (True,), (False,))
            grads = backend.backward(call, strategy, t["x"], [p], xa, [t["dy"]], needs)
            assert grads.x is not None
            t["dx"], (t["da"],), (t["db"],) = grads.x, grads.lora_a, grads.lora_b  # type: ignore[assignment]

    def named(self, fields: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
        """The fields, with the names of tensors for addresses and maps; "scratch" for the rest."""
        names = {t.data_ptr(): name for name, t in self.tensors.items()} | {COUNTERS: "counters"}
        shown = {}
        for name, value in fields.items():
            if kinds[name].kind is MAP:
                shown[name] = names.get(value[0], "scratch") if value else None
            elif kinds[name].kind.letter == "P":
                shown[name] = names.get(value, "scratch") if value else None
            else:
                shown[name] = value
        return shown


SIZES = {"m": M, "n": N, "k": K, "r": R}
ACTIVE = {"active_rows": "active_rows", "active_count": "active_count"}
BASE = {"bias": "bias", "lora_bias": "lora_bias", "row_adapter": "row_adapter", "out_m": N}
SHRINK = {
    "left": "x", "out": "xa", **ACTIVE, "seed": None, "left_m": K, "left_k": 1, "right_r": K,
    "right_k": 1, "out_m": R16, "k": K, "blocks": 2, "columns[0].right": "lora_a",
    "columns[0].valid": 16, "columns[0].scale": 1.5, "columns[1].right": "scratch",
    "columns[1].valid": 8, "columns[1].scale": 1.5, "columns[2].right": None,
    "columns[2].valid": 0,
}  # fmt: skip
UP = {"up_r": 1, "up_n": R}  # lora_b turned
HOPPER = {
    "left": "x", "right": "weight", "up": "lora_b", "out": "y", "up_values": "lora_b",
    "out_values": "y", "seed": None, **BASE, **UP, **SIZES, "lora_bias_scale": 1.5,
}  # fmt: skip
HOPPER_DX = {
    **HOPPER, "left": "dy", "right": "weight", "up": "lora_a", "out": "dx", "up_values": "lora_a",
    "out_values": "dx", "bias": None, "lora_bias": None, "up_r": K, "up_n": 1, "out_m": K, "n": K,
    "k": N, "lora_bias_scale": 1.0,
}  # fmt: skip
DOWN = {"down": "lora_a", "down_values": "lora_a", "down_r": K, "down_k": 1, "scale": 1.5}
DOWN_DX = {"down_values": "lora_b", "down_r": 1, "down_k": R, "scale": 1.5}


def inside(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"gemm.{name}": value for name, value in fields.items()}


GEMM = {
    "left": "x", "right": "weight", "low": "xa", "up": "lora_b", "down": None, "out": "y",
    "low_out": None, "seed": None, "left_m": K, "left_k": 1, "right_k": 1, "right_n": K,
    "low_m": R16, "down_r": 0, "down_k": 0, "low_out_m": 0, **BASE, **UP, **SIZES,
    "lora_bias_scale": 1.5,
}  # fmt: skip
GEMM_DX = {
    **GEMM, "left": "dy", "low": "scratch", "up": "lora_a", "out": "dx", "bias": None,
    "lora_bias": None, "left_m": N, "right_k": K, "right_n": 1, "up_r": K, "up_n": 1, "out_m": K,
    "n": K, "k": N, "lora_bias_scale": 1.0,
}  # fmt: skip
GRAD_A = {
    "wide": "x", "low": "scratch", "part": "scratch", **ACTIVE, "seed": None, "wide_m": K,
    "wide_p": 1, "low_m": R16, "p": K, "r16": R16,
}  # fmt: skip
REDUCE_A = {
    "part": "scratch", "out": "da", "active_rows": None, "active_count": "active_count",
    "out_p": 1, "out_r": K, "p": K, "r": R, "r16": R16, "splits": 0, "scale": 1.0,
}  # fmt: skip
GRAD_B = {
    "dy": "dy", "low": "xa", "up": "lora_b", "part": "scratch", "low_part": "scratch", **ACTIVE,
    "dy_m": N, "low_m": R16, "up_n": R, "up_r": 1, "n": N, "r": R, "r16": R16, "slots": M // 2,
}  # fmt: skip
GRAD_OF_B = {**GRAD_A, "wide": "dy", "low": "xa", "wide_m": N, "p": N}
REDUCE_B = {**REDUCE_A, "out": "db", "out_p": R, "out_r": 1, "p": N}
REDUCE_LOW = {
    **REDUCE_A, "out": "scratch", "active_rows": "active_rows", "out_p": R16, "out_r": 1,
    "p": M // 2, "r": R16, "split_rows": 0, "splits": 1, "scale": 1.5,
}  # fmt: skip
EXPAND = {
    "low": "xa", "up": "lora_b", "lora_bias": "lora_bias", "out": "y", **ACTIVE, "seed": None,
    "low_m": R16, **UP, "out_m": N, "out_n": 1, "n": N, "r": R, "lora_bias_scale": 1.5,
}  # fmt: skip
EXPAND_DX = {
    **EXPAND, "low": "scratch", "up": "lora_a", "lora_bias": None, "out": "dx", "up_r": K,
    "up_n": 1, "out_m": K, "n": K, "lora_bias_scale": 1.0,
}  # fmt: skip
GRADS = [("grad", GRAD_A), ("reduce", REDUCE_A)]
BOTH = [*GRADS, ("grad", GRAD_OF_B), ("reduce", REDUCE_B)]
LOW = [("grad_b", GRAD_B), ("reduce", REDUCE_B), ("reduce", REDUCE_LOW)]
# strategy, arch, multiprocessors: the launches of forward and backward.
WIRES: dict[tuple[str, int, int], list[tuple[str, dict[str, Any]]]] = {
    ("delta", 80, 2): [("shrink", SHRINK), ("expand", EXPAND), *LOW, ("expand", EXPAND_DX), *GRADS],
    ("tail", 80, 2): [("shrink", SHRINK), ("gemm", GEMM), *LOW, ("gemm", GEMM_DX), *GRADS],
    ("tail", 90, 2): [("fused", {**inside({**HOPPER, "low": "xa"}), **DOWN, **ACTIVE,
                                 "low_out": "xa", "low_m": R16, "ready": "counters"}),
                      ("fused", {**inside({**HOPPER_DX, "low": "scratch"}), **DOWN_DX, **ACTIVE,
                                 "down": "lora_b", "low_out": "scratch", "low_m": R16,
                                 "ready": "counters"}),
                      *BOTH],
    ("tail", 90, 4): [("shrink", SHRINK), ("gemm", {**HOPPER, "low": "xa"}), *LOW,
                      ("gemm", {**HOPPER_DX, "low": "scratch"}), *GRADS],
    ("onepass", 80, 2): [("gemm", {**GEMM, "low": None, "low_m": 0, "down": "lora_a",
                                   "low_out": "xa", "down_r": K, "down_k": 1, "low_out_m": R16,
                                   "scale": 1.5}),
                         ("gemm", {**GEMM_DX, "low": None, "low_m": 0, "down": "lora_b",
                                   "low_out": "scratch", "down_r": 1, "down_k": R,
                                   "low_out_m": R16, "scale": 1.5}),
                         *BOTH],
    ("onepass", 90, 2): [("onepass", {**inside({**HOPPER, "low": None}), **DOWN, "low_out": "xa",
                                      "low_m": R16}),
                         ("onepass", {**inside({**HOPPER_DX, "low": None}), **DOWN_DX,
                                      "low_out": "scratch", "low_m": R16}),
                         *BOTH],
}  # fmt: skip


@pytest.mark.parametrize("wires", WIRES, ids=str)
def test_every_field_holds_what_its_name_says(
    wires: tuple[str, int, int],
    extension: Extension,
) -> None:
    strategy, arch, multiprocessors = wires
    layer = Layer()
    layer.run(CudaBackend(machine=(multiprocessors, arch)), strategy, 0.0, save=True)
    for done, (word, wanted) in zip(extension.launches, WIRES[wires]):
        kinds = STRUCTS[done.packed.struct].fields
        assert word in done.packed.kernel and wanted.keys() <= kinds.keys()
        shown = layer.named(done.fields, kinds)
        assert {name: shown[name] for name in wanted} == wanted, done.packed.kernel
        assert shown.get("flags", shown.get("gemm.flags")) is not None
    kernels = [done.packed.kernel for done in extension.launches]
    assert len(kernels) == len(WIRES[wires]), kernels


def test_decode_and_dropout_hold_what_their_names_say(extension: Extension) -> None:
    layer = Layer(rows=3, k=1040)
    layer.run(CudaBackend(machine=(132, 80)), "onepass", 0.0, save=False)
    (done,) = extension.launches
    shown = layer.named(done.fields, STRUCTS["DecodeParams"].fields)
    assert shown["arrived"] == "counters" and shown["part"] == "scratch"
    wanted = {
        "left": "x", "weight": "weight", "bias": "bias", "up": "lora_b", "down": "lora_a",
        "lora_bias": "lora_bias", "out": "y", "row_adapter": "row_adapter", "left_m": 1040,
        "weight_n": 1040, "up_r": 1, "up_n": R, "down_r": 1040, "down_k": 1, "out_m": N, "m": 3,
        "n": N, "k": 1040, "r": R, "k_slice": 512, "scale": 1.5, "lora_bias_scale": 1.5,
    }  # fmt: skip
    assert {name: shown[name] for name in wanted} == wanted
    extension.launches = []
    layer = Layer()
    layer.run(CudaBackend(machine=(2, 80)), "tail", 0.5, save=True)
    seeds = [layer.named(d.fields, STRUCTS[d.packed.struct].fields).get("seed", "no such field")
             for d in extension.launches]  # fmt: skip
    # xa and dA read x as dropped; y and dya do not; dx is dropped.
    words = [d.packed.kernel.split("_")[2] for d in extension.launches]
    told = [(w, s) for w, s in zip(words, seeds) if s != "no such field"]
    assert told == [("shrink", "seed"), ("gemm", None), ("gemm", "seed"), ("grad", "seed")]


@pytest.mark.parametrize(
    "multiprocessors, kernels",
    [
        (1, ["fused_bf16_sm90nk"]),
        (4, ["shrink_bf16_vector_16", "gemm_bf16_sm90nk_128_tail"]),
    ],
)
def test_a_launch_carries_its_plan(
    multiprocessors: int,
    kernels: list[str],
    extension: Extension,
) -> None:
    layer = Layer()
    layer.run(CudaBackend(machine=(multiprocessors, 90)), "tail", 0.0, save=False)
    told = [done.packed for done in extension.launches]
    assert [p.kernel for p in told] == [f"masked_lora_{k}_kernel" for k in kernels]
    for p, done in zip(told, extension.launches):
        assert (p.dependent, p.cooperative) == ("gemm" in p.kernel, "fused" in p.kernel)
        assert done.stream == STREAM and p.block in (256, 384) and p.shared > 0
    at = layer.tensors
    maps = [m for m in extension.launches[-1].fields.values() if isinstance(m, tuple) and m]
    out = (at["y"].data_ptr(), True, N, M, 2 * N, 64, 64)
    assert (at["x"].data_ptr(), True, K, M, 2 * K, 64, 128) in maps and out in maps


def built() -> Any:
    return pytest.importorskip("alora_kernels._cuda", reason="the extension is not built here")


def any_packed(**changes: Any) -> Packed:
    """A launch of reduce, of three tensors."""
    fields = {name: (tensor, 0, 0) for tensor, name in enumerate(("part", "out", "active_count"))}
    addresses = [(STRUCTS["ReduceParams"].fields[n].offset, i, 4 * i)
                 for n, (i, _, _) in fields.items()]  # fmt: skip
    made = Packed(
        "masked_lora_reduce_bf16_kernel", (1, 2, 3), 256, 0, False, False, "ReduceParams",
        bytes(range(STRUCTS["ReduceParams"].size)), tuple([Address(*a) for a in addresses]), (), (),
    )  # fmt: skip
    return made._replace(**changes)


def test_the_extension_knows_the_kernels() -> None:
    names = built().kernel_names()
    assert len(set(names)) == len(names) and all(n.startswith("masked_lora_") for n in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "nothing"}, "no kernel is called nothing"),
        ({"data": bytes(2000)}, "2000 bytes of parameters, at most 1024"),
        ({"addresses": ()}, None),
    ],
)
def test_the_extension_refuses_what_it_does_not_know(
    changes: dict[str, Any], message: str | None
) -> None:
    made = lambda: built().Program([any_packed(**changes)], [-1, -1, -1])  # noqa: E731
    if message is None:
        made()
        return
    with pytest.raises(ValueError, match=message):
        made()


def test_the_extension_refuses_what_lies_outside() -> None:
    wide = any_packed(addresses=(Address(76, 0, 0),))
    with pytest.raises(ValueError, match="tensor 0 of 3 at byte 76 of 80"):
        built().Program([wide], [-1, -1, -1])
    with pytest.raises(ValueError, match="tensor 2 of 2"):
        built().Program([any_packed()], [-1, -1])
    program = built().Program([any_packed()], [-1, -1, -1])
    with pytest.raises(ValueError, match="2 addresses, the program has 3 tensors"):
        program([16, 32], 0, 0)
    with pytest.raises(ValueError, match=r"device 64 is outside 0\.\.63"):
        program([16, 32, 48], 64, 0)
    with pytest.raises(OverflowError):
        program([16, -32, 48], 0, 0)


def test_cpp_refuses_addresses_of_another_alignment() -> None:
    program = built().Program([any_packed()], [0, 2, -1])
    assert program([16, 32, 48], 0, 0) is False  # and launches nothing: no GPU is needed
    assert program.parameters([16, 32, 48]) == []
    assert len(program.parameters([16, 34, 41])) == 1


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
def test_cpp_fills_in_what_python_says(
    strategy: str,
    arch: int,
    extension: Extension,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Addresses, and what maps are encoded from, at other addresses than those of planning."""
    real = built_module()
    checked = []

    class Both:
        def __init__(self, launches: Any, residues: Any) -> None:
            self.launches, self.residues = launches, residues
            self.program = real.Program(launches, residues)

        def __call__(self, addresses: list[int], device: int, stream: int) -> bool:
            moved = [a + 4096 if a else 0 for a in addresses]
            for own, (name, data, maps) in zip(
                self.launches, self.program.parameters(moved), strict=True
            ):
                bare = own._replace(maps=(), counters=())
                assert name == own.kernel and data == filled(bare, moved)
                assert maps == [(m.offset, moved[m.tensor] + m.shift, *m[3:]) for m in own.maps]
                checked.append(name)
            return True

    monkeypatch.setattr(extension, "Program", Both)
    Layer().run(CudaBackend(machine=(2, arch)), strategy, 0.0, save=True)
    assert len(checked) >= 5


def built_module() -> Any:
    """The real module, whatever stands for it in this test."""
    stub = sys.modules.pop("alora_kernels._cuda", None)
    package = alora_kernels.__dict__.pop("_cuda", None)
    try:
        return built()
    finally:
        if stub is not None:
            sys.modules["alora_kernels._cuda"] = stub
            alora_kernels._cuda = package  # type: ignore[attr-defined]


def test_streams_and_graphs_have_counters_of_their_own() -> None:
    slabs: list[tuple[int, int]] = []

    def allocate(size: int) -> int:
        slabs.append((0x1000_0000 * (len(slabs) + 1), size))
        return slabs[-1][0]

    counters = built().Counters(allocate)
    assert slabs == [(0x1000_0000, 1 << 20)], "there is memory before anyone asks"
    taken: list[tuple[int, int]] = []  # begin, bytes that may be in use
    last: dict[tuple[int, int], int] = {}
    for words in (1, 64, 65, 300, 4096, 10, 2):
        for stream in range(20):
            for capture in range(10):
                at = counters.take(stream, capture, words)
                if at != last.get((stream, capture)):
                    taken.append((at, 4 * max(words, 64)))
                    last[stream, capture] = at
                else:
                    assert words != 65, "it needs more than it had"
    assert len(taken) == 200 * 4, "kernels of one stream share a slice that is large enough"
    taken.sort()
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(taken))
    for at, size in taken:
        assert any(begin <= at and at + size <= begin + all_ for begin, all_ in slabs)
    assert len(slabs) == 4 and {size for _, size in slabs} == {1 << 20}
    huge = counters.take(4, 0, 10**6)
    assert slabs[-1] == (huge, 4 << 20)


@pytest.mark.parametrize(
    "versions, reason",
    [
        ((0, 13000), "no NVIDIA driver is installed"),
        ((12040, 13000), "the driver supports CUDA 12.4, the kernels were built with 13.0"),
    ],
)
def test_why_not_here(
    versions: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(versions=lambda: versions, **exported())
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", fake, raising=False)
    from alora_kernels.backends.cuda.backend import _why_not_here

    assert reason in str(_why_not_here.__wrapped__())


def test_the_gpu_of_the_tensors_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an old GPU, the current device, and a new one."""
    fake = SimpleNamespace(versions=lambda: (13000, 13000), **exported())
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", fake, raising=False)
    from alora_kernels.backends.cuda import backend

    gpus = [(7, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: gpus[i])
    monkeypatch.setattr(backend, "build_report", lambda: {"archs": ["sm_80", "sm_90a"]})
    monkeypatch.setattr(backend, "_why_not_here", backend._why_not_here.__wrapped__)
    found = backend.CudaBackend()
    assert found.why_not_here() is None
    problem = Problem(8, 64, (64,), (16,), 8, torch.bfloat16, torch.bfloat16, "cuda")
    assert found.why_not(problem._replace(arch=90), "tail") is None
    assert "no kernel was built for sm_70" in str(found.why_not(problem._replace(arch=70), "tail"))
    gpus.pop()
    assert "no kernel was built for sm_70" in str(found.why_not_here())
