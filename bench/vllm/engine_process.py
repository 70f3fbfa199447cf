"""The process in which a vLLM engine runs. engine.py starts it and sends it messages.

    PYTHON_OF_VLLM bench/vllm/engine_process.py OPTIONS

A group of requests is added at once. Then the engine steps until all are done, and notes when the
first token and the end of each came. The clock starts when the first request is added. vLLM's
environment has no `bench`, so this file imports nothing of it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def _serve(options: dict[str, Any]) -> None:
    # Only answers go to the pipe. Whatever else is printed goes to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.sched_setaffinity(0, options["cores"])
    import vllm
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    engine = LLM(
        options["model"],
        dtype="float32",
        max_model_len=options["max_len"],
        block_size=options["block_size"],
        enable_prefix_caching=True,
        # By default vLLM keeps the blocks of a sliding window only before the end of each prompt.
        # Then a longer prompt, such as the next turn, finds fewer blocks than were computed.
        prefix_cache_retention_interval=None,
        enable_lora=True,
        max_loras=max(len(options["adapters"]), 1),
        max_lora_rank=options["rank"],
        lora_target_modules=options["targets"],
        max_num_seqs=16,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    ).llm_engine
    adapters = {
        name: LoRARequest(name, i + 1, path)
        for i, (name, path) in enumerate(options["adapters"].items())
    }
    for request in adapters.values():
        engine.add_lora(request)
    about = {
        "vllm": vllm.__version__,
        "block_size": engine.vllm_config.cache_config.block_size,
        "batched_tokens": engine.vllm_config.scheduler_config.max_num_batched_tokens,
        "threads": engine.collective_rpc(_threads),
    }
    print(json.dumps(about), file=answers)
    clock = time.process_time if options["clock"] == "cpu" else time.perf_counter
    for line in sys.stdin:
        message = json.loads(line)
        what = message.pop("do")
        if what == "run":
            result: Any = _run(engine, adapters, clock, **message)
        elif what == "reset":
            result = bool(engine.reset_prefix_cache())
        elif what == "ops":
            result = _ops(**message)
        else:
            raise ValueError(f"unknown message {what!r}")
        print(json.dumps({"result": result}), file=answers)


def _threads(worker: Any) -> dict[str, Any]:
    """The threads and cores of a worker process. Each OpenMP thread is bound to its own core."""
    import torch

    threads = torch.get_num_threads()
    torch.ones(1 << 20).sum()  # the first parallel loop makes and binds OpenMP's threads
    cores = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    return {"threads": threads, "cores": sorted(set().union(*(c for c in cores if len(c) == 1)))}


def _run(
    engine: Any,
    adapters: dict[str, Any],
    clock: Callable[[], float],
    requests: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    began = clock()
    found: dict[str, dict[str, Any]] = {}
    for r in requests:
        key = str(next(_keys))
        found[key] = {}
        parameters = SamplingParams(
            temperature=0.0, max_tokens=r["tokens"], min_tokens=r["tokens"], detokenize=False
        )
        request = adapters[r["adapter"]] if r["adapter"] else None
        engine.add_request(key, {"prompt_token_ids": r["ids"]}, parameters, lora_request=request)
    while engine.has_unfinished_requests():
        for out in engine.step():
            now = clock() - began
            entry = found[out.request_id]
            entry.setdefault("first", now)
            if out.finished:
                ids = list(out.outputs[0].token_ids)
                entry.update(total=now, cached=out.num_cached_tokens or 0, ids=ids)
    return list(found.values())


_keys = itertools.count()


def _ops(
    rows: int, shapes: Sequence[Sequence[Any]], rank: int, repeats: int, threads: int
) -> list[dict[str, float]]:
    """Seconds of `add_lora_linear` on a prefill of one adapter: vLLM's own, and this package's."""
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from alora_kernels.vllm.wrappers import AloraWrapperCPU

    torch.set_num_threads(threads)
    results = []
    for depth, widths in shapes:
        x = torch.randn(rows, depth)
        lora_a = tuple(torch.randn(2, 1, rank, depth) * depth**-0.5 for _ in widths)
        lora_b = tuple(torch.randn(2, 1, n, rank) * rank**-0.5 for n in widths)
        times, outs = {}, {}
        for name, kind in (("ours", AloraWrapperCPU), ("stock", PunicaWrapperCPU)):
            wrapper = kind(rows, 16, torch.device("cpu"))
            wrapper.update_metadata(
                LoRAMapping((1,) * rows, (1,), is_prefill=True), [1, None], 2, 100
            )
            samples = []
            for _ in range(repeats + 1 if name == "ours" else 1 + bool(repeats > 1)):
                y = torch.zeros(rows, sum(widths))
                began = time.perf_counter()
                wrapper.add_lora_linear(y, x, lora_a, lora_b, 1.0, tuple(widths))
                samples.append(time.perf_counter() - began)
            times[name] = sorted(samples)[len(samples) // 2]
            outs[name] = y
        difference = (outs["ours"] - outs["stock"]).norm() / outs["stock"].norm()
        results.append({**times, "difference": float(difference)})
    return results


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
