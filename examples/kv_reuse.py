"""One context, read once: base → adapter → base → all adapters, with timings.

python examples/kv_reuse.py                               Gemma 3 270M, untrained adapters
python examples/kv_reuse.py --adapter alora-adapter       an adapter from alora_finetuning.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from loading import load_base, load_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table

from alora_kernels.inference import Session

DATA = Path(__file__).parent / "data"
DOCUMENT = """\
Minutes of the allotment society, spring meeting. The chair opened at seven and thanked the members
who had repaired the water pump. The treasurer reported that the fees of last year cover the new
fence and that the compost site stays free of charge. After a long discussion the members agreed to
let the school class use plot nine until autumn; its former tenant moves to plot fourteen. The seed
exchange takes place on Saturday at 10:30 in the old greenhouse. Dogs must be kept on a lead. The
bees of the beekeeper on plot two survived the winter well, and he asked everybody not to spray
while the fruit trees flower. Somebody has been taking ladders home: they belong in the shed."""
QUESTION = "When and where is the seed exchange? Answer as day | time | place."


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base_model", help="hub name, folder or .gguf file (default: Gemma 3 270M)")
    p.add_argument("--adapter", help="folder of a trained aLoRA adapter")
    p.add_argument("--repeat", default=4, type=int, help="copies of the document in the context")
    p.add_argument("--max_new_tokens", default=16, type=int)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = p.parse_args(arguments)
    base, folder = load_base(o.base_model, Path("."), False, o.device)
    tokenizer = load_tokenizer(folder, DATA / "chat_template.jinja")
    model, names = with_adapters(base, tokenizer, o.adapter)
    options = {"max_new_tokens": o.max_new_tokens, "do_sample": False}
    console, table = Console(), Table(title="One context, read once")
    for column in ("step", "tokens run", "seconds", "text"):
        table.add_column(column, justify="left" if column in ("step", "text") else "right")

    def step(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        answers = result if isinstance(result, list) else [result]
        if isinstance(result, Session):
            count, text = result.cached_length - step.before, ""
        else:
            held = len(session) - session.cached_length
            count = sum(held + len(a.invocation) + len(a.token_ids) for a in answers)
            text = "\n".join(a.text.strip().replace("\n", " ")[:50] for a in answers)
        step.before = session.cached_length
        table.add_row(name, str(count), f"{seconds:.2f}", text)
        return result

    step.before = 0
    session = Session(model, tokenizer)
    chat = [{"role": "user", "content": "\n\n".join([DOCUMENT] * o.repeat) + "\n\n" + QUESTION}]
    step("base reads the context", lambda: session.extend(chat))
    prompt = "<start_of_turn>model\n"
    step("base answers", lambda: session.generate(prompt=prompt, **options))
    step(
        f"{names[0]}: its own tokens only", lambda: session.generate(names[0], keep=True, **options)
    )
    again = [{"role": "user", "content": "And what belongs in the shed?"}]
    step("base reads a second question", lambda: session.extend(again))
    step("base answers", lambda: session.generate(prompt=prompt, **options))
    step(f"{len(names)} adapters in one batch", lambda: session.ask(names, **options))
    console.print(table)
    console.print(
        f"The cache holds {session.cached_length} tokens, once; every answer ran on a view of it."
    )
    if o.adapter is None:
        console.print("Untrained adapters answer as the base does; --adapter takes a trained one.")
    return 0


def with_adapters(base: Any, tokenizer: Any, folder: str | None) -> tuple[Any, list[str]]:
    """Three adapters: the trained one under three names, or untrained ones."""
    names = ["appointment", "summary", "safety"]
    if folder is not None:
        model = PeftModel.from_pretrained(base, folder, adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder, adapter_name=name)
        return model.eval(), names
    model = None
    for name in names:
        tokens = tokenizer(f"<start_of_turn>{name}\n", add_special_tokens=False)["input_ids"]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=32,
            target_modules=["q_proj", "k_proj", "v_proj"],
            alora_invocation_tokens=tokens,
        )
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return model.eval(), names


if __name__ == "__main__":
    sys.exit(main())
