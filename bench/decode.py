"""`python bench/decode.py` is `python bench/run.py --mode decode`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--mode", Path(__file__).stem]
    runpy.run_path(str(Path(__file__).with_name("run.py")), run_name="__main__")
