"""Run a function in two gloo processes on the CPU."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_two(work: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """`work(rank, *arguments)` in two processes of one group; what each returned, by rank.

    A tensor is returned as a numpy array, since its shared memory goes with the process.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_run, args=(rank, port, work, arguments, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        got = [queue.get(timeout=300) for _ in processes]
        for rank, error, _ in got:
            assert error is None, f"rank {rank}:\n{error}"
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return {rank: result for rank, _, result in got}


def _run(rank: int, port: int, work: Callable[..., Any], arguments: Any, queue: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        result = work(rank, *arguments)
        queue.put((rank, None, result))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
        raise


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 may have sharded, gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
