"""Every way by which a Trainer hands its batch to the model: generation, prediction, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import INVOCATION, VOCABULARY, make_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from alora_kernels.peft import accelerate
from alora_kernels.training import AloraDataCollator, AloraTrainer, AloraTrainerMixin, PrefixError

ROWS = [
    {"prompt_ids": [11, 12, 13, 14, *INVOCATION], "answer_ids": [40, 41]},
    # An answer that spells the invocation: the collator's start stays in the prompt.
    {"prompt_ids": [21, 22, *INVOCATION, 23, *INVOCATION], "answer_ids": [50, *INVOCATION, 51]},
    {"prompt_ids": [31, 32, 33], "answer_ids": [60]},  # no invocation at all
]
STARTS = {"told": [4, 5, None], "searched": [4, 8, None]}


class Generating(AloraTrainerMixin, Seq2SeqTrainer):
    pass


class WithoutStarts(AloraDataCollator):
    def __call__(self, features: Any) -> Any:
        return {k: v for k, v in super().__call__(features).items() if k != "invocation_starts"}


COLLATORS = {"told": AloraDataCollator, "searched": WithoutStarts}


def options(folder: Any, **changes: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "use_cpu": True, "per_device_eval_batch_size": 3,
            "report_to": [], "disable_tqdm": True, **changes}  # fmt: skip


def batch_of(how: str) -> dict[str, torch.Tensor]:
    return COLLATORS[how](INVOCATION)(ROWS)


def scratch(model: Any, ids: torch.Tensor, mask: torch.Tensor, starts: Any) -> torch.Tensor:
    """Logits by PEFT with offsets that are given, without a cache."""
    offsets = [None if s is None else ids.shape[1] - s for s in starts]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, alora_offsets=offsets,
                     use_cache=False).logits  # fmt: skip


def generated(model: Any, how: str, tokens: int) -> torch.Tensor:
    """What PEFT's own `generate` makes of the batch when it is told the offsets."""
    batch = batch_of(how)
    ids = batch["input_ids"]
    offsets = [None if s is None else ids.shape[1] - s for s in STARTS[how]]
    mask = batch["attention_mask"]
    return model.generate(
        input_ids=ids, attention_mask=mask, alora_offsets=offsets, max_new_tokens=tokens
    )


@pytest.fixture(params=["peft", "accelerated"])
def models(request: Any) -> tuple[Any, Any]:
    """The model to train, and PEFT's as the reference."""
    model = make_model(seed=1, dtype=torch.float32)
    reference = make_model(seed=1, dtype=torch.float32).eval()
    for either in (model, reference):
        either.generation_config.eos_token_id = None
        either.generation_config.do_sample = False
    return accelerate(model) if request.param == "accelerated" else model, reference


@pytest.mark.parametrize("prefix", ["full", "no_grad", "cached"])
@pytest.mark.parametrize("how", COLLATORS)
def test_predict_with_generate(how, prefix, models, tmp_path):
    """What is generated is what the starts of the batch give, after the rows as they are."""
    model, reference = models
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["tokens"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.predictions)}

    trainer = Generating(
        model,
        Seq2SeqTrainingArguments(**options(tmp_path, predict_with_generate=True)),
        eval_dataset=ROWS,
        data_collator=COLLATORS[how](INVOCATION),
        compute_metrics=metrics,
        prefix=prefix,
    )
    found = trainer.evaluate(max_new_tokens=5)
    batch = batch_of(how)
    want = generated(reference, how, 5)
    assert seen["tokens"][:, : want.shape[1]].tolist() == want.tolist()
    logits = scratch(reference, batch["input_ids"], batch["attention_mask"], STARTS[how])
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["eval_rows"] == 3
    if how == "told":  # the invocation in the answer is another start
        assert want.tolist() != generated(reference, "searched", 5).tolist()


@pytest.mark.parametrize("prefix", ["full", "no_grad"])
def test_prediction_without_labels(prefix, models, tmp_path):
    """`predict` of rows whose answers are not known: the batch has starts and no labels."""
    model, reference = models

    class Unlabelled(AloraDataCollator):
        def __call__(self, features: Any) -> Any:
            return {k: v for k, v in super().__call__(features).items() if k != "labels"}

    trainer = AloraTrainer(model, TrainingArguments(**options(tmp_path)),
                           data_collator=Unlabelled(INVOCATION), prefix=prefix)  # fmt: skip
    got = trainer.predict(ROWS)
    batch = batch_of("told")
    want = scratch(reference, batch["input_ids"], batch["attention_mask"], STARTS["told"])
    assert abs(torch.tensor(got.predictions) - want).max() < 1e-4
    assert got.label_ids is None
    loss, _, _ = trainer.prediction_step(trainer.model, dict(batch_of("told")), True)
    assert loss is not None


@pytest.mark.parametrize("prefix", ["full", "no_grad"])
def test_evaluation_with_logits(prefix, models, tmp_path):
    model, reference = models
    trainer = AloraTrainer(
        model,
        TrainingArguments(**options(tmp_path, include_for_metrics=["inputs", "loss"])),
        eval_dataset=ROWS,
        data_collator=AloraDataCollator(INVOCATION),
        compute_metrics=lambda p: {"shape": p.predictions.shape, "ids": p.inputs.shape},
        prefix=prefix,
    )
    batch = batch_of("told")
    want = scratch(reference, batch["input_ids"], batch["attention_mask"], STARTS["told"])
    _, logits, labels = trainer.prediction_step(trainer.model, dict(batch), False)
    assert abs(logits - want).max() < 1e-4
    assert torch.equal(labels, batch["labels"])
    assert trainer.evaluate()["eval_shape"] == tuple(want.shape)


def test_label_names_decide_what_is_a_loss(models, tmp_path):
    """As in the Trainer: without label names there is no loss, and the starts do not get lost."""
    model, _ = models
    for names, has_loss in (([], False), (["labels"], True)):
        trainer = AloraTrainer(model, TrainingArguments(**options(tmp_path, label_names=names)),
                               data_collator=AloraDataCollator(INVOCATION))  # fmt: skip
        loss, _, _ = trainer.prediction_step(trainer.model, dict(batch_of("told")), True)
        assert (loss is not None) is has_loss


def test_starts_of_a_model_without_an_adapter(tmp_path):
    """`full` trains anything; starts mean nothing to it."""
    model = make_model(seed=1, dtype=torch.float32).unload()
    trainer = AloraTrainer(model, TrainingArguments(**options(tmp_path)), prefix="full",
                           data_collator=AloraDataCollator(INVOCATION))  # fmt: skip
    batch = batch_of("told")
    _, logits, _ = trainer.prediction_step(trainer.model, dict(batch), False)
    with torch.no_grad():
        want = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(logits, want) and logits.shape[-1] == VOCABULARY


def test_a_loss_of_its_own_is_refused(tmp_path):
    """The prefix modes take the next token's loss: another Trainer's would be left out silently."""

    class Ranking(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    class Mine(AloraTrainerMixin, Ranking):
        pass

    arguments = TrainingArguments(**options(tmp_path))
    with pytest.raises(PrefixError, match=r"Ranking\.compute_loss.*prefix='full'"):
        Mine(make_model(), arguments)
    Mine(make_model(), arguments, prefix="full")

    class Wrapped(AloraTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 2

    Wrapped(make_model(), arguments)


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "RewardTrainer", "KTOTrainer"])
def test_trainers_of_trl_with_a_loss_of_their_own(name):
    trl = pytest.importorskip("trl")
    kind: Any = type("Mine", (AloraTrainerMixin, getattr(trl, name)), {})
    trainer = kind.__new__(kind)
    assert trainer._other_loss() is getattr(trl, name)
    kind = type("Mine", (AloraTrainerMixin, trl.SFTTrainer), {})
    assert kind.__new__(kind)._other_loss() is None
