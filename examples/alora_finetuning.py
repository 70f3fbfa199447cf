"""Fine-tune an Activated LoRA adapter, and see what it learnt.

    python examples/alora_finetuning.py                    the shipped data, Gemma 3 270M, on a CPU
    python examples/alora_finetuning.py --base_model ./my-model --data_path chats.jsonl \\
        --invocation_string "<start_of_turn>summary\\n" --prefix no_grad --device cuda

The adapter is saved in PEFT's format and loads in stock PEFT. docs/inference.md serves it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from display import Display, plot_losses
from loading import FlagError, HubError, check_hub, device_of, load_base, load_tokenizer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from rows import Example, RowError, encode, load_rows
from scoring import Score, answer_limit, exact_match
from transformers import PrinterCallback, TrainingArguments, set_seed

import alora_kernels
from alora_kernels.inference import Session
from alora_kernels.training import (
    AloraDataCollator,
    AloraTrainer,
    PrefixError,
    check_prefix,
)

DATA = Path(__file__).parent / "data"
console = Console()


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--base_model", help="hub name, local folder or .gguf file (default: Gemma 3 270M)")
    add("--data_path", default=str(DATA / "appointments_train.jsonl"), help="hub name or file")
    add("--heldout_path", help="rows for exact match (default: with the shipped data, its own)")
    add("--output_dir", default="alora-adapter", type=Path)
    add("--batch_size", default=4, type=int)
    add("--num_epochs", default=1.0, type=float)
    add("--learning_rate", default=1e-3, type=float)
    add(
        "--cutoff_len", default=512, type=int, help="tokens of a row; the prompt's begin goes first"
    )
    add("--val_set_size", default=24, type=int, help="rows kept from training to evaluate the loss")
    add("--invocation_string", default="<start_of_turn>model\n", help="\\n is a line break")
    add("--prefix", choices=("cached", "no_grad", "full"), default="cached")
    add("--quantize", action="store_true", help="the base in 4-bit NF4 (bitsandbytes)")
    add("--eval_step", default=20, type=int, help="evaluate every so many steps; 0: never")
    add("--save_step", default=0, type=int, help="checkpoint every so many steps; 0: only the end")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--lora_r", default=32, type=int)
    add("--lora_alpha", default=64, type=float)
    add("--lora_dropout", default=0.0, type=float)
    add(
        "--lora_target_modules",
        default="q_proj,k_proj,v_proj",
        help="comma-separated, or all-linear",
    )
    add("--hub_model_id", help="where --push_to_hub puts the adapter")
    add("--push_to_hub", action="store_true")
    add("--no_compare", action="store_true", help="do not train a plain LoRA for comparison")
    add("--seed", default=0, type=int)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, evaluate, save. Returns 0, or 2 if the flags ask for something impossible."""
    options = parser().parse_args(arguments)
    options.invocation_string = options.invocation_string.replace("\\n", "\n")
    try:
        check_hub(options.push_to_hub, options.hub_model_id)
        run(options)
    except (HubError, FlagError, RowError, PrefixError, OSError, ImportError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    set_seed(options.seed)
    device = device_of(options.device)
    base, folder = load_base(options.base_model, options.output_dir, options.quantize, device)
    tokenizer = load_tokenizer(folder, DATA / "chat_template.jinja")
    eos = _eos_ids(base, tokenizer)
    train, validation = _split(options, encode_all(options, tokenizer, eos, options.data_path))
    heldout = encode_all(options, tokenizer, eos, _heldout_path(options))
    console.print(
        f"{len(train)} rows to train on, {len(validation)} for the validation loss, "
        f"{len(heldout)} held out; base model {folder}",
        highlight=False,
    )
    display = Display(console)
    scores: dict[str, tuple[Score, float]] = {}
    with display:
        model = wrap(base, tokenizer, options, activated=True)
        if options.prefix != "full":
            check_prefix(model.train())  # the Trainer would refuse it only later
        if heldout:
            with model.disable_adapter():
                scores["base, zero-shot"] = score(display, "base", model, tokenizer, heldout), 0.0
        seconds, losses = fit(display, "aLoRA", model, tokenizer, train, validation, options)
        model.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        if heldout:
            scores["aLoRA"] = score(display, "aLoRA", model, tokenizer, heldout), seconds
        curves = {"aLoRA": losses}
        if heldout and not options.no_compare:
            set_seed(options.seed)
            plain = wrap(alora_kernels.restore(model).unload(), tokenizer, options, activated=False)
            seconds, losses = fit(display, "LoRA", plain, tokenizer, train, validation, options)
            scores["plain LoRA"] = score(display, "LoRA", plain, tokenizer, heldout), seconds
            curves["plain LoRA"] = losses
            base = plain.unload()
        else:
            base = alora_kernels.restore(model).unload()
    plot_losses(curves, options.output_dir / "loss.png")
    console.print(f"adapter and loss.png in {options.output_dir}", highlight=False)
    if scores:
        _print_scores(scores, options, answer_limit(heldout))
    show_answer(base, tokenizer, (heldout or validation or train)[0], options)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)
    if options.push_to_hub:
        push(options)


def encode_all(
    options: argparse.Namespace, tokenizer: Any, eos: set[int], path: str | None
) -> list[Example]:
    if path is None:
        return []
    return encode(tokenizer, load_rows(path), options.invocation_string, sorted(eos))


def wrap(base: Any, tokenizer: Any, options: argparse.Namespace, activated: bool) -> Any:
    """`base` as a PEFT model: with an Activated LoRA, or with a plain LoRA of the same size."""
    targets = options.lora_target_modules
    tokens = tokenizer(options.invocation_string, add_special_tokens=False)["input_ids"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        alora_invocation_tokens=tokens if activated else None,
    )
    model = get_peft_model(base, config)
    return alora_kernels.accelerate(model) if activated else model


def fit(
    display: Display,
    name: str,
    model: Any,
    tokenizer: Any,
    train: list[Example],
    validation: list[Example],
    options: argparse.Namespace,
) -> tuple[float, list[dict[str, float]]]:
    """Train. Returns the seconds, and the losses that were logged."""
    activated = name == "aLoRA"
    collator = AloraDataCollator(
        tokenizer(options.invocation_string, add_special_tokens=False)["input_ids"],
        pad_token_id=tokenizer.pad_token_id or 0,
        max_length=options.cutoff_len,
        keep_first=1,
    )
    steps = -(-len(train) // options.batch_size) * options.num_epochs
    evaluates = bool(validation) and options.eval_step > 0
    arguments = TrainingArguments(
        output_dir=str(options.output_dir / f"{name}-checkpoints"),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        num_train_epochs=options.num_epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.05 * steps)),
        weight_decay=0.0,
        logging_steps=max(1, min(5, round(steps / 10))),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_step if evaluates else None,
        save_strategy="steps" if options.save_step else "no",
        save_steps=options.save_step or 500,
        prediction_loss_only=True,
        use_cpu=model.device.type == "cpu",
        seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = AloraTrainer(
        model,
        arguments,
        train_dataset=[e.feature() for e in train],
        eval_dataset=[e.feature() for e in validation] if evaluates else None,
        data_collator=collator if activated else _for_plain_lora(collator),
        callbacks=[display.callback(name)],
        prefix=options.prefix if activated else "full",
    )
    trainer.remove_callback(PrinterCallback)  # the display shows the same figures
    began = time.monotonic()
    trainer.train()
    with contextlib.suppress(OSError):  # the Trainer's folder is empty without --save_step
        Path(arguments.output_dir).rmdir()
    return time.monotonic() - began, trainer.state.log_history


def score(display: Display, name: str, model: Any, tokenizer: Any, heldout: list[Example]) -> Score:
    with display.counting(f"exact match, {name}", len(heldout)) as advance:
        return exact_match(model, tokenizer, heldout, on_batch=advance)[0]


def show_answer(base: Any, tokenizer: Any, example: Example, options: argparse.Namespace) -> None:
    """Load the saved adapter in stock PEFT, and let it answer on a context that is read once."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, options.output_dir).eval()
    session = Session(model, tokenizer)
    session.extend(example.messages[:-1])
    began = time.monotonic()
    answer = session.generate("default", max_new_tokens=32, do_sample=False)
    table = Table(title="The adapter on the base model's cache", show_header=False)
    table.add_row("chat", "\n".join(m["content"] for m in example.messages[:-1]))
    table.add_row("answer", answer.text)
    table.add_row("expected", example.answer)
    table.add_row(
        "work",
        f"{session.cached_length} tokens read once, {len(answer.token_ids)} generated in "
        f"{time.monotonic() - began:.2f} s",
    )
    console.print(table)


def push(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(options.hub_model_id, exist_ok=True)
        api.upload_folder(
            repo_id=options.hub_model_id,
            folder_path=str(options.output_dir),
            ignore_patterns=["*-checkpoints/*", "base-model/*"],
        )
    except Exception as error:
        raise HubError(
            f"pushing to {options.hub_model_id} failed: {error}\n"
            f"The adapter is safe in {options.output_dir}."
        ) from error


def _split(
    options: argparse.Namespace, examples: list[Example]
) -> tuple[list[Example], list[Example]]:
    """Shuffle the rows. The last `--val_set_size` of them are for validation."""
    if options.val_set_size >= len(examples):
        raise RowError(
            f"--val_set_size {options.val_set_size} leaves nothing of {len(examples)} rows to train"
        )
    examples = list(examples)
    random.Random(options.seed).shuffle(examples)
    cut = len(examples) - options.val_set_size
    return examples[:cut], examples[cut:]


def _heldout_path(options: argparse.Namespace) -> str | None:
    if options.heldout_path:
        return str(options.heldout_path)
    shipped = DATA / "appointments_train.jsonl"
    same = Path(options.data_path).resolve() == shipped.resolve()
    return str(DATA / "appointments_heldout.jsonl") if same else None


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return set(eos) if isinstance(eos, list) else {eos}


def _for_plain_lora(collator: AloraDataCollator) -> Any:
    """The batch for a plain LoRA: without starts, with logits from the first answer on."""

    def collate(features: Any) -> Any:
        batch = collator(features)
        del batch["invocation_starts"]
        answered = (batch["labels"] != -100).any(0).nonzero()
        width = batch["labels"].shape[1]
        keep = width - int(answered[0]) + 1 if len(answered) else 1
        batch["labels"] = batch["labels"][:, -keep:]
        batch["logits_to_keep"] = keep
        return batch

    return collate


def _print_scores(
    scores: dict[str, tuple[Score, float]], options: argparse.Namespace, limit: int
) -> None:
    table = Table(
        title="Held-out exact match",
        caption=f"greedy; at most {limit} new tokens; a row ends once it cannot match any more",
    )
    for column in ("model", "right", "share", "95 % interval", "training"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, (s, seconds) in scores.items():
        low, high = s.interval
        how = f", prefix={options.prefix}" if name == "aLoRA" else ""
        table.add_row(
            f"{name}{how}",
            f"{s.right}/{s.count}",
            f"{s.right / s.count:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{seconds:.0f} s" if seconds else "",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
