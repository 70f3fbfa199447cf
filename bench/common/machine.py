"""Where a figure was measured: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> str:
    """One line that stands above every table."""
    parts = [
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"Python {platform.python_version()}",
    ]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    parts.extend(f"{name} {version}" for name, version in versions().items())
    parts.append(f"commit {commit()}")
    return " | ".join(parts)


def arch_of(device: torch.device) -> int:
    """The compute capability, such as 80 or 90; 0 for anything but an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """The versions that figures depend on. Packages that are not installed are left out."""
    found = {"torch": str(torch.__version__)}
    for name in ("peft", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with a mark if files have changed since."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        name = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if changed else name
