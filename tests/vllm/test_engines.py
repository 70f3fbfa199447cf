"""Engines of other kinds: preempting, speculating, asynchronous, on two processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest

from . import engines, tiny

pytestmark = pytest.mark.vllm
INVOCATION = list(tiny.INVOCATION)


def test_preempted_requests_are_recomputed_right(llama, words):
    """Ten blocks of cache for four requests that need five each."""
    with engines.offline(llama, num_gpu_blocks_override=11, max_model_len=256) as engine:
        names = ["first", None, "second", "plain"]
        prompts = [[*words(60 + 7 * i), *INVOCATION, *words(10)] for i in range(4)]
        engine.check(names, prompts, new=60)
        assert engine.metric("vllm:num_preemptions") > 0
        # A preempted aLoRA request whose answer holds an invocation again.
        forced = [[*words(70), *INVOCATION, *words(20)] for _ in range(4)]
        engine.check(["first", "first", "second", None], forced, new=60)


def test_more_adapters_than_slots(llama, words):
    """One slot on the device and two in memory for four adapters, which push each other out."""
    with engines.offline(llama, max_loras=1, max_cpu_loras=2) as engine:
        for _ in range(2):
            for name in ("first", "other", "second", "plain"):
                prompt = [*words(40), *INVOCATION, *words(5), 60, 61, *words(3)]
                engine.one(name, prompt)
        names = ["first", "second", "other", None, "plain"]
        engine.check(names, [[*words(30), *INVOCATION, 60, 61, *words(4)] for _ in names])
        core = engine.llm.llm_engine
        assert core.remove_lora(engine.lora("plain").lora_int_id)
        assert core.add_lora(engine.lora("first"))
        engine.one("first", [*words(40), *INVOCATION])
        engine.one("plain", [*words(40), *INVOCATION])


def test_asynchronous_engine(llama, words):
    """Its own process, streams, and one of them left early; prompts share a base turn."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    loras = {n: LoRARequest(n, i + 1, str(p)) for i, (n, p) in enumerate(llama.adapters.items())}
    context = words(70)
    names = [None, "first", "second", "plain", "other", "first", None, "second"] * 2
    prompts = [[*context, *words(i), *INVOCATION, 60, 61, *words(3)] for i in range(len(names))]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=10,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )

    async def stream(engine, index: int, stop: int | None = None) -> tuple[list[int], int]:
        tokens, cached = [], -1
        name = names[index]
        async for output in engine.generate(
            {"prompt_token_ids": prompts[index]},
            params,
            f"request-{index}-{stop}",
            lora_request=loras.get(name) if name else None,
        ):
            tokens += output.outputs[0].token_ids
            cached = max(cached, output.num_cached_tokens or 0)
            if stop is not None and len(tokens) >= stop:
                break
        return tokens, cached

    async def everything():
        arguments = AsyncEngineArgs(model=str(llama.folder), **engines.OPTIONS)
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            first, _ = await stream(engine, 0)
            assert await stream(engine, 1, stop=2)
            rest = await asyncio.gather(*(stream(engine, i) for i in range(1, len(names))))
            return [(first, 0), *rest]
        finally:
            engine.shutdown()

    with engines.environment():
        results = asyncio.run(everything())
    for name, prompt, (tokens, cached) in zip(names, prompts, results):
        engines.same(llama, name, prompt, tokens)
        assert name == "plain" or prompt is prompts[0] or cached >= 64


SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

def main():
    task = json.load(open(sys.argv[1]))
    llm = LLM(**task["options"])
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, detokenize=False)
    ids = {path: i + 1 for i, path in enumerate(task["paths"])}
    answers = []
    for asked in task["rounds"]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _, _, prompt in asked],
            params,
            lora_request=[LoRARequest(n, ids[p], p) if p else None for n, p, _ in asked],
            use_tqdm=False,
        )
        answers.append([(list(o.outputs[0].token_ids), o.num_cached_tokens) for o in outputs])
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    json.dump([answers, metrics], open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def elsewhere(tmp_path, model, rounds, env=None, **options):
    """Holds the answers of an engine in a process of its own against PEFT's, round after round.

    Returns the cached tokens of each request, by round, and the engine's metrics.
    """
    script, task, out = (tmp_path / name for name in ("script.py", "task.json", "out.json"))
    script.write_text(SCRIPT)
    paths = {name: str(path) for name, path in model.adapters.items()}
    asked = [[(name, paths.get(name), prompt) for name, prompt in turn] for turn in rounds]
    chosen = engines.OPTIONS | {"model": str(model.folder)} | options
    task.write_text(json.dumps({"options": chosen, "rounds": asked, "paths": list(paths.values())}))
    subprocess.run(
        [sys.executable, script, task, out],
        check=True,
        timeout=400,
        env={
            **os.environ,
            **engines.ENVIRONMENT,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **(env or {}),
        },
    )
    answers, metrics = json.loads(out.read_text())
    for turn, results in zip(rounds, answers, strict=True):
        for (name, prompt), (tokens, _) in zip(turn, results, strict=True):
            engines.same(model, name, prompt, tokens)
    return [[cached for _, cached in results] for results in answers], metrics


def guessed(prompt, answer, size=3):
    """How many of an answer's tokens followed the same `size` tokens where those first occurred."""
    found = 0
    for count in range(1, len(answer)):
        ids = [*prompt, *answer[:count]]
        at = next(i for i in range(len(ids)) if ids[i : i + size] == ids[-size:])
        found += at + size < len(ids) and ids[at + size] == answer[count]
    return found


def test_ngram_speculation(tmp_path, llama, words):
    """In a process of its own: after numba is loaded, vLLM makes no second engine in a process."""
    names = ["first", None, "plain", "second"]
    for _ in range(20):  # until n-grams find some of the answers' tokens
        first = [(name, [*words(20) * 3, *INVOCATION, *words(6) * 3]) for name in names]
        second = [(n, [*p, *llama.answer(n, p, 10), *INVOCATION, *p[-8:]]) for n, p in first]
        third = [(n, [*p, *llama.answer(n, p, 10), *p[-8:]]) for n, p in second]
        rounds = [first, second, third]
        asked = [request for turn in rounds for request in turn]
        if sum(guessed(p, llama.answer(n, p, 10)) for n, p in asked) >= 3:
            break
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    _, metrics = elsewhere(tmp_path, llama, rounds, speculative_config=speculative)
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0


def test_tensor_parallel_two(tmp_path, plugin, words):
    """Two worker processes; two heads of keys, so that each has one."""
    model = tiny.make("llama", tmp_path, num_key_value_heads=2)
    context = words(70)
    names = [None, "first", "second", "plain", "other", None]
    turns = [(n, [*context, *words(i), *INVOCATION, 60, 61, 5]) for i, n in enumerate(names)]
    cached, _ = elsewhere(
        tmp_path,
        model,
        [turns[:1], turns[1:]],
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    assert cached == [[0], [64, 64, 0, 64, 64]]
