"""What one Triton makes of every kernel: loads, copies, registers and stack, without a GPU.

    python -m tests.triton.survey rows.json            the thinned survey
    python -m tests.triton.survey rows.json --whole    every case
    python -m tests.triton.survey rows.json --arch 80 --use "tail forward"

The backend's own entries are called with tensors of real sizes on the CPU and a driver that
launches nothing, so what is compiled and read is what its launchers truly pick. A binary that
several cases share is one row. `versions.py` runs this in an environment for each Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from alora_kernels.activation import Activation
from alora_kernels.backends.triton import target
from alora_kernels.backends.triton.backend import TritonBackend
from alora_kernels.backends.triton.configs import MAX_ONEPASS_RANK
from alora_kernels.contract import DEFAULTS, Call, Needs, Projection, saved_columns

from .compile_only import Compiled, compile_only

ARCHS = (80, 86, 89, 90, 100, 120)
ROWS = (1, 16, 256, 4096)
RANKS = (8, 16, 24, 32, 64)
# x and weight, then the adapter: PEFT keeps float32 adapters over a 16-bit base.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32),
}
K = N = 4096
# M and R of the thinned survey: every tile of the tables and every kind of rank.
THIN = ((16, 8), (16, 16), (16, 64), (256, 8), (256, 64), (4096, 16), (4096, 24))
THIN_DROPOUT = ((16, 8), (256, 64), (4096, 16))
# Every M for which binaries are counted: all small ones, then as many as there are tiles.
COUNTED_ROWS = (*range(1, 513), *range(513, 9001, 37))

STRATEGIES = ("tail", "onepass", "delta")
USES = tuple(f"{s} {way}" for s in STRATEGIES for way in ("forward", "backward")) + tuple(
    f"{use}, dropout"
    for use in ("tail forward", "tail backward", "onepass backward", "delta backward")
)


@dataclass(frozen=True)
class Case:
    """One call of the backend."""

    arch: int
    use: str
    dtype: str
    rows: int
    rank: int

    def __str__(self) -> str:
        return f"{self.use}, {self.dtype}, M={self.rows}, R={self.rank}"

    def run(self) -> None:
        """Calls the backend; meant for `compile_only`, where nothing is launched."""
        strategy, way = self.use.split(",")[0].split()
        dtype, adapter = DTYPES[self.dtype]
        x, y = torch.empty(self.rows, K, dtype=dtype), torch.empty(self.rows, N, dtype=dtype)
        # With `delta` the base is another's: its product would be computed here, on the CPU.
        weight = None if strategy == "delta" else torch.empty(N, K, dtype=dtype)
        bias = None if strategy == "delta" else torch.empty(N, dtype=dtype)
        layer = Projection(
            weight, bias, torch.empty(self.rank, K, dtype=adapter),
            torch.empty(N, self.rank, dtype=adapter), None,
        )  # fmt: skip
        call = Call(Activation.all(self.rows), (1.0,))
        if "dropout" in self.use:
            options = DEFAULTS._replace(dropout_p=0.1)
            call = call._replace(options=options, seed=torch.zeros(1, dtype=torch.int64))
        backend = TritonBackend()
        if way == "forward":
            backend.forward(call, strategy, x, [layer], [y] if weight is None else None, True)
            return
        saved = torch.empty(self.rows, saved_columns([self.rank])[1], dtype=dtype)
        needs = Needs(True, (True,), (True,), (False,))
        backend.backward(call, strategy, x, [layer], saved, [y], needs)


def cases(arch: int, whole: bool) -> list[Case]:
    """What is compiled for an arch. Thinned, every pair of M and R has one of the dtypes."""
    found = []
    for use in USES:
        pairs = THIN_DROPOUT if "dropout" in use else THIN
        thin = [(dtype, *pair) for dtype, pair in zip(itertools.cycle(DTYPES), pairs)]
        sizes = itertools.product(DTYPES, ROWS, RANKS) if whole else thin
        found += [Case(arch, use, *size) for size in sizes]
    return [c for c in found if "onepass" not in c.use or c.rank <= MAX_ONEPASS_RANK]


@dataclass
class Row:
    """One binary: what the compiler made of it, and the cases that reach it."""

    triton: str
    arch: int
    kernel: str
    registers: int
    stack: int  # bytes of stack and local memory: spills among them
    shared: int
    loops: list[dict[str, int]]  # the main loops: narrow loads, loads, copies
    cases: list[str] = field(default_factory=list)

    def narrow(self) -> int:
        return sum(loop["narrow"] for loop in self.loops)

    def copies(self) -> int:
        return sum(loop["copies"] for loop in self.loops)

    def faults(self) -> list[str]:
        """The gates that this binary fails."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        for loop in self.loops:
            if loop["narrow"]:
                found.append(f"{loop['narrow']} loads of 8 or 16 bits in a main loop")
            # The R steps of expand_add are too few for a pipeline.
            if not loop["copies"] and self.kernel != "expand_add":
                found.append("a main loop without cp.async or TMA")
        return found


LOAD = re.compile(r"\bld\.global[\w.:]*?\.[busf](8|16|32|64|128)\b")
COPY = re.compile(r"\bcp\.async\.(?:c[ag]|bulk\.tensor)\b[\w.:]*")
MULTIPLY = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
LABEL = re.compile(r"^\s*(\$\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")


def main_loops(ptx: str) -> list[dict[str, int]]:
    """The innermost loops that multiply matrices: what each loads and copies in one step.

    Where warps have roles of their own, one loop multiplies what another copied.
    """
    bodies = innermost(ptx, MULTIPLY)
    feeding = sum(len(COPY.findall(b)) for b in innermost(ptx, COPY) if not MULTIPLY.search(b))
    found = []
    for body in bodies:
        loads = list(LOAD.finditer(body))
        copies = len(COPY.findall(body))
        narrow = [m for m in loads if int(m[1]) <= 16 and ".v" not in m[0]]
        if not loads and not copies:
            copies = feeding
        found.append({"narrow": len(narrow), "loads": len(loads), "copies": copies})
    return found


def innermost(ptx: str, what: re.Pattern[str]) -> list[str]:
    """The loops that contain `what`, without those around them."""
    lines = ptx.splitlines()
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        if label := LABEL.match(line):
            labels[label[1]] = number
        elif (branch := BRANCH.search(line)) and branch[1] in labels:
            begin = labels[branch[1]]
            if any(what.search(line) for line in lines[begin : number + 1]):
                loops.append((begin, number))
    return [
        "\n".join(lines[begin : end + 1])
        for begin, end in loops
        if not any((a, b) != (begin, end) and begin <= a and b <= end for a, b in loops)
    ]


def short(kernel: Compiled) -> str:
    return kernel.name.removeprefix("masked_lora_").removesuffix("_kernel")


def row_of(kernel: Compiled) -> Row:
    usage = kernel.usage()
    return Row(
        triton.__version__,
        kernel.arch,
        short(kernel),
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        kernel.shared,
        main_loops(kernel.ptx),
    )


def knows(arch: int) -> bool:
    """Whether an assembler of this Triton names the arch."""
    tools = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")
    return any(f"sm_{arch}" in _help(tool) for tool in tools)


@functools.cache
def _help(tool: Path) -> str:
    return subprocess.run([tool, "--help"], capture_output=True, text=True, check=True).stdout


def compile_cases(wanted: Iterable[Case]) -> Iterator[tuple[Case, Compiled]]:
    for case in wanted:
        with compile_only(case.arch) as kernels:
            case.run()
        for kernel in kernels:
            yield case, kernel


def survey_part(part: list[Case]) -> list[dict[str, Any]]:
    """The rows of some cases of one arch, each with the gates that it fails."""
    rows: dict[str, Row] = {}
    for case, kernel in compile_cases(part):
        digest = hashlib.sha256(kernel.cubin).hexdigest()
        if digest not in rows:
            rows[digest] = row_of(kernel)
        if str(case) not in rows[digest].cases:
            rows[digest].cases.append(str(case))
    return [dataclasses.asdict(row) | {"faults": row.faults()} for row in rows.values()]


def count_part(arch: int) -> dict[str, int]:
    """How many binaries of each kernel the forward passes of COUNTED_ROWS need."""
    found: dict[str, int] = {}
    for strategy in ("tail", "onepass"):
        with compile_only(arch) as kernels:
            for rows in COUNTED_ROWS:
                Case(arch, f"{strategy} forward", "bf16", rows, 16).run()
        for kernel in kernels:
            name = f"{short(kernel)}, {strategy}"
            found[name] = found.get(name, 0) + 1
    return found


def sources() -> str:
    """A digest of what a result depends on beside its cases."""
    here = Path(__file__).resolve()
    kernels = Path(target.__file__).resolve().parent
    files = [*sorted(kernels.glob("*.py")), here, here.with_name("compile_only.py")]
    text = b"".join(f.read_bytes() for f in files)
    return hashlib.sha256(text + triton.__version__.encode()).hexdigest()


def cached(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """`make()`, kept in the folder under what it was made of."""
    file = folder / f"{hashlib.sha256((sources() + name).encode()).hexdigest()[:24]}.json"
    if not file.exists():
        result = make()
        file.write_text(json.dumps(result))
    return json.loads(file.read_text())


def work(job: tuple[int, list[Case], Path]) -> tuple[int, dict[str, int], list[dict[str, Any]]]:
    """One arch, in a process of its own: a Triton may keep what it learned of another."""
    arch, wanted, folder = job
    target.processors = lambda device: 132  # an H100's
    rows = []
    for dtype in DTYPES:
        part = [c for c in wanted if c.dtype == dtype]
        rows += cached(folder, "\n".join(map(repr, part)), lambda part=part: survey_part(part))
    return arch, cached(folder, f"count {arch}", lambda: count_part(arch)), rows


def survey(archs: Iterable[int], uses: Iterable[str], whole: bool, folder: Path) -> dict[str, Any]:
    """Every row, and the number of binaries, by two processes."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (arch, [c for c in cases(arch, whole) if c.use in uses], folder)
        for arch in filter(knows, archs)
    ]
    rows: list[dict[str, Any]] = []
    counts: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for arch, counted, found in pool.imap_unordered(work, jobs):
            counts[str(arch)] = counted
            rows += found
    rows.sort(key=lambda row: (row["arch"], row["kernel"], row["cases"]))
    return {"triton": triton.__version__, "rows": rows, "binaries": counts}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("out", type=Path, help="where the rows go, as JSON")
    p.add_argument("--whole", action="store_true", help="every case instead of a thinned choice")
    p.add_argument("--arch", type=int, action="append", choices=ARCHS)
    p.add_argument("--use", action="append", choices=USES)
    p.add_argument("--cache", type=Path, default=Path(".venv") / "survey")
    o = p.parse_args()
    result = survey(o.arch or ARCHS, o.use or USES, o.whole, o.cache.resolve())
    o.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
