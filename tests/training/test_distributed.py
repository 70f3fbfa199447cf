"""Two gloo processes on the CPU: DDP and FSDP2 give the gradients of one process."""

from __future__ import annotations

import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import alone, gradients, make_batch, make_model, worst

from alora_kernels.training import PrefixStore, prefix_forward

pytestmark = pytest.mark.slow
# Rank 0 needs three chunks of its prefix; rank 1 has no prefix at all.
LENGTHS = {0: [(20, 6), (11, 9)], 1: [(0, 7), (0, 5)]}
CHUNK = 8


def batches(seed):
    made = {r: make_batch(rows, seed=seed + r) for r, rows in LENGTHS.items()}
    count = sum(int((labels != -100).sum()) for _, _, labels in made.values())
    return made, count


def expected(seed, kind):
    """Gradients of both ranks' rows in one process."""
    made, count = batches(seed)
    model = make_model(kind, seed=5)
    loss, total = 0.0, {}
    for batch in made.values():
        one, grads = alone(model, *batch, count)
        loss += float(one)
        total = {n: g + total.get(n, 0) for n, g in grads.items()}
    return loss, total


def worker(rank, port, wrapper, kind, seed, checkpointing, queue):
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=2)
        model = make_model(kind, seed=5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if wrapper == "ddp":
            run = torch.nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for layer in model.get_base_model().model.layers:
                fully_shard(layer, mesh=mesh)
            run = fully_shard(model, mesh=mesh)
        made, count = batches(seed)
        store = PrefixStore()
        results = []
        for mode in ("no_grad", "cached", "cached"):
            output = prefix_forward(
                run,
                *made[rank],
                mode,
                store=store if mode == "cached" else None,
                num_items_in_batch=count,
                chunk_size=CHUNK,
            )
            (output.loss * 2).backward()  # DDP and FSDP average over two ranks
            grads = {}
            for name, g in gradients(model).items():
                grads[name] = g.full_tensor() if hasattr(g, "full_tensor") else g
            loss = output.loss.detach().clone()
            dist.all_reduce(loss)
            results.append((mode, float(loss), {n: g.numpy() for n, g in grads.items()}))
        queue.put((rank, results, (store.hits, store.misses)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
        raise


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawn(*arguments):
    port = free_port()
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=worker, args=(rank, port, *arguments, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        got = [queue.get(timeout=240) for _ in processes]
        for rank, results, _ in got:
            assert not isinstance(results, str), f"rank {rank}:\n{results}"
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return {rank: (results, counts) for rank, results, counts in got}


@pytest.mark.parametrize(
    ("wrapper", "kind", "checkpointing"),
    [
        ("ddp", "llama", False),
        ("ddp", "gemma3", True),
        ("fsdp2", "llama", False),
        ("fsdp2", "gemma3", True),
    ],
)
def test_equals_one_process(wrapper, kind, checkpointing, seed):
    loss, grads = expected(seed, kind)
    got = spawn(wrapper, kind, seed, checkpointing)
    for rank, (results, counts) in got.items():
        assert counts == ((2, 2) if rank == 0 else (0, 0))
        for mode, one, mine in results:
            assert abs(one - loss) <= 1e-12 * loss, (rank, mode)
            as_tensors = {n: torch.from_numpy(g) for n, g in mine.items()}
            assert worst(as_tensors, grads) <= 1e-12, (rank, mode)
