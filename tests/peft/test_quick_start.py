"""PEFT's quick start for activated LoRA, with one added line, from training to a shared cache."""

from __future__ import annotations

import copy

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

import alora_kernels

from .models import cache_of, cached

WORDS = [
    "<pad>",
    "<eos>",
    "<|query|>",
    "what",
    "is",
    "the",
    "colour",
    "of",
    "sky",
    "grass",
    "snow",
    "blue",
    "green",
    "white",
    "?",
    "a",
    "b",
]
INVOCATION = "<|query|>"


def tiny_tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )


def tiny_base():
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def test_quick_start(tmp_path):
    tokenizer, base = tiny_tokenizer(), tiny_base()
    untouched = copy.deepcopy(base)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=32,
        alora_invocation_tokens=tokenizer.encode(INVOCATION, add_special_tokens=False),
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    model = get_peft_model(base, config)
    model = alora_kernels.accelerate(model)  # the added line

    answers = {"sky": "blue", "grass": "green", "snow": "white"}
    texts = [f"what is the colour of {k} ? {INVOCATION} {v} <eos>" for k, v in answers.items()]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=3,
            max_steps=60,
            learning_rate=2e-2,
            logging_steps=30,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[tokenizer(text) for text in texts] * 4,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(untouched, str(tmp_path / "adapter")).eval()
    model.eval()
    asked = tokenizer(f"what is the colour of snow ? {INVOCATION}", return_tensors="pt")
    settings = {"max_new_tokens": 3, "do_sample": False}
    ours = model.generate(**asked, **settings)
    assert torch.equal(ours, stock.generate(**asked, **settings))
    assert model.generate(**asked, use_cache=False, **settings).tolist() == ours.tolist()

    # The base model's cache serves the adapter: only the invocation is new.
    context = asked["input_ids"][:, :-1]
    with torch.no_grad():
        with model.disable_adapter():
            cache = cache_of(model(input_ids=context, use_cache=True))
        reused = model.generate(**asked, **cached(model, cache), **settings)
    assert torch.equal(reused, ours)
