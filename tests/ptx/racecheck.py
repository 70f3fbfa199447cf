"""Happens-before: a vector clock a warp, an epoch a granule of shared or a byte of global memory.

Agents of a cluster (a block, without clusters) are its warps and, as pseudo-agents, whatever reads
or writes shared memory on its own: the wgmma unit of each warpgroup, the bulk-store reader of each
warp and each mbarrier (whose copies write). An access is ordered when the accessing warp's clock
has seen the epoch of every conflicting one; barriers, mbarriers and flags pass clocks on.

Every clock has parts: what is known; what is known *and* lies behind a proxy fence for shared or
for global memory, where an access through the async proxy must find ordinary writes; and, when
blocks order each other through global memory, what lies behind a memory fence (a relaxed flag
passes on that alone) and what relaxed reads of flags have shown (the next fence makes it known).
Fences are cumulative, as on hardware: what a warp has fenced, another may publish after a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .formats import GBASE

SEEN, FENCED, FENCED_GLOBAL, PUBLISHED, PENDING = 0, 1, 2, 3, 4
MBARRIERS = 64  # pseudo-agents for mbarriers of one block; more of them share


class Clocks:
    """The clocks `[row, part, column]` of the warps of a wave; a row is slot * warps + warp.

    Columns: the agents of the row's own cluster, then (when blocks synchronise through global
    memory) every warp of the grid.
    """

    def __init__(
        self, numbers: np.ndarray, warps: int, cluster: int, total_blocks: int, between: bool
    ) -> None:
        blocks = len(numbers)
        self.warps, self.cluster, self.between = warps, cluster, between
        self.groups = groups = max(1, warps // 4)
        self.wgmma = cluster * warps
        self.bulk = self.wgmma + cluster * groups
        self.readers = self.bulk + cluster * warps  # agents that can read shared memory
        self.mbarriers = self.readers
        self.local = self.readers + cluster * MBARRIERS
        self.columns = self.local + (total_blocks * warps if between else 0)
        self.parts = 5 if between else 3
        self.clock = np.zeros((blocks * warps, self.parts, self.columns), np.int32)
        slot = np.repeat(np.arange(blocks), warps)
        warp = np.tile(np.arange(warps), blocks)
        self.own = slot % cluster * warps + warp
        self.agent = numbers[slot] * warps + warp  # in the whole grid
        self.sync = np.zeros(blocks * warps, np.int32)  # warp-level synchronisations so far
        self.rows = np.arange(blocks * warps)
        self.bump(self.rows)

    def bump(self, rows: np.ndarray) -> None:
        """Begin the next epoch of `rows`."""
        self.clock[rows, SEEN, self.own[rows]] += 1
        if self.between:
            column = self.local + self.agent[rows]
            self.clock[rows, SEEN, column] = self.clock[rows, SEEN, self.own[rows]]

    def epoch(self, rows: np.ndarray) -> np.ndarray:
        return self.clock[rows, SEEN, self.own[rows]]

    def fresh(self) -> np.ndarray:
        """A clock that has seen nothing: the state of a new barrier."""
        return np.zeros((self.parts, self.columns), np.int32)

    def release(self, rows: np.ndarray, into: np.ndarray) -> None:
        """Pass on all that `rows` have done, and start their next epochs."""
        np.maximum(into, self.clock[rows].max(0), out=into)
        self.bump(rows)

    def acquire(self, rows: np.ndarray, clock: np.ndarray) -> None:
        """`rows` have now seen everything that was released into `clock`."""
        self.clock[rows] = np.maximum(self.clock[rows], clock)
        self.sync[rows] += 1

    def meet(self, slots: np.ndarray) -> None:
        """All warps of each block meet at a barrier."""
        shape = (-1, self.warps, self.parts, self.columns)
        per_block = self.clock.reshape(shape)
        per_block[slots] = per_block[slots].max(1, keepdims=True)
        rows = (slots[:, None] * self.warps + np.arange(self.warps)).reshape(-1)
        self.bump(rows)
        self.sync[rows] += 1

    def proxy_fence(self, rows: np.ndarray, parts: Sequence[int]) -> None:
        """What `rows` know is now visible to the async proxy too, in the memories of `parts`."""
        for part in parts:
            self.clock[rows, part] = np.maximum(self.clock[rows, part], self.clock[rows, SEEN])
        self.bump(rows)

    def memory_fence(self, rows: np.ndarray) -> None:
        """A fence of `rows`: flags they have read are acquired, flags they write now release."""
        if self.between:
            clock = self.clock[rows]
            clock[:, SEEN] = np.maximum(clock[:, SEEN], clock[:, PENDING])
            clock[:, PUBLISHED] = np.maximum(clock[:, PUBLISHED], clock[:, SEEN])
            self.clock[rows] = clock
        self.bump(rows)

    def show(self, row: int, clock: np.ndarray) -> None:
        """A relaxed read of a flag at which `clock` was released."""
        self.clock[row, PENDING] = np.maximum(self.clock[row, PENDING], clock[SEEN])

    def published(self, row: int) -> np.ndarray:
        """What a relaxed write of a flag by `row` passes on."""
        clock = self.fresh()
        clock[SEEN] = self.clock[row, PUBLISHED]
        return clock

    def learn(self, rows: np.ndarray, column: int, epoch: int) -> None:
        """`rows` have waited for the pseudo-agent `column` up to `epoch`."""
        self.clock[rows, SEEN, column] = np.maximum(self.clock[rows, SEEN, column], epoch)


class SharedRaces:
    """Epochs over the shared memory of a wave, by granules of `grain` bytes."""

    def __init__(self, clocks: Clocks, size: int, grain: int) -> None:
        self.c, self.grain = clocks, grain
        count = size // grain
        self.writer = np.zeros(count, np.int32)  # column
        self.written = np.zeros(count, np.int32)  # epoch; 0: never
        self.lane = np.full(count, -1, np.int16)  # lane that wrote; -1: an async copy
        self.sync = np.zeros(count, np.int32)  # warp synchronisations of the writer by then
        self.reads = np.zeros((clocks.readers, count), np.int32)
        self.read_lane = np.full(count, -1, np.int16)
        self.read_sync = np.zeros(count, np.int32)
        self.seen_readers: set[int] = set()

    def read(
        self, at: np.ndarray, rows: np.ndarray, lanes: np.ndarray | None,
        agent: np.ndarray | None = None, epoch: np.ndarray | None = None,
    ) -> tuple[int, str] | None:  # fmt: skip
        """Record reads of granules `at` by `rows`; (index, conflict) of the first race found.

        `lanes` None: through the async proxy, as `agent` in its `epoch`.
        """
        c = self.c
        writer, written = self.writer[at], self.written[at]
        racing = c.clock[rows, SEEN, writer] < written
        found = None
        if racing.any():
            found = self._tell("read", racing, at, rows, writer)
        elif lanes is None:
            racing = (c.clock[rows, FENCED, writer] < written) & (writer < c.wgmma)
            if racing.any():
                i = int(np.argmax(racing))
                found = (i, f"no proxy fence between the write by {self.name(int(writer[i]))} and "
                            "this read through the async proxy")  # fmt: skip
        else:
            inside = (writer == c.own[rows]) & (written > 0) & (self.lane[at] >= 0)
            inside &= (self.lane[at] != lanes) & (self.sync[at] == c.sync[rows])
            if inside.any():
                i = int(np.argmax(inside))
                found = (i, f"shared-memory race within a warp: read of what lane "
                            f"{int(self.lane[at[i]])} wrote without a warp barrier")  # fmt: skip
        if agent is None or epoch is None:
            agent, epoch = c.own[rows], c.epoch(rows)
        self.reads[agent, at] = epoch
        self.seen_readers.update(np.unique(agent).tolist())
        if lanes is not None:
            self.read_lane[at], self.read_sync[at] = lanes, c.sync[rows]
        return found

    def write(
        self, at: np.ndarray, rows: np.ndarray, lanes: np.ndarray | None, changes: np.ndarray,
        agent: int = -1, epoch: int = 0,
    ) -> tuple[int, str] | None:  # fmt: skip
        """Record writes; `changes` is false where the granule already holds what is written."""
        c = self.c
        writer = self.writer[at]
        racing = (c.clock[rows, SEEN, writer] < self.written[at]) & changes
        found = self._tell("write", racing, at, rows, writer) if racing.any() else None
        if found is None:
            for a in self.seen_readers:
                late = (self.reads[a, at] > c.clock[rows, SEEN, a]) & changes
                if late.any():
                    found = self._tell("write", late, at, rows, np.full(len(at), a))
                    break
        if found is None and lanes is not None:
            own = c.own[rows]
            # Written or read by another lane of this warp since the warp last met.
            inside = (writer == own) & (self.lane[at] >= 0) & (self.lane[at] != lanes)
            inside &= (self.sync[at] == c.sync[rows]) & (self.written[at] > 0)
            after = self.reads[np.minimum(own, c.readers - 1), at] == c.epoch(rows)
            after &= (self.read_lane[at] != lanes) & (self.read_sync[at] == c.sync[rows])
            inside = (inside | after) & changes
            if inside.any():
                i = int(np.argmax(inside))
                found = (i, "shared-memory race within a warp: write of what another lane "
                            "accessed, without a warp barrier")  # fmt: skip
        self.record(at, rows, lanes, agent, epoch)
        return found

    def record(
        self, at: np.ndarray, rows: np.ndarray, lanes: np.ndarray | None, agent: int = -1,
        epoch: int = 0,
    ) -> None:  # fmt: skip
        """Note who wrote last, without a check."""
        c = self.c
        if agent < 0:
            self.writer[at], self.written[at] = c.own[rows], c.epoch(rows)
        else:
            self.writer[at], self.written[at] = agent, epoch
        self.lane[at] = -1 if lanes is None else lanes
        self.sync[at] = c.sync[rows]

    def name(self, column: int) -> str:
        """An agent in words."""
        c = self.c
        if column < c.wgmma:
            return f"warp {column % c.warps}"
        if column < c.bulk:
            return f"wgmma of warpgroup {(column - c.wgmma) % c.groups}"
        if column < c.readers:
            return f"the bulk store of warp {(column - c.bulk) % c.warps}"
        return "an async copy"

    def _tell(
        self, what: str, racing: np.ndarray, at: np.ndarray, rows: np.ndarray, other: np.ndarray
    ) -> tuple[int, str]:
        i = int(np.argmax(racing))
        who = f"warp {int(rows[i]) % self.c.warps}"
        return i, (
            f"shared-memory race: {what} by {who} is not ordered after an access by "
            f"{self.name(int(other[i]))}"
        )


class GlobalRaces:
    """Epochs over global memory for one launch; agents are the warps of the grid."""

    def __init__(self, size: int, grain: int, warps: int) -> None:
        self.grain, self.warps = grain, warps
        count = -(-size // grain)
        self.writer = np.zeros(count, np.int32)  # agent + 1
        self.written = np.zeros(count, np.int32)
        self.atomic = np.zeros(count, np.bool_)
        self.bulk = np.zeros(count, np.bool_)  # written through the async proxy
        # The last reader, and one of another block than that.
        self.reader = np.zeros((2, count), np.int32)
        self.read_at = np.zeros((2, count), np.int32)
        self.flags: dict[int, tuple[int, np.ndarray]] = {}  # what was released at an address

    def _late(
        self, c: Clocks, rows: np.ndarray, who: np.ndarray, when: np.ndarray, part: int = SEEN
    ) -> np.ndarray:
        """Accesses (agent + 1, epoch) that `rows` have not seen, or not behind a proxy fence."""
        there = np.nonzero(who)[0]
        out = np.zeros(len(who), np.bool_)
        if not len(there):
            return out
        agent, rows, when = who[there] - 1, rows[there], when[there]
        same = agent // self.warps == c.agent[rows] // self.warps
        mine = c.own[rows] // c.warps * c.warps + agent % self.warps
        seen = c.clock[rows, part, np.where(same, mine, 0)]
        if c.between:
            # Of a warp of this block too: a flag that another block has added to passes on no more.
            passed = c.clock[rows, part, c.local + agent]
            seen = np.where(same, np.maximum(seen, passed), passed)
        else:
            seen = np.where(same, seen, 0)
        out[there] = seen < when
        return out

    def access(
        self, c: Clocks, at: np.ndarray, rows: np.ndarray, write: bool, atomic: bool,
        changes: np.ndarray | None = None, bulk: bool = False,
    ) -> tuple[int, str] | None:  # fmt: skip
        """Record accesses to granules `at`; (index, conflict) of the first race found.

        `bulk`: through the async proxy.
        """
        late = self._late(c, rows, self.writer[at], self.written[at])
        unfenced = False
        if bulk and not write and not late.any():
            late = self._late(c, rows, self.writer[at], self.written[at], FENCED_GLOBAL)
            late &= ~self.bulk[at]
            unfenced = bool(late.any())
        if atomic:
            late &= ~self.atomic[at]
        other = self.writer[at]
        if write and not late.any():
            for i in range(2):
                racing = self._late(c, rows, self.reader[i][at], self.read_at[i][at])
                if racing.any():
                    late, other = racing, self.reader[i][at]
                    break
        if changes is not None:
            late &= changes
        agent, epoch = c.agent[rows] + 1, c.epoch(rows)
        if write:
            self.writer[at], self.written[at], self.atomic[at] = agent, epoch, atomic
            self.bulk[at] = bulk
        elif not atomic:
            last = self.reader[0][at]
            moved = (last != 0) & ((last - 1) // self.warps != (agent - 1) // self.warps)
            if moved.any():
                self.reader[1][at[moved]] = last[moved]
                self.read_at[1][at[moved]] = self.read_at[0][at[moved]]
            self.reader[0][at], self.read_at[0][at] = agent, epoch
        if not late.any():
            return None
        i = int(np.argmax(late))
        block, warp = divmod(int(other[i]) - 1, self.warps)
        if block == int(c.agent[rows[i]]) // self.warps:
            who = f"warp {warp} of this block"
        else:
            who = f"another block (number {block})"
        if unfenced:
            return i, f"no proxy fence between the write by {who} and this read by a bulk copy"
        what = "write of what" if write else "read of what"
        return i, f"global race: {what} {who} accessed, without any ordering in between"

    def publish(self, c: Clocks, row: int, address: int, clock: np.ndarray) -> None:
        """Add `clock` to what is released at a flag."""
        cluster = int(c.agent[row]) // self.warps // c.cluster
        there = self.flags.get(address)
        if there is None:
            self.flags[address] = (cluster, clock.copy())
            return
        merged = np.maximum(there[1], clock)
        if there[0] != cluster:  # local columns mean other agents there
            merged[:, : c.local] = clock[:, : c.local]
        self.flags[address] = (cluster, merged)

    def observe(self, c: Clocks, row: int, address: int) -> np.ndarray | None:
        """What a read of the flag at `address` may acquire."""
        there = self.flags.get(address)
        if there is None:
            return None
        if there[0] == int(c.agent[row]) // self.warps // c.cluster:
            return there[1]
        clock = there[1].copy()
        clock[:, : c.local] = 0
        return clock


def global_address(index: int) -> int:
    """The generic address of a byte of the arena."""
    return GBASE + index
