"""PEFT's quick start for Activated LoRA, with one added line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import alora_kernels

from .tiny import CHAT_TEMPLATE, base_model, tokenizer


def quick_start(folder: Path, accelerated: bool) -> tuple[PeftModel, list[float]]:
    set_seed(3)
    model = base_model("llama", 3)
    tok = tokenizer(CHAT_TEMPLATE)
    invocation_string = "<a>"
    invocation_tokens = tok.encode(invocation_string, add_special_tokens=False)
    lora_config = LoraConfig(
        task_type="CAUSAL_LM",
        alora_invocation_tokens=invocation_tokens,
        r=32,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    peft_model = get_peft_model(model, lora_config)
    if accelerated:
        peft_model = alora_kernels.accelerate(peft_model)  # the added line
    texts = [
        tok.apply_chat_template(
            [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"is {i}"}],
            tokenize=False,
        )
        for i in range(8)
    ]
    trainer = Trainer(
        model=peft_model,
        train_dataset=[dict(tok(text, add_special_tokens=False)) for text in texts],
        args=TrainingArguments(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tok, mlm=False),
    )
    trainer.train()
    peft_model.save_pretrained(folder / "adapter")
    losses = [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]
    return peft_model.eval(), losses


def test_one_line_changes_no_number(tmp_path: Path) -> None:
    ours, losses = quick_start(tmp_path / "ours", True)
    stock, wanted = quick_start(tmp_path / "stock", False)
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert losses == pytest.approx(wanted, abs=2e-4)
    loaded = PeftModel.from_pretrained(base_model("llama", 3), tmp_path / "ours" / "adapter").eval()
    ids = torch.tensor([tokenizer().encode("hello<a>", add_special_tokens=False)])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=ids).logits, loaded(input_ids=ids).logits, rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            ours(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=1e-2
        )
        answer = ours.generate(input_ids=ids, **options)
        assert torch.equal(answer, loaded.generate(input_ids=ids, **options))
