"""The mixin over TRL's SFTTrainer: right with its loss options, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import INVOCATION, make_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from alora_kernels.training import AloraTrainerMixin, PrefixError  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w7 w8 "
    "{% generation %}{{ m['content'] }} w2 {% endgeneration %}"
    "{% else %}w3 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w7 w8 {% endif %}"
)


class AloraSFTTrainer(AloraTrainerMixin, trl.SFTTrainer):
    pass


def make_tokenizer() -> Any:
    words = {f"w{i}": i for i in range(97)}
    core = Tokenizer(WordLevel(words, unk_token="w9"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="w2",
        pad_token="w0",
        unk_token="w9",
        chat_template=TEMPLATE,
    )


def words(count: int, generator: torch.Generator) -> str:
    ids = torch.randint(10, 97, (count,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in ids)


def make_rows(form: str) -> Any:
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(6):
        prompt, answer = words(8 + i, generator), words(3 + i % 3, generator)
        if i == 2:
            answer += " w7 w8 " + words(2, generator)  # an answer that contains the invocation
        if form == "completion":
            rows.append({"prompt": prompt + " w7 w8 ", "completion": answer})
        elif form == "chat":
            answer = answer.replace("w7 w8", "w11 w12")
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
        else:
            rows.append({"text": f"{prompt} w7 w8 " + answer.replace("w7 w8", "w11 w12")})
    return datasets.Dataset.from_list(rows)


def train(folder, form, prefix, **options):
    args = trl.SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        dataset_num_proc=None,
        seed=3,
        **options,
    )
    runner = AloraSFTTrainer(
        model=make_model(seed=1),
        args=args,
        train_dataset=make_rows(form),
        processing_class=make_tokenizer(),
        prefix=prefix,
    )
    runner.train()
    return runner


def adapter(runner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in runner.model.named_parameters() if p.requires_grad}


def assert_same(a, b):
    for name, value in adapter(a).items():
        torch.testing.assert_close(value, adapter(b)[name], rtol=1e-4, atol=1e-5, msg=name)


def losses(runner):
    return [e["loss"] for e in runner.state.log_history if "loss" in e]


def test_assistant_only_loss(tmp_path):
    full = train(tmp_path, "chat", "full", assistant_only_loss=True)
    for prefix in ("no_grad", "cached"):
        mine = train(tmp_path, "chat", prefix, assistant_only_loss=True)
        assert_same(mine, full)
        assert losses(mine) == pytest.approx(losses(full), rel=1e-4)
        last = [e for e in mine.state.log_history if "loss" in e][-1]
        assert last["num_tokens"] > 0 and 0 <= last["mean_token_accuracy"] <= 1
    prefix_hits = mine.prefix_store.hits
    assert prefix_hits > 0


def test_completion_only_loss_keeps_the_start_in_the_prompt(tmp_path):
    """TRL's batches tell where the answer begins: an invocation in an answer is not the start."""
    runner = train(tmp_path, "completion", "no_grad", completion_only_loss=True)
    batch = next(iter(runner.get_train_dataloader()))
    rows = runner.train_dataset["input_ids"]
    seen = 0
    for row in rows:
        starts = [i for i in range(len(row) - 1) if list(row[i : i + 2]) == INVOCATION]
        if len(starts) == 2:
            ids = torch.tensor([row])
            labels = torch.full_like(ids, -100)
            labels[:, starts[0] + 2 :] = ids[:, starts[0] + 2 :]
            got = runner._starts_before_answer({"input_ids": ids, "labels": labels})
            assert got.tolist() == [starts[0]]
            seen += 1
    assert seen == 1
    assert (batch["labels"] != -100).any()
    full = train(tmp_path, "completion", "full", completion_only_loss=True)
    assert losses(runner) == pytest.approx(losses(full), rel=1e-6)
    assert_same(runner, full)


def test_loss_over_the_whole_text_gives_the_same_gradients(tmp_path):
    """The prefix's loss is a constant: it is left out of the value, not out of the mean."""
    full = train(tmp_path, "text", "full")
    with pytest.warns(UserWarning, match="stand at or before the invocation"):
        mine = train(tmp_path, "text", "no_grad")
    assert_same(mine, full)
    assert all(a < b for a, b in zip(losses(mine), losses(full)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": True, "max_length": 32}, "packing=True"),
        ({"padding_free": True, "max_length": None}, "padding_free=True"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
    ],
)
def test_refused_by_name(options, match, tmp_path):
    with pytest.raises(PrefixError, match=match):
        train(tmp_path, "text", "no_grad", **options)
