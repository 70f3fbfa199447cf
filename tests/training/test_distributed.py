"""Two gloo processes on the CPU: DDP and FSDP2 give the gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import alone, gradients, make_batch, make_model, worst
from two_processes import run_two, whole

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


def work(rank, wrapper, kind, seed, checkpointing):
    dist.init_process_group("gloo")
    model = make_model(kind, seed=5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
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
        grads = {n: whole(g).numpy() for n, g in gradients(model).items()}
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        results.append((mode, float(loss), grads))
    return results, (store.hits, store.misses)


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
    got = run_two(work, wrapper, kind, seed, checkpointing)
    for rank, (results, counts) in got.items():
        assert counts == ((2, 2) if rank == 0 else (0, 0))
        for mode, one, mine in results:
            assert abs(one - loss) <= 1e-12 * loss, (rank, mode)
            as_tensors = {n: torch.from_numpy(g) for n, g in mine.items()}
            assert worst(as_tensors, grads) <= 1e-12, (rank, mode)
