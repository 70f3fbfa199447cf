"""The device: global memory with its allocations, tensor maps, counters and the launch."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .counters import Counters
from .formats import GBASE, NP, WIDTH, PtxError
from .maps import TensorMap
from .memory import ORDERED, grain_of
from .parser import Kernel, Module
from .racecheck import GlobalRaces
from .registers import Ids, Launch
from .wave import Wave

GUARD = 1 << 16  # bytes behind every allocation that belong to nobody
PROCESSORS = 132  # blocks that run side by side at least, where blocks order each other
WAVE_THREADS = 8192  # threads that run side by side when the caller does not say how many blocks


class Machine:
    """Global memory of `arena` bytes (touched lazily) and everything counted while kernels run.

    `count` sums over all launches, `last` holds the latest; `on_launch` sees every finished one.
    """

    on_launch: Callable[[Machine], None] | None = None

    def __init__(self, arena: int = 1 << 28) -> None:
        self.mem = np.zeros(arena, np.uint8)
        self.ok = np.zeros(arena, np.bool_)  # inside an allocation
        self.init = np.zeros(arena, np.uint8)  # 1: written since it was allocated
        self.top = 4096
        self.allocs: dict[int, tuple[np.dtype, tuple[int, ...]]] = {}
        self.freed: list[tuple[int, int]] = []
        self.count: collections.Counter[str] = collections.Counter()
        self.last: collections.Counter[str] = collections.Counter()
        self.reports: list[Counters] = []  # one a launch
        self.races = GlobalRaces(0, 1, 1)
        self.variables: dict[Module, dict[str, int]] = {}
        self.grain, self.between, self.shared_init, self.dependent = 4, False, True, False

    # ---- memory -------------------------------------------------------------------------------

    def put(self, a: np.ndarray, poison: bool = False) -> int:
        """Device address of a copy of `a`; guard space follows every allocation."""
        a = np.ascontiguousarray(a)
        base, end = self.top, self.top + a.nbytes
        if end + GUARD > len(self.mem):
            raise MemoryError(f"the arena of {len(self.mem)} bytes is full: Machine(arena=...)")
        self.mem[base:end] = 0xFF if poison or not a.size else a.view(np.uint8).reshape(-1)
        self.ok[base:end] = True
        self.init[base:end] = not poison
        self.top = (end + GUARD + 511) // 512 * 512
        self.allocs[GBASE + base] = (a.dtype, a.shape)
        return GBASE + base

    def empty(self, shape: tuple[int, ...], dtype: Any) -> int:
        """Device address of fresh memory, poisoned: reading it before a write is an error."""
        return self.put(np.zeros(shape, dtype), poison=True)

    def free(self, addr: int) -> None:
        """Give the allocation back: any later access is a fault."""
        span = self._span(addr)
        self.ok[span] = False
        self.freed.append((span.start, span.stop))
        del self.allocs[addr]

    def why_outside(self, addr: int) -> str:
        """In words, what lies at an address that no allocation holds."""
        at = addr - GBASE
        if any(low <= at < high for low, high in self.freed):
            return "use of a freed buffer"
        for base, (dtype, shape) in self.allocs.items():
            end = base + int(np.prod(shape)) * dtype.itemsize
            if end <= addr < end + GUARD:
                return f"global access outside every allocation, {addr - end} bytes behind one"
            if base - 4096 <= addr < base:
                return f"global access outside every allocation, {base - addr} bytes before one"
        return "global access outside every allocation"

    def _span(self, addr: int) -> slice:
        dtype, shape = self.allocs[addr]
        return slice(addr - GBASE, addr - GBASE + int(np.prod(shape)) * dtype.itemsize)

    def get(self, addr: int) -> np.ndarray:
        """A copy of the allocation at `addr`, with the dtype and shape it was put with."""
        dtype, shape = self.allocs[addr]
        return self.mem[self._span(addr)].copy().view(dtype).reshape(shape)

    def unwritten(self, addr: int) -> int:
        """How many elements' worth of the allocation's bytes no one has written."""
        return int((self.init[self._span(addr)] != 1).sum()) // self.allocs[addr][0].itemsize

    def tensor_map(
        self,
        addr: int,
        dims: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        elem: int,
        swizzle: int = 0,
    ) -> np.ndarray:
        """A 128-byte tensor map: innermost dimension first, strides in bytes without the first.

        `swizzle` is 0..3 for none, 32, 64 and 128 bytes, as in CUtensorMapSwizzle.
        """
        t = TensorMap(addr, tuple(dims), tuple(strides), tuple(box), elem, swizzle)
        return t.encode()

    # ---- launch -------------------------------------------------------------------------------

    def launch(self, mod: Module, name: str, *args: Any, **options: Any) -> None:
        """Run a grid: `running` from beginning to end."""
        for _ in self.running(mod, name, *args, **options):
            pass

    def running(
        self,
        mod: Module,
        name: str,
        grid: Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        smem: int = 0,
        max_steps: int = 50_000_000,
        reverse: bool = False,
        cluster: Sequence[int] = (1, 1, 1),
        order: str = "lockstep",
        seed: int = 0,
        resident: int | None = None,
        shared_init: bool = True,
        dependent: bool = False,
    ) -> Iterator[None]:
        """Run the grid, yielding where another launch may go on.

        `args` follow the kernel's parameters: numbers, addresses or bytes.

        `resident` blocks run side by side, the rest after them; by default as many as make some
        thousands of threads, and no fewer than an H100 has processors where blocks wait for each
        other. `reverse` begins with the last block. `order` schedules warps: `lockstep` (all in
        step, fast), `round_robin`, `reverse` (the last warp first) or `random` with `seed`.
        `shared_init=False` lets threads read shared memory that nobody wrote, as some correct
        kernels do for rows that they never store. A `dependent` kernel may begin while the one
        before it runs: no thread touches global memory before its griddepcontrol.wait. Raises
        PtxError at the first fault. Races between two launches are not looked for, and `last`
        sums over both.
        """
        kernel = mod.kernels[name]
        if kernel.local:
            raise PtxError(f"{name}: local memory (a spilled or dynamically indexed array), "
                           f"{kernel.local}")  # fmt: skip
        grid3, block3, cluster3 = _triple(grid), _triple(block), _triple(cluster)
        params, offsets = _parameters(kernel, args)
        blocks = _blocks(grid3, cluster3)
        if not blocks:
            return
        per = int(np.prod(block3))
        group = int(np.prod(cluster3))
        self.shared_init, self.dependent = shared_init, dependent
        self.grain = grain_of(kernel.code, ("shared",), 16)
        if any(i.op[0] in ("mbarrier", "tensormap") for i in kernel.code):
            self.grain = min(self.grain, 8)
        if any(i.op[0] in ("ldmatrix", "stmatrix", "wgmma", "cp") for i in kernel.code):
            self.grain = min(self.grain, 16)
        self.between = group > 1 or any(_orders_blocks(i.op) for i in kernel.code)
        # Blocks that wait for each other run together as far as a GPU would hold them.
        together = PROCESSORS if self.between else 1
        side = resident or max(together, WAVE_THREADS // per)
        side = max(group, side // group * group)
        self.races = GlobalRaces(self.top, self._global_grain(kernel), max(1, per // 32))
        variables = self._variables(mod)
        launch = Launch(grid3, block3, cluster3, params, offsets, smem, variables)
        before = self.count.copy()
        counters = self.counters = Counters(kernel, self.count)
        counters.grid, counters.threads, counters.text = grid3, per, mod.header
        self.reports.append(counters)
        mine = (
            self.shared_init, self.dependent, self.grain, self.between, self.races, self.counters
        )  # fmt: skip
        waves = [blocks[i : i + side] for i in range(0, len(blocks), side)]
        rng = np.random.default_rng(seed)
        for wave in reversed(waves) if reverse else waves:
            run = Wave(self, kernel, launch, wave[::-1] if reverse and group == 1 else wave)
            counters.wave_warps = run.n // 32
            for _ in run.bursts(max_steps, order, rng):
                yield
                (
                    self.shared_init, self.dependent, self.grain, self.between, self.races,
                    self.counters,
                ) = mine  # fmt: skip
        self.last = self.count - before
        if Machine.on_launch is not None:
            Machine.on_launch(self)

    def _global_grain(self, kernel: Kernel) -> int:
        copies = any(i.op[0] == "cp" for i in kernel.code)
        return 1 if copies else grain_of(kernel.code, ("global",), 4)

    def _variables(self, mod: Module) -> dict[str, int]:
        """Module variables live in global memory from the module's first launch on."""
        if mod not in self.variables:
            self.variables[mod] = {
                name: self.put(np.frombuffer(v.data.ljust(max(1, v.size), b"\0"), np.uint8))
                for name, v in mod.variables.items()
            }
        return self.variables[mod]


def _orders_blocks(op: list[str]) -> bool:
    """Whether the opcode can order blocks: an atomic or a flag in global memory."""
    if any(q.startswith("shared") for q in op):
        return False
    return op[0] in ("atom", "red") or (op[0] in ("ld", "st") and not ORDERED.isdisjoint(op))


def _triple(v: int | Sequence[int]) -> Ids:
    x, y, z = ((v,) if isinstance(v, int) else (*v,)) + (1,) * (
        2 if isinstance(v, int) else 3 - len(v)
    )
    return int(x), int(y), int(z)


def _parameters(kernel: Kernel, args: Sequence[Any]) -> tuple[np.ndarray, dict[str, int]]:
    """The parameter space, each parameter at its natural alignment."""
    offsets: dict[str, int] = {}
    blob = bytearray()
    for i, (param, ty, size) in enumerate(kernel.params):
        natural = size if size else WIDTH[ty]
        align = 64 if natural >= 128 else min(8, natural)
        blob += bytes(-len(blob) % align)
        offsets[param] = len(blob)
        if i >= len(args):
            blob += bytes(size or WIDTH[ty])
        elif size:
            data = bytes(np.ascontiguousarray(args[i]).view(np.uint8))
            if len(data) != size:
                raise PtxError(f"{kernel.name}: {param} has {size} bytes, {len(data)} were given")
            blob += data
        elif ty[0] in "bus":
            blob += (int(args[i]) % (1 << 8 * WIDTH[ty])).to_bytes(WIDTH[ty], "little")
        else:
            blob += np.array([args[i]]).astype(NP[ty]).tobytes()
    return np.frombuffer(bytes(blob), np.uint8), offsets


def _blocks(grid: Ids, cluster: Ids) -> list[tuple[int, Ids]]:
    """(number, index) of every block, those of a cluster side by side."""
    if any(g % c for g, c in zip(grid, cluster)):
        raise PtxError(f"grid {grid} is no multiple of the cluster {cluster}")
    outer = [range(g // c) for g, c in zip(grid, cluster)]
    out: list[tuple[int, Ids]] = []
    for cz, cy, cx in itertools.product(*outer[::-1]):
        for z, y, x in itertools.product(*(range(c) for c in cluster[::-1])):
            at = (cx * cluster[0] + x, cy * cluster[1] + y, cz * cluster[2] + z)
            out.append((len(out), at))
    return out
