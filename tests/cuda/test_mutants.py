"""The tests can fail: each seeded fault in a kernel is found, by interpreter or reference."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from ..ptx import PtxError
from .cases import Case, run
from .ptx_sender import CSRC

pytestmark = [pytest.mark.ptx, pytest.mark.slow, pytest.mark.usefixtures("poisoned")]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    case: Case
    found: str  # what the error says


TAIL = Case("tail", m=40, k=200, n=136, r=16)
HOPPER = Case("tail", m=130, k=72, n=136, r=16, arch="sm_90a", machine=1)
# Three blocks, nine tiles, two narrow ones before them.
FUSED = Case("tail", m=300, k=72, n=520, r=16, active="half_tile", arch="sm_90a", machine=3)
ONEPASS = Case("onepass", m=130, k=264, n=400, r=64, arch="sm_90a", machine=1, adapter="fp32")
ONE_PASS_OVER_DY = Case("delta", m=130, k=8, n=264, r=9, active="all", machine=3)
DECODE = Case("onepass", m=4, k=1032, n=72, r=16, machine=4)

MUTANTS = [
    Mutant("adds up shares that are still being written", "grad_b.cu",
           "if (step > 0) add_shares(step - 1);\n      multiply_step(step);",
           "multiply_step(step);\n      add_shares(step);", ONE_PASS_OVER_DY, "race"),
    Mutant("leaves shares where nobody reads them", "grad_b.cu",
           "shares + (step % 2 * kWarps + warp)", "shares + warp", ONE_PASS_OVER_DY, ""),
    Mutant("takes the rows of another stage", "grad_b.cu",
           "find_rows(step + 1);", "find_rows(step);", ONE_PASS_OVER_DY, "error"),
    Mutant("reads a stage too early", "gemm.cuh",
           "      wait_copies<kStages - 2>();\n      __syncthreads();\n      if (kLayout",
           "      wait_copies<kStages - 1>();\n      __syncthreads();\n      if (kLayout",
           TAIL, "has not been waited for"),
    Mutant("overwrites a stage in use", "gemm.cuh",
           "      wait_copies<kStages - 2>();\n      __syncthreads();\n      if (kLayout",
           "      wait_copies<kStages - 2>();\n      if (kLayout", TAIL, "race"),
    Mutant("reads low of inactive rows", "gemm_operands.cuh", "is_active(row) && r < columns",
           "m0 + row < p.m && r < columns", TAIL, "y has NaN"),
    Mutant("hands a stage back before its products end", "gemm_sm90.cuh",
           "      wgmma_commit();\n      wgmma_wait<0>(acc);\n      release(ring.stage);",
           "      wgmma_commit();\n      release(ring.stage);\n      wgmma_wait<0>(acc);",
           Case("tail", m=130, k=600, n=136, r=16, arch="sm_90a", machine=1), "race"),
    Mutant("stores a tile without the proxy fence", "gemm_sm90.cuh",
           "      fence_async_proxy();\n      sync_some<128>(2 + group);",
           "      sync_some<128>(2 + group);", HOPPER, "proxy"),
    Mutant("overwrites the last piece of the tile before", "gemm_sm90.cuh",
           "wait_tiles_read<0>();  // that", "wait_tiles_read<1>();  // that", ONEPASS, "race"),
    Mutant("takes a stage for whole when its copies landed", "onepass_sm90.cuh",
           "        barrier_wait(whole(second.stage), second.round);",
           "        barrier_wait(full(ring.stage), ring.round);", ONEPASS, ""),
    Mutant("converts without the proxy fence", "onepass_sm90.cuh",
           "      fence_async_proxy();\n      barrier_arrive(whole(",
           "      barrier_arrive(whole(", ONEPASS, "proxy"),
    Mutant("writes down's columns before the block they overlap has landed", "onepass_sm90.cuh",
           "      barrier_wait(full(behind.stage), behind.round);\n", "",
           dataclasses.replace(ONEPASS, layout="weight_t", r=24), "race"),
    Mutant("lets inactive rows keep low", "onepass_sm90.cuh",
           "const uint32_t two = on ? pack", "const uint32_t two = true ? pack", ONEPASS, "y"),
    Mutant("reads parts before they are there", "decode.cu",
           "    if (!last) return;\n", "", DECODE, ""),
    Mutant("leaves the counter as it is", "decode.cu",
           "    if (tid == 0) p.arrived[blockIdx.x] = 0;\n", "", DECODE, "counter"),
    Mutant("reads low before shrink has ended", "gemm_sm90.cuh",
           '    asm volatile("griddepcontrol.wait;" ::: "memory");\n', "",
           dataclasses.replace(HOPPER, count=2), "before griddepcontrol.wait"),
    Mutant("sets the flag without a release", "flags.cuh",
           "red.release.gpu", "red.relaxed.gpu", FUSED, "global race"),
    Mutant("sets the flag before the warpgroup has met", "persistent_sm90.cuh",
           "    sync_some<128>(2 + group);\n    if (threadIdx.x % 128 == 0) release_add",
           "    if (threadIdx.x % 128 == 0) release_add", FUSED, "global race"),
    Mutant("reads the flag without an acquire", "persistent_sm90.cuh",
           "        fence_acquire();\n", "", FUSED, "global race"),
    Mutant("does not wait for the flag", "persistent_sm90.cuh",
           "& 0xFFFF) != kConsumers * chunks", "& 0xFFFF) > kConsumers * chunks", FUSED,
           "global race"),
    Mutant("copies low without a proxy fence", "persistent_sm90.cuh",
           "        fence_async_proxy_global();\n      });", "      });", FUSED, "no proxy fence"),
    Mutant("fences shared memory alone", "flags.cuh",
           '"fence.proxy.async.global;"', '"fence.proxy.async.shared::cta;"', FUSED,
           "no proxy fence"),
    Mutant("leaves the flag set", "persistent_sm90.cuh",
           " store_relaxed(ready, 0);", " {}", FUSED, "a counter was not set back"),
    Mutant("counts its readers one short", "persistent_sm90.cuh",
           "== this->tiles_n - 1)", "== this->tiles_n - 2)", FUSED, "deadlock"),
    Mutant("makes a narrow tile too few", "persistent_sm90.cuh",
           "bitmap[kWords] = blocks;", "bitmap[kWords] = blocks - 1;", FUSED, "deadlock"),
    Mutant("makes a narrow tile too many", "persistent_sm90.cuh",
           "bitmap[kWords] = blocks;", "bitmap[kWords] = blocks + 1;", FUSED, ""),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_is_found(mutant: Mutant, tmp_path: Path, seed: int) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / mutant.file).read_text()
    assert text.count(mutant.old) == 1, "the mutant no longer applies"
    (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    for source in csrc.glob("*.cu"):  # the cases are bfloat16: the other half is not compiled
        source.write_text(re.sub(r"^ALORA_\w+\(fp16\b.*\)\n", "", source.read_text(), flags=re.M))
    with pytest.raises((PtxError, AssertionError)) as caught:
        sender = run(mutant.case, seed, backward=mutant.file == "grad_b.cu", csrc=csrc)
        sender.assert_counters_are_zero()
    assert mutant.found in str(caught.value)
