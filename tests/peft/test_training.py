"""Training: checkpointing, evaluation, rows without an invocation, gradients."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
import transformers

from alora_kernels.peft import accelerate

from .models import ASK, prompt, put, twins


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(mine, other):
    assert mine.keys() == other.keys() and mine
    for name in other:
        torch.testing.assert_close(mine[name], other[name], atol=1e-5, rtol=1e-4)


def batches():
    first = put(put(prompt(2, 14), 0, 3, ASK), 1, 9, ASK)
    return first, put(put(prompt(3, 11), 0, 6, ASK), 2, 1, ASK)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_two_forwards_before_a_backward(reentrant):
    """Each recomputation runs under its own forward's activation, evaluation in between."""
    model, stock = twins()
    first, second = batches()
    stock.train()
    loss = stock(input_ids=first, labels=first).loss + stock(input_ids=second, labels=second).loss
    loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    one = model(input_ids=first, labels=first, use_cache=False).loss
    two = model(input_ids=second, labels=second, use_cache=False).loss
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=first, labels=first).loss, one.detach())
        model.generate(input_ids=first, max_new_tokens=2, attention_mask=torch.ones_like(first))
    model.train()
    (one + two).backward()
    close(grads(model), grads(stock))
    gc.collect()


def test_states_of_a_checkpointed_forward_are_freed():
    model, _ = twins()
    first, _ = batches()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    owner = model.__dict__["_alora_acceleration"]
    seen = []
    state_of = owner.forwards.state_of
    owner.forwards.state_of = lambda *a: seen.append(weakref.ref(s := state_of(*a))) or s
    loss = model(input_ids=first, labels=first, use_cache=False).loss
    assert seen[0]() is not None
    loss.backward()
    del loss, owner.forwards.state_of
    gc.collect()
    assert seen[0]() is None


def test_trainer_with_checkpointing_and_evaluation(tmp_path):
    """The losses and weights of a Trainer equal PEFT's without checkpointing."""
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in (put(prompt(1, 12), 0, i % 6, ASK)[0] for i in range(8))
    ]
    results = []
    model, stock = twins()
    for m, checkpointing in ((model, True), (stock, False)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)),
            per_device_train_batch_size=2,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # 4.57 begins reentrant
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=m, args=arguments, train_dataset=rows, eval_dataset=rows[:3]
        )
        trainer.train()
        history = trainer.state.log_history
        results.append([h.get("loss", h.get("eval_loss")) for h in history[:-1]])
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]))
    for mine, other in zip(model.parameters(), stock.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_a_training_row_without_its_invocation_warns_once_with_its_index():
    model, _ = twins()
    ids = put(prompt(3, 12), 0, 4, ASK)
    model.train()
    with pytest.warns(UserWarning, match="training row 1, 2 of this batch has no invocation"):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=ids)
        model.eval()(input_ids=ids)


def test_rows_without_invocation_give_zero_gradients():
    model, _ = twins()
    ids = prompt(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    found = grads(model)
    assert len(found) == 28 and not any(g.any() for g in found.values())


def test_no_gradient_to_the_prefix_is_a_choice():
    _, stock = twins()
    model = accelerate(copy.deepcopy(stock), prefix_grad=False)
    ids = put(prompt(2, 12), 0, 3, ASK)
    for m in (model, stock):
        m(input_ids=ids, labels=ids).loss.backward()
    close(grads(model), grads(stock))
