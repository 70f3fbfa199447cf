"""The one command for all benchmarks. docs/benchmark.md says what is measured, and how.

python bench/run.py                                     one layer of small models, two minutes
python bench/run.py --model Mistral-7B --active 0.1,0.5
python bench/run.py --csv out.csv --plot out.png
python bench/run.py --tune                              measure this GPU for dispatch
python bench/run.py --mode serve --help                 each mode has flags of its own
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

# Each mode is a module with `main(arguments) -> int`, imported when it is asked for.
MODES = {
    "layer": "bench.layer.command",
    "cpu-targets": "bench.layer.cpu_targets",
    "host": "bench.layer.host",
    "predict": "bench.layer.predict",
    "tune": "bench.layer.tune",
    "gpu-report": "bench.gpu_report.command",
    "decode": "bench.models.decode",
    "train": "bench.models.train",
    "serve": "bench.models.serve",
    "vllm": "bench.vllm.serving",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mode that is asked for; returns its exit status."""
    p = argparse.ArgumentParser(
        prog="bench/run.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument("--mode", choices=MODES, help="what to measure (default: layer)")
    p.add_argument("--tune", action="store_true", help="the same as --mode tune")
    chosen, rest = p.parse_known_args(arguments)
    if chosen.mode is None and not chosen.tune and {"-h", "--help"} & set(rest):
        print(p.format_help())
        print("The flags of a mode follow --mode NAME --help. Those of --mode layer:\n")
    if chosen.tune and chosen.mode not in (None, "tune"):
        p.error(f"--tune is a mode of its own: leave --mode {chosen.mode} out")
    mode = "tune" if chosen.tune else chosen.mode or "layer"
    name = MODES[mode]
    if importlib.util.find_spec(name) is None:
        p.error(f"--mode {mode}: {name.replace('.', '/')}.py is not part of this checkout")
    return int(importlib.import_module(name).main(rest))


if __name__ == "__main__":
    # Python puts the folder of a script on its path, so `import vllm` would find bench/vllm. The
    # repository takes that folder's place, and `bench` is found in it.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]
    sys.exit(main())
