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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_more_than_forty_kernels_of_an_arch_beside_hoppers_own(arch: str) -> None:
    assert len([n for n in kernels(arch) if "sm90" not in n]) <= 40


@pytest.mark.parametrize("short", ["bf16_nk", "bf16_kn", "fp16_nk", "fp16_kn"])
def test_the_main_loop_is_tight(short: str) -> None:
    """Everything in the loop of 32 products: copies, fragments, addresses, barrier."""
    body = _loop(f"masked_lora_gemm_{short}_128_tail_kernel", "HMMA.16816", 32)
    assert sum("HMMA.16816" in i for i in body) == 32
    assert sum("LDGSTS" in i for i in body) == 4 and sum("LDSM" in i for i in body) == 12
    assert len(body) <= 4 * 32


def _loop(kernel: str, word: str, count: int) -> list[str]:
    """The shortest loop with at least `count` instructions that contain `word`."""
    assert NVDISASM is not None
    source = "gemm_nk.cu" if "_nk_" in kernel else "gemm_kn.cu"
    text = _run(NVDISASM, "-c", str(compiled(source, "sm_80", "cubin")))
    body = next(b for b in re.split(r"^\.text\.", text, flags=re.M) if b.startswith(kernel + ":"))
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[list[str]] = []
    for line in body.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match.group(1)] = len(code)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(match.group(1))
            jump = re.search(r"BRA.*?(\.L_x_\d+)", code[-1])
            if jump and jump.group(1) in labels:
                loops.append(code[labels[jump.group(1)] :])
    return min((c for c in loops if sum(word in i for i in c) >= count), key=len)
