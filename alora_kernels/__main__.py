"""`python -m alora_kernels` prints what is installed, and for each backend whether it runs here.

python -m alora_kernels selftest [--backend cuda|triton]    every kernel once, on this GPU
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from . import __version__
from .backends import philox
from .dispatch import BACKENDS
from .selftest import command

PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "accelerate", "vllm")


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The text that `python -m alora_kernels` prints."""
    lines = [f"alora_kernels {__version__}", f"python        {platform.python_version()}"]
    lines += [f"{package:<13} {version_of(package)}" for package in PACKAGES]
    lines.append("")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"GPU {i}         {torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    else:
        lines.append("GPU           none")
    lines.append(f"CPU threads   {torch.get_num_threads()}")
    lines.append("")
    lines.append("backend       runs here")
    for name, backend in BACKENDS.items():
        reason = backend.why_not_here()
        lines.append(f"{name:<13} {'yes' if reason is None else f'no: {reason}'}")
    drawn = "by torch: no C++ compiler was found at install" if philox._cpu is None else "compiled"
    lines.append(f"CPU dropout   {drawn}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, or run the self-test; returns the exit status."""
    p = argparse.ArgumentParser(
        "python -m alora_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command")
    command.add_flags(
        commands.add_parser(
            "selftest",
            help="every kernel once against the reference, in a process of its own",
            description=command.__doc__,
        )
    )
    chosen = p.parse_args(arguments)
    if chosen.command == "selftest":
        return command.main(chosen, BACKENDS)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
