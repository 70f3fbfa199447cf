"""AloraTrainer on two gloo processes equals one process with twice the batch."""

from __future__ import annotations

import os
import traceback

import pytest
import torch
import torch.multiprocessing as mp
from test_distributed import free_port
from test_trainer import adapter, train

pytestmark = pytest.mark.slow


def worker(rank, port, folder, prefix, queue):
    try:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
        )  # fmt: skip
        torch.set_num_threads(1)
        runner = train(folder, prefix=prefix, ddp_backend="gloo", gradient_accumulation_steps=2)
        assert runner.accelerator.num_processes == 2
        queue.put((rank, {n: p.numpy() for n, p in adapter(runner).items()}))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise


@pytest.mark.parametrize("prefix", ["no_grad", "cached"])
def test_ddp(prefix, tmp_path):
    one = train(
        tmp_path, prefix="full", per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    context = mp.get_context("spawn")
    queue, port = context.Queue(), free_port()
    processes = [
        context.Process(target=worker, args=(r, port, str(tmp_path / str(r)), prefix, queue))
        for r in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for rank, got in [queue.get(timeout=240) for _ in processes]:
            assert not isinstance(got, str), f"rank {rank}:\n{got}"
            for name, value in adapter(one).items():
                torch.testing.assert_close(
                    torch.from_numpy(got[name]), value, rtol=1e-5, atol=1e-5, msg=name
                )
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
