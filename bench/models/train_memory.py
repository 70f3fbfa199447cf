"""Peak memory of a training step: the highest resident size of a process that runs only it."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.models.train_step import make_batch, make_model, make_step

RUN = Path(__file__).parents[1] / "run.py"


def peak_in_process(options: argparse.Namespace, prompt: int, variant: str) -> float | None:
    """The peak in MiB, measured in a new process; None where the system cannot say it."""
    command = [
        sys.executable, str(RUN), "--mode", "train", "--memory-of", variant,
        *("--prompt", str(prompt)),
        *("--suffix", str(options.suffix), "--batch", str(options.batch)),
        *("--rank", str(options.rank), "--layers", str(options.layers)),
        *("--threads", str(options.threads), "--chunk-size", str(options.chunk_size)),
        *(["--accelerated"] if options.accelerated and variant != "peft" else []),
    ]  # fmt: skip
    # Freed memory is returned to the system at once, so the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:  # the timings are worth having without it
        print(f"peak memory of {variant} at {prompt} not measured:\n{done.stderr[-2000:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def peak_of(options: argparse.Namespace) -> float | None:
    """In the child process: the second step's peak above the size with the model loaded."""
    model = make_model(options)
    if options.accelerated:
        from alora_kernels.peft import accelerate

        accelerate(model)
    import alora_kernels.training  # noqa: F401, its imports are no part of the step

    batch = make_batch(options, options.prompt[0])
    gc.collect()
    before = _status("VmRSS")
    step = make_step(model, batch, options.memory_of, options.chunk_size)
    step()  # fills the store, loads libraries
    model.zero_grad(set_to_none=True)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    except OSError:
        return None
    step()
    peak = _status("VmHWM")
    return None if peak is None or before is None else (peak - before) / 1024


def _status(field: str) -> int | None:
    """A value in KiB from the kernel's account of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return None
