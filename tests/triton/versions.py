"""Surveys every Triton that a supported PyTorch brings, in an environment for each.

    python -m tests.triton.versions                     all, thinned: the table, then what fails
    python -m tests.triton.versions 3.6.0 --arch 90     some
    python -m tests.triton.versions --whole             every case: hours

An environment pins its Triton and borrows all else from the one that runs this, as in matrix.py.
Environments, compiled kernels and results lie in ALORA_TRITON_ENVS, else in the user's cache;
a rerun compiles only what changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..matrix import ROOT, make

VERSIONS = ("3.2.0", "3.4.0", "3.6.0", "3.7.1", "3.9.0")
# The most binaries for lengths from 1 to 9000: of shrink whole and in splits, of gemm one for each
# tile of its table (M up to 16, up to 256, more).
MOST_BINARIES = {"shrink": 2, "gemm": 3}
KERNELS = ("gemm", "shrink", "expand_add", "grad", "grad_b", "reduce")


def cache() -> Path:
    given = os.environ.get("ALORA_TRITON_ENVS")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alora_kernels"


def environment(version: str) -> Path:
    """The Python of the environment with this Triton; made unless it is there already."""
    pins = (f"triton=={version}",)
    digest = hashlib.sha256("\n".join((*pins, sys.prefix, sys.version)).encode()).hexdigest()
    folder = cache() / f"triton-{version}-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return make(folder, pins)


def survey(version: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What `survey.py` finds with this Triton."""
    python = environment(version)
    folder = python.parents[1]
    out = folder / "rows.json"
    subprocess.run(
        [python, "-m", "tests.triton.survey", out, "--cache", folder / "survey", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "compiled")},
        check=True,
    )
    return dict(json.loads(out.read_text()))


def faults(result: dict[str, Any]) -> list[str]:
    """A line for each gate that a binary or an arch fails."""
    found = []
    for row in result["rows"]:
        for fault in row["faults"]:
            where = f"Triton {result['triton']} sm_{row['arch']} {row['kernel']}"
            more = f" and {len(row['cases']) - 1} more" if len(row["cases"]) > 1 else ""
            found.append(f"{where}: {fault} ({row['cases'][0]}{more})")
    for arch, counts in result["binaries"].items():
        for name, number in counts.items():
            most = MOST_BINARIES.get(name.split(",")[0], number)
            if number > most:
                where = f"Triton {result['triton']} sm_{arch} {name}"
                found.append(f"{where}: {number} binaries, at most {most} are expected")
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line for each version and arch. A kernel's cell is the worst of its binaries:
    loads of 8 or 16 bits in a main loop · main loops without copies · registers · stack.
    """
    lines = [
        f"| Triton | arch | {' | '.join(KERNELS)} | gates that fail |",
        "|---" * (len(KERNELS) + 3) + "|",
    ]
    for result in results:
        for arch in sorted({row["arch"] for row in result["rows"]}):
            rows = [row for row in result["rows"] if row["arch"] == arch]
            cells = [cell([row for row in rows if row["kernel"] == name]) for name in KERNELS]
            failing = sum(f" sm_{arch} " in line for line in faults(result))
            cells = [result["triton"], f"sm_{arch}", *cells, str(failing)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "–"
    loops = [loop for row in rows for loop in row["loops"]]
    numbers = (
        max((loop["narrow"] for loop in loops), default=0),
        sum(not loop["copies"] for loop in loops),
        max(row["registers"] for row in rows),
        max(row["stack"] for row in rows),
    )
    return " · ".join(map(str, numbers))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    p.add_argument("--whole", action="store_true")
    p.add_argument("--arch", action="append", default=[])
    o = p.parse_args()
    arguments = ["--whole"] * o.whole + [w for arch in o.arch for w in ("--arch", arch)]
    results = []
    for version in o.versions or VERSIONS:
        print(f"Triton {version} …", file=sys.stderr, flush=True)
        results.append(survey(version, arguments))
    print(table(results))
    found = [line for result in results for line in faults(result)]
    print(f"\n{len(found)} gates fail", *found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
