"""The training example end to end on a tiny model, and the data that it ships."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import alora_finetuning
import make_appointments as make
import pytest
import rows
import scoring
import torch

from ..inference.tiny import CHAT_TEMPLATE, base_model, tokenizer
from .finetune import EXAMPLES, make_folder, run

DATA = EXAMPLES / "data"


def load(name: str) -> list[Any]:
    return [json.loads(line)["messages"] for line in (DATA / name).read_text().splitlines()]


def test_no_conversation_place_or_question_is_in_both_files() -> None:
    train, heldout = load("appointments_train.jsonl"), load("appointments_heldout.jsonl")
    assert (len(train), len(heldout)) == (288, 120)
    for first, second in (
        (make.TRAIN_PLACES, make.HELDOUT_PLACES),
        (make.TRAIN_NAMES, make.HELDOUT_NAMES),
        (make.TRAIN_QUESTIONS, make.HELDOUT_QUESTIONS),
    ):
        assert not set(first) & set(second)

    words = [*make.TRAIN_PLACES, *make.HELDOUT_PLACES, *make.TRAIN_NAMES, *make.HELDOUT_NAMES]
    slot = re.compile("|".join([*map(re.escape, words), *make.DAYS, r"\d+:\d\d"]), re.IGNORECASE)

    def shapes(rows: list[Any]) -> set[str]:
        return {slot.sub("_", " / ".join(m["content"] for m in row[:-2])) for row in rows}

    assert len(shapes(train)) > 30 and len(shapes(heldout)) > 20
    assert not {s for s in shapes(train) & shapes(heldout) if len(s) > 12}
    for row in train + heldout:
        day, time, place = row[-1]["content"].split(" | ")
        said = " ".join(m["content"] for m in row[:-1]).lower()
        assert day.lower() in said and time in said and place.lower() in said
        assert [m["role"] for m in row[::2]] == ["user"] * (len(row) // 2)


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    train = make.conversations(DATA / "conversations_train.txt")
    made = make.rows(train, make.TRAIN_PLACES, make.TRAIN_NAMES, make.TRAIN_QUESTIONS, 8, 1)
    assert [row["messages"] for row in made] == load("appointments_train.jsonl")


def test_the_interval_is_wilsons() -> None:
    score = scoring.Score(8, 10)
    assert score.interval == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert scoring.Score(0, 10).interval[0] == 0.0


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("", True), (" Fri", True), ("Friday |", True), ("Friday | 9:00", True),
        ("Friday | 9:00 \n", True), ("Fri\ufffd", True), ("Friday |  9", False),
        ("Friday | 9:00.", False), ("friday", False), ("The", False),
    ],
)  # fmt: skip
def test_an_answer_is_wrong_once_it_cannot_become_the_expected_one(
    text: str, possible: bool
) -> None:
    assert scoring.may_become(text, "Friday | 9:00") is possible


def test_ending_wrong_answers_early_changes_no_score(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Half of the expected answers are what the model writes when nothing ends it early."""
    tok, model = tokenizer(CHAT_TEMPLATE), base_model("llama", seed)
    generator = torch.Generator().manual_seed(seed)

    def example(prompt: list[int], answer: str) -> Any:
        return rows.Example([{"role": "assistant", "content": answer}], prompt, [5] * 12)

    prompts = [torch.randint(4, 40, (n,), generator=generator).tolist() for n in range(5, 15)]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "may_become", lambda text, expected: True)
        _, texts = scoring.exact_match(model, tok, [example(p, "") for p in prompts])
        wanted = [t if i % 2 else f"{t}?" for i, t in enumerate(texts)]
        examples = [example(p, t) for p, t in zip(prompts, wanted)]
        slow, _ = scoring.exact_match(model, tok, examples)
    quick, _ = scoring.exact_match(model, tok, examples)
    assert quick == slow and quick.right == 5
    wrong = [example(p, "\u00a7") for p in prompts]
    _, answers = scoring.exact_match(model, tok, wrong)
    assert sum(map(len, answers)) < sum(map(len, texts))


def test_rows_are_checked() -> None:
    tok = tokenizer(CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (example,) = rows.encode(tok, [chat], "<a>", [2])
    assert tok.decode(example.prompt_ids) == "^<u>hi§\n<a>"
    assert tok.decode(example.answer_ids) == "yo§"
    (own,) = rows.encode(tok, [chat], "[sum]", [2])
    assert tok.decode(own.prompt_ids).endswith("§\n[sum]")
    with pytest.raises(rows.RowError, match="the answer has no end token"):
        rows.encode(tok, [chat], "<a>", [77])
    twice = tokenizer("^" + CHAT_TEMPLATE)
    with pytest.raises(rows.RowError, match="more than one BOS"):
        rows.encode(twice, [chat], "<a>", [2])
    with pytest.raises(rows.RowError, match="is not a local file"):
        rows.load_rows("nobody/nothing-of-this-name")

    class Merging:
        """Joins "<a" with the line break before it when it stands in a text."""

        eos_token, bos_token_id = "§", 1
        apply_chat_template = staticmethod(tok.apply_chat_template)
        decode = staticmethod(tok.decode)

        def __call__(self, text: str, **kwargs: Any) -> Any:
            ids = tok(text, **kwargs)["input_ids"]
            joined = tok("\n<", add_special_tokens=False)["input_ids"]
            for i in range(len(ids) - 1):
                if ids[i : i + 2] == joined:
                    return {"input_ids": [*ids[:i], 95, *ids[i + 2 :]]}
            return {"input_ids": ids}

    with pytest.raises(rows.RowError, match="merged it with its neighbours") as caught:
        rows.encode(Merging(), [chat], "<a>", [2])
    assert "the invocation alone: '<' 'a' '>'" in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_the_script_trains_and_stock_peft_loads_its_adapter(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    seen: dict[str, Any] = {}
    fit = alora_finetuning.fit

    def spy(display: Any, name: str, model: Any, *rest: Any) -> Any:
        result = fit(display, name, model, *rest)
        ids = torch.tensor([[1, 30, 31, *tokenizer()("<a>")["input_ids"], 40, 41]])
        with torch.no_grad():
            seen[name] = ids, model.eval()(input_ids=ids).logits
        seen[f"{name} weights"] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }
        seen[f"{name} log"] = result[1]
        return result

    monkeypatch.setattr(alora_finetuning, "fit", spy)
    flags = ("--num_epochs", "2", "--eval_step", "2", "--save_step", "3", "--learning_rate", "0.01")
    assert run(folder, *flags) == 0
    stock = PeftModel.from_pretrained(base_model("gemma3", 6), folder / "out").eval()
    ids, wanted = seen["aLoRA"]
    with torch.no_grad():
        got = stock(input_ids=ids).logits
    named = dict(stock.named_parameters())
    for name, value in seen["aLoRA weights"].items():
        assert torch.equal(named[name], value), name
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    log = seen["aLoRA log"]
    losses = [float(entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert (folder / "out" / "loss.png").stat().st_size > 5000
    assert (folder / "out" / "aLoRA-checkpoints" / "checkpoint-3").is_dir()
    printed = capsys.readouterr().out
    assert "plain LoRA" in printed and "base, zero-shot" in printed and "0/12" in printed
    with torch.no_grad(), stock.disable_adapter():
        assert not torch.equal(stock(input_ids=ids).logits, got)


def test_a_plain_lora_takes_the_same_loss_from_fewer_logits() -> None:
    from alora_kernels.training import AloraDataCollator

    model = base_model("gemma3", 6)
    collator = AloraDataCollator([9, 9], pad_token_id=0)
    features = [
        {"prompt_ids": [1, 30, 31, 32, 9, 9], "answer_ids": [40, 41, 2]},
        {"prompt_ids": [1, 30, 9, 9], "answer_ids": [50, 2]},
    ]
    whole = collator(features)
    del whole["invocation_starts"]
    part = alora_finetuning._for_plain_lora(collator)(features)
    assert part["labels"].shape == (2, 6) and part["logits_to_keep"] == 6
    with torch.no_grad():
        wanted, got = model(**whole), model(**part)
    assert got.logits.shape[1] == 6
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=1e-7)
