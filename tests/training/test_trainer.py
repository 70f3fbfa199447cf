"""AloraTrainer: the same training as the plain Trainer's, evaluation, resuming, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import INVOCATION, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from alora_kernels.training import (
    AloraDataCollator,
    AloraTrainer,
    PrefixError,
    PrefixStore,
)


def make_rows(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(10, 97, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": some(3, 20) + INVOCATION, "answer_ids": some(2, 8)} for _ in range(count)
    ]


def arguments(folder, **changes) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }
    return TrainingArguments(**options)


def train(folder, kind="llama", trainer=AloraTrainer, resume=None, model=None, **options):
    """Train a tiny model; returns the trainer."""
    prefix = options.pop("prefix", "no_grad")
    store = options.pop("prefix_store", None)
    dropout = options.pop("dropout", 0.0)
    callbacks = options.pop("callbacks", None)
    eval_rows = options.pop("eval_rows", 5)
    extra = {} if trainer is Trainer else {"prefix": prefix, "prefix_store": store}
    runner = trainer(
        model=model or make_model(kind, seed=1, dropout=dropout),
        args=arguments(folder, **options),
        train_dataset=make_rows(),
        eval_dataset=make_rows(eval_rows, seed=9),
        data_collator=AloraDataCollator(INVOCATION),
        callbacks=callbacks,
        **extra,
    )
    runner.train(resume_from_checkpoint=resume)
    return runner


def adapter(runner) -> dict[str, torch.Tensor]:
    named = runner.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad}


def assert_same(a, b, rtol):
    for name, value in adapter(a).items():
        torch.testing.assert_close(value, adapter(b)[name], rtol=rtol, atol=rtol, msg=name)


def losses(runner, key="loss"):
    return [entry[key] for entry in runner.state.log_history if key in entry]


class PlainTrainer(Trainer):
    """The plain step; only the key that PEFT does not know is dropped."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {k: v for k, v in inputs.items() if k != "invocation_starts"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += ["prompt_ids", "answer_ids"]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_equals_the_plain_trainer(kind, tmp_path):
    """Uneven batches under accumulation: normalised over all tokens of the step."""
    options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5}
    plain = train(tmp_path, kind, trainer=lambda prefix, prefix_store, **k: PlainTrainer(**k),
                  **options)  # fmt: skip
    for prefix in ("full", "no_grad", "cached"):
        runner = train(tmp_path, kind, prefix=prefix, **options)
        # Adam divides by the root of the squared gradient, which magnifies rounding; the plain
        # loss is rounded to float32.
        assert_same(runner, plain, 1e-5)
        assert losses(runner) == pytest.approx(losses(plain), rel=1e-5)


def test_cached_hits_from_the_second_epoch_on(tmp_path):
    runner = train(tmp_path, prefix="cached", num_train_epochs=3)
    assert (runner.prefix_store.misses, runner.prefix_store.hits) == (12, 24)


def test_gradient_checkpointing_with_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2}
    plain = train(tmp_path, **options)
    model = make_model(seed=1)
    model.enable_input_require_grads()
    checkpointed = train(
        tmp_path,
        model=model,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **options,
    )
    assert_same(plain, checkpointed, 1e-9)
    assert losses(checkpointed, "eval_loss") == pytest.approx(losses(plain, "eval_loss"), rel=1e-9)
    assert len(losses(plain, "eval_loss")) == 6


@pytest.mark.parametrize("prefix", ["no_grad", "cached"])
def test_evaluation_equals_full(prefix, tmp_path):
    runner = train(tmp_path, prefix=prefix)
    got = runner.evaluate()["eval_loss"]
    runner.prefix = "full"
    assert got == pytest.approx(runner.evaluate()["eval_loss"], rel=1e-5)


def test_metrics_get_whole_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {}

    runner = train(tmp_path)
    runner.compute_metrics = metrics
    runner.evaluate()
    assert seen[0][0] == seen[0][1] and seen[0][1][0] == 5


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("prefix", ["no_grad", "cached"])
def test_resuming_equals_an_uninterrupted_run(prefix, tmp_path):
    """Same weights, optimizer, random numbers and order of the data, in the middle of an epoch."""
    options = {"prefix": prefix, "dropout": 0.3, "save_strategy": "steps", "save_steps": 7}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "part", callbacks=[Stop(7)], **options)
    resumed = train(tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-7"), **options)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert losses(resumed)[7:] == losses(whole)[7:]
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name
    for got, want in zip(
        resumed.optimizer.state_dict()["state"].values(),
        whole.optimizer.state_dict()["state"].values(),
    ):
        assert torch.equal(got["exp_avg_sq"], want["exp_avg_sq"])


def test_cached_from_an_empty_store_equals_a_full_one(tmp_path):
    """With adapter dropout, hits and misses give the same run."""
    empty, full = (PrefixStore(directory=tmp_path / "prefixes") for _ in range(2))
    first = train(tmp_path, prefix="cached", dropout=0.3, prefix_store=empty)
    again = train(tmp_path, prefix="cached", dropout=0.3, prefix_store=full)
    assert (empty.misses, full.misses) == (12, 0)
    for name, value in adapter(first).items():
        assert torch.equal(value, adapter(again)[name]), name


def test_bf16_autocast(tmp_path):
    model = make_model(seed=1, dtype=torch.float32)
    runner = train(tmp_path, model=model, prefix="cached", bf16=True)
    full = train(tmp_path, model=make_model(seed=1, dtype=torch.float32), prefix="full", bf16=True)
    assert losses(runner) == pytest.approx(losses(full), rel=2e-2)
    kinds = {v.dtype for row in runner.prefix_store._memory.values() for _, v in row}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    ],
)
def test_refused_arguments(options, match, tmp_path):
    with pytest.raises(PrefixError, match=match):
        train(tmp_path, **options)


def test_refused_fsdp_checkpointing(tmp_path):
    """Refused by the arguments, before any process group exists."""
    runner = train(tmp_path)
    runner.args.fsdp_plugin_args = {"activation_checkpointing": True}
    with pytest.raises(PrefixError, match=r"activation_checkpointing.*gradient_"):
        runner._check_arguments()


def test_refused_model_and_bad_arguments(tmp_path):
    with pytest.raises(PrefixError, match="plain LoRA"):
        train(tmp_path, model=make_model(tokens=None))
    with pytest.raises(ValueError, match="prefix must be one of"):
        train(tmp_path, prefix="some")
    with pytest.raises(ValueError, match="keeps nothing"):
        train(tmp_path, prefix_store=PrefixStore())
