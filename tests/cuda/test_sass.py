"""What the compiler made of the kernels, held against the table of docs/kernels.md."""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from ..ptx.cutlass import SOURCE as CUTLASS
from ..ptx.nvcc import compiled as compiled_anywhere
from .ptx_sender import CSRC, NVCC, compiled

DOCS = CSRC.parent / "docs" / "kernels.md"


def _tool(name: str) -> str | None:
    """nvcc's disassemblers from the toolkit or from pip."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    if found is None and spec is not None:
        for folder in spec.submodule_search_locations or ():
            found = found or next(map(str, Path(folder).glob(f"*/bin/{name}")), None)
    return found


CUOBJDUMP, NVDISASM = _tool("cuobjdump"), _tool("nvdisasm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH to compile csrc"),
    pytest.mark.skipif(
        CUOBJDUMP is None or NVDISASM is None,
        reason="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm to read machine code",
    ),
]


class Promise(NamedTuple):
    """A row of the table."""

    pattern: str
    arch: str
    registers: int
    instructions: tuple[str, ...]


def promises() -> list[Promise]:
    rows = []
    for line in DOCS.read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 4 and cells[1].startswith("sm_") and cells[2].isdigit():
            words = tuple(re.findall(r"`([^`]+)`", cells[3]))
            rows.append(Promise(cells[0].strip("`"), cells[1], int(cells[2]), words))
    return rows


class Code(NamedTuple):
    """Figures and instructions of one kernel."""

    registers: int
    stack: int
    local: int
    instructions: list[str]


@functools.cache
def kernels(arch: str) -> dict[str, Code]:
    """All kernels of csrc, compiled for `arch`."""
    assert CUOBJDUMP is not None and NVDISASM is not None
    made: dict[str, Code] = {}
    for source in sorted(CSRC.glob("*.cu")):
        if "sm90" in source.stem and arch != "sm_90a":
            continue
        cubin = compiled(source.name, arch, "cubin")
        usage = _run(CUOBJDUMP, "--dump-resource-usage", str(cubin))
        bodies = re.split(r"^\.text\.", _run(NVDISASM, "-c", str(cubin)), flags=re.M)[1:]
        text = {body.split(":")[0]: body for body in bodies}
        for name, figures in re.findall(r"Function (\w+):\s*\n\s*(.+)", usage):
            number = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", figures)}
            code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text[name])
            made[name] = Code(number["REG"], number["STACK"], number["LOCAL"], code)
    return made


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_kernel_is_in_the_table() -> None:
    patterns = {p.pattern for p in promises()}
    assert patterns
    for name in kernels("sm_80") | kernels("sm_90a"):
        short = name.removeprefix("masked_lora_").removesuffix("_kernel")
        assert any(fnmatch.fnmatchcase(short, p) for p in patterns), name


@pytest.mark.parametrize("promise", promises(), ids=lambda p: f"{p.arch}-{p.pattern}")
def test_machine_code_keeps_the_promise(promise: Promise) -> None:
    names = [
        name
        for name in kernels(promise.arch)
        if fnmatch.fnmatchcase(name, f"masked_lora_{promise.pattern}_kernel")
    ]
    assert names, "no kernel has this name"
    for name in names:
        code = kernels(promise.arch)[name]
        assert code.registers <= promise.registers, name
        assert code.stack == 0 and code.local == 0, f"{name} spills"
        assert not [i for i in code.instructions if re.search(r"\b(LDL|STL)\b", i)], name
        for wanted in promise.instructions:
            assert any(fnmatch.fnmatchcase(i, f"*{wanted}*") for i in code.instructions), (
                f"{name} has no {wanted}"
            )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_no_more_than_forty_kernels_of_an_arch(arch: str) -> None:
    """Sources named sm90 are built for sm_90a alone, the others for every arch."""
    own = kernels("sm_90a" if arch == "sm_90a" else "sm_80")
    assert 0 < len(own) <= 40


def loops(cubin: Path) -> dict[str, list[list[str]]]:
    """Every loop of every kernel: the instructions from a label to a jump back to it."""
    assert NVDISASM is not None
    found: dict[str, list[list[str]]] = {}
    for body in re.split(r"^\.text\.", _run(NVDISASM, "-c", str(cubin)), flags=re.M)[1:]:
        own = found.setdefault(body.split(":")[0], [])
        labels: dict[str, int] = {}
        code: list[str] = []
        for line in body.splitlines():
            if match := re.match(r"\s*(\.L_x_\d+):", line):
                labels[match.group(1)] = len(code)
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(match.group(1))
                jump = re.search(r"BRA.*?(\.L_x_\d+)", code[-1])
                if jump and jump.group(1) in labels:
                    own.append(code[labels[jump.group(1)] :])
    return found


def main_loop(found: list[list[str]], words: dict[str, int]) -> list[str]:
    """The shortest loop that has so many instructions that contain each word."""
    return min(
        (c for c in found if all(sum(w in i for i in c) == n for w, n in words.items())), key=len
    )


def cutlass(source: str, arch: str, *flags: str) -> list[list[str]]:
    """The loops of tests/cuda/kernels/<source>, one CUTLASS kernel."""
    path = Path(__file__).with_name("kernels") / source
    include = [f"-I{CUTLASS / p}" for p in ("include", "tools/util/include")]  # type: ignore[operator]
    cubin = compiled_anywhere(
        path, arch, ["-cubin", "-w", "-DNDEBUG", "--expt-relaxed-constexpr", *flags, *include],
        "cubin",
    )  # fmt: skip
    (found,) = loops(cubin).values()
    return found


needs_cutlass = pytest.mark.skipif(
    CUTLASS is None,
    reason="pip install --no-deps nvidia-cutlass to compile its kernels beside ours",
)


@needs_cutlass
@pytest.mark.parametrize("along_n", [False, True], ids=["nk", "kn"])
def test_main_loop_of_sm80_against_cutlass(along_n: bool) -> None:
    """Everything in the loop of 32 products: copies, fragments, addresses, barrier."""
    fragments = "LDSM.16.MT88.4" if along_n else "LDSM.16.M88.4"
    words = {"HMMA.16816": 32, "LDGSTS": 4, "LDSM": 12, fragments: 4 if along_n else 12}
    theirs = len(main_loop(cutlass("cutlass_sm80.cu", "sm_80", f"-DALONG_N={along_n:d}"), words))
    for name, found in loops(compiled("gemm_128.cu", "sm_80", "cubin")).items():
        assert len(main_loop(found, words)) <= 1.1 * theirs, name


@needs_cutlass
@pytest.mark.parametrize("along_n", [False, True], ids=["nk", "kn"])
def test_main_loop_of_sm90a_against_cutlass(along_n: bool) -> None:
    """Everything in the loop of four products: barriers, descriptors, products, waiting."""
    words = {"HGMMA.64x256x16": 4}
    flags = (f"-DALONG_N={along_n:d}", "-DCOLUMNS=256")
    theirs = len(main_loop(cutlass("cutlass_sm90.cu", "sm_90a", *flags), words))
    order = "sm90kn" if along_n else "sm90nk"
    ours = {
        name: found
        for source in ("gemm_sm90.cu", "onepass_sm90.cu", "persistent_sm90.cu")
        for name, found in loops(compiled(source, "sm_90a", "cubin")).items()
        if (order in name and "_128_" not in name) or "onepass" in name
    }
    assert len(ours) == 2 + 8 + 2
    for name, found in ours.items():
        assert len(main_loop(found, words)) <= 1.1 * theirs, name
