"""A training step and a session, of a Llama of one billion parameters made from its config."""

from __future__ import annotations

import importlib.util
import statistics
from argparse import Namespace
from typing import Any

import torch

from bench.gpu_report.context import Context, LeftOut

RANK, ADAPTERS, TOKENS = 32, 5, 16
CONTEXTS = (2000, 8000)


def _config(context: Context) -> Any:
    """The sizes of Llama 3.2 1B with a smaller vocabulary; the weights are random."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    if context.rehearsal:
        sizes |= {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
    return LlamaConfig(**sizes, max_position_embeddings=16384, tie_word_embeddings=True)


def _base(context: Context) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if context.rehearsal else torch.bfloat16)
    try:
        with torch.device(context.device):
            return LlamaForCausalLM(_config(context))
    finally:
        torch.set_default_dtype(before)


def _needs_peft() -> None:
    for name in ("peft", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise LeftOut(f"{name} is not installed")


def training(context: Context) -> None:
    """PEFT's step, the same accelerated, without the prefix's gradient, with the prefix kept."""
    _needs_peft()
    from alora_kernels.peft import accelerate
    from bench.models.train_step import adapted, make_batch, make_step

    prompt, suffix = (24, 8) if context.rehearsal else (2048, 64)
    o = Namespace(batch=2, suffix=suffix, rank=4 if context.rehearsal else RANK)
    batch = tuple(
        t.to(context.device) for t in make_batch(o, prompt, 500 if context.rehearsal else 32000)
    )
    plain = adapted(_base(context), o.rank)
    served = accelerate(adapted(_base(context), o.rank))
    models = {"PEFT": plain, "accelerated": served, "no_grad": served, "cached": served}
    modes = {"PEFT": "peft", "accelerated": "peft"}
    steps = {
        name: make_step(model, batch, modes.get(name, name), 1024)  # type: ignore[arg-type]
        for name, model in models.items()
    }
    context.save(prompt=prompt, suffix=suffix, batch=o.batch, variants={}, errors=[])
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses, norms, peaks = {}, {}, {}
    for name in list(steps):
        models[name].zero_grad(set_to_none=True)
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(context.device)
        try:
            losses[name] = float(steps[name]())  # checked below, and a warm-up
        except Exception as error:
            steps.pop(name)
            what = f"{name}: {type(error).__name__}: {error}"
            context.save(errors=[*context.data["errors"], what])
            continue
        grads = [p.grad.double().norm() for p in models[name].parameters() if p.grad is not None]
        norms[name] = float(torch.stack(grads).norm())
        if context.device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(context.device) / 2**30
    rounds, spent = 0, 0.0
    while rounds < (1 if context.rehearsal else 10) and context.left > 1.5 * spent:
        for name, step in steps.items():
            models[name].zero_grad(set_to_none=True)
            times[name].append(context.timed(step))
        spent = max(spent, sum(values[-1] for values in times.values() if values))
        rounds += 1
        context.save(
            rounds=rounds,
            variants={
                name: {
                    "seconds": statistics.median(times[name]), "loss": losses[name],
                    "gradient": norms[name], "peak_gib": peaks.get(name),
                }
                for name in steps
            },
        )  # fmt: skip


def session(context: Context) -> None:
    """The first token and five answers on the base cache, against plain LoRA."""
    _needs_peft()
    from bench.models.serve import Bench, rows_of
    from bench.models.serve_models import NoText, models_of

    bases = [_base(context), _base(context)]
    bases[1].load_state_dict(bases[0].state_dict())
    o = Namespace(
        adapters=2 if context.rehearsal else ADAPTERS, rank=4 if context.rehearsal else RANK,
        targets="all-linear", seed=0, tokens=2 if context.rehearsal else TOKENS, rounds=2,
        long_rounds=1, pairs=4 if context.rehearsal else 24, clock="wall", device=context.device,
    )  # fmt: skip
    activated, plain = models_of(bases, o)
    context.save(adapters=o.adapters, tokens=o.tokens, rows=[], errors=[])
    for length in (40,) if context.rehearsal else CONTEXTS:
        if context.left < 0.3 * context.seconds:
            return
        bench = Bench(o, activated, plain, NoText(bases[0].config.vocab_size), length)
        bench.clock = context.timed
        wrong = bench.check(bench.names[:2])
        if wrong:
            context.save(errors=[*context.data["errors"], wrong])
            continue
        rows = rows_of(bench.measure(lambda: None), length, 0)
        told = [
            {"context": r.context, "what": r.what, "variant": r.variant, "seconds": r.median_s,
             "ratio": r.ratio, "over_base": r.over_base}
            for r in rows
        ]  # fmt: skip
        context.save(rows=[*context.data["rows"], *told])
