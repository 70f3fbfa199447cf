"""PEFT's quick start for Activated LoRA with one added line, and its two ways to share a cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, DynamicCache, Trainer, TrainingArguments

import alora_kernels

from .models import cached

INVOCATION = "[/INST]"
WORDS = f"<pad> <eos> [INST] {INVOCATION} what is the colour of sky grass snow blue green white ? a"
ANSWERS = {"sky": "blue", "grass": "green", "snow": "white"}
NEW = {"max_new_tokens": 3, "do_sample": False}


def tiny_tokenizer():
    words = {word: i for i, word in enumerate(WORDS.split())}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_mistral():
    torch.manual_seed(3)
    config = transformers.MistralConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.MistralForCausalLM(config)


def quick_start(model, tokenizer, folder: Path, accelerated: bool):
    """The snippet of PEFT's guide; what its Trainer no longer takes is left out."""
    dataset = [
        dict(tokenizer(f"[INST] what is the colour of {k} ? {INVOCATION} {v} <eos>"))
        for k, v in ANSWERS.items()
    ] * 4

    invocation_tokens = tokenizer.encode(INVOCATION, add_special_tokens=False)
    lora_config = LoraConfig(
        task_type="CAUSAL_LM",
        alora_invocation_tokens=invocation_tokens,
        r=32,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    torch.manual_seed(4)
    peft_model = get_peft_model(model, lora_config)
    if accelerated:
        peft_model = alora_kernels.accelerate(peft_model)  # the added line
    data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(
        model=peft_model,
        train_dataset=dataset,
        args=TrainingArguments(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=3,
            max_steps=12,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        processing_class=tokenizer,
        data_collator=data_collator,
    )
    trainer.train()
    peft_model.save_pretrained(folder / "alora-mistral")
    return peft_model.eval(), [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The accelerated model, PEFT's own with the adapter that it saved, the tokenizer."""
    folder = tmp_path_factory.mktemp("quick_start")
    tokenizer, base = tiny_tokenizer(), tiny_mistral()
    ours, losses = quick_start(copy.deepcopy(base), tokenizer, folder / "ours", True)
    _, wanted = quick_start(copy.deepcopy(base), tokenizer, folder / "stock", False)
    stock = PeftModel.from_pretrained(base, folder / "ours" / "alora-mistral").eval()
    return ours, stock, tokenizer, losses, wanted


def test_one_line_changes_no_loss(trained):
    _, _, _, losses, wanted = trained
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert losses == pytest.approx(wanted, abs=2e-4)


def test_what_it_saves_loads_in_stock_peft(trained):
    ours, stock, tokenizer, _, _ = trained
    asked = tokenizer(f"[INST] what is the colour of snow ? {INVOCATION}", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**asked).logits, stock(**asked).logits, rtol=0, atol=1e-4)
    answer = ours.generate(**asked, **NEW)
    assert torch.equal(answer, stock.generate(**asked, **NEW))
    assert torch.equal(answer, ours.generate(**asked, use_cache=False, **NEW))


def test_the_base_model_then_the_adapter(trained):
    """Pattern 1 of the guide: the adapter reads what the base model wrote, on its cache."""
    ours, stock, tokenizer, _, _ = trained
    asked = tokenizer("[INST] what is the colour of snow ?", return_tensors="pt")
    cache = DynamicCache()
    with ours.disable_adapter():
        output = ours.generate(**asked, **cached(ours, cache), **NEW)
    invocation = tokenizer.encode(INVOCATION, add_special_tokens=False)
    prompt = torch.cat([output, torch.tensor([invocation])], 1)
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    assert cache.get_seq_length() >= asked["input_ids"].shape[1]
    answer = ours.generate(**given, **cached(ours, cache), **NEW)
    assert torch.equal(answer, stock.generate(**given, **NEW))


def test_the_adapter_then_the_base_model(trained):
    """Pattern 2: both go on from a copy of the cache that the base model has filled."""
    ours, stock, tokenizer, _, _ = trained
    shared = tokenizer("[INST] what is the colour of grass", return_tensors="pt")
    cache = DynamicCache()
    with ours.disable_adapter(), torch.no_grad():
        ours(**shared, **cached(ours, cache))
    kept = copy.deepcopy(cache)
    asked = tokenizer(f"[INST] what is the colour of grass {INVOCATION}", return_tensors="pt")
    answer = ours.generate(**asked, **cached(ours, cache), **NEW)
    assert torch.equal(answer, stock.generate(**asked, **NEW))
    again = tokenizer("[INST] what is the colour of grass ?", return_tensors="pt")
    with ours.disable_adapter(), stock.disable_adapter():
        base = ours.generate(**again, **cached(ours, kept), **NEW)
        assert torch.equal(base, stock.generate(**again, **NEW))
