"""Every flag of the fine-tuning example does what its name says, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import alora_finetuning
import loading
import pytest
import rows
import torch

from ..inference.tiny import CHAT_TEMPLATE, base_model, tokenizer
from .finetune import chats, make_folder, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


QUICK = ("--no_compare", "--heldout_path", "")


def logs_of(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """What each training logs, filled while the script runs."""
    logs: list[list[dict[str, Any]]] = []
    fit = alora_finetuning.fit

    def spy(*arguments: Any) -> Any:
        result = fit(*arguments)
        logs.append(result[1])
        return result

    monkeypatch.setattr(alora_finetuning, "fit", spy)
    return logs


def values(log: list[dict[str, Any]], key: str) -> list[float]:
    return [float(entry[key]) for entry in log if key in entry]


def test_the_adapter_has_the_shape_that_was_asked_for(folder: Path) -> None:
    flags = ("--lora_r", "3", "--lora_alpha", "9", "--lora_dropout", "0.25")
    assert run(folder, *QUICK, *flags, "--lora_target_modules", "o_proj,down_proj") == 0
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 9.0, 0.25)
    assert set(config["target_modules"]) == {"o_proj", "down_proj"}
    assert config["alora_invocation_tokens"] == tokenizer()("<a>")["input_ids"]
    assert not (folder / "out" / "aLoRA-checkpoints").exists()  # --save_step 0


def test_batch_size_epochs_rate_and_validation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine rows in batches of two, three epochs: 15 steps; evaluated at 7, 14 and the end."""
    logs = logs_of(monkeypatch)
    flags = ("--batch_size", "2", "--num_epochs", "3", "--learning_rate", "0.02")
    assert run(folder, *QUICK, *flags, "--val_set_size", "3", "--eval_step", "7") == 0
    (log,) = logs
    assert log[-1]["step"] == 15 and log[-1]["epoch"] == 3
    assert 0.015 < max(values(log, "learning_rate")) <= 0.02
    assert [e["step"] for e in log if "eval_loss" in e][:2] == [7, 14]
    logs.clear()
    assert run(folder, *QUICK, *flags, "--val_set_size", "0") == 0
    assert logs[0][-1]["step"] == 18 and not values(logs[0], "eval_loss")
    logs.clear()
    assert run(folder, *QUICK, *flags, "--eval_step", "0") == 0
    assert not values(logs[0], "eval_loss")


def test_every_prefix_trains_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = logs_of(monkeypatch)
    for prefix in ("full", "no_grad", "cached"):
        flags = ("--prefix", prefix, "--num_epochs", "2", "--learning_rate", "0.01")
        assert run(folder, *QUICK, *flags) == 0
    full, no_grad, cached = (values(log, "loss") for log in logs)
    assert len(full) >= 4 and full[-1] < full[0]
    assert no_grad == pytest.approx(full, rel=1e-4)
    assert cached == pytest.approx(full, rel=1e-4)


def test_cutoff_takes_the_beginning_of_the_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Recording(alora_finetuning.AloraDataCollator):  # type: ignore[name-defined, misc]
        def __call__(self, features: Any) -> Any:
            seen.append(super().__call__(features))
            return seen[-1]

    monkeypatch.setattr(alora_finetuning, "AloraDataCollator", Recording)
    assert run(folder, *QUICK, "--cutoff_len", "16", "--batch_size", "1") == 0
    tok = tokenizer()
    wanted = tok("<a>")["input_ids"]
    assert len(seen) >= 8
    for batch in seen:
        ids = batch["input_ids"][0].tolist()
        start = int(batch["invocation_starts"][0])
        assert len(ids) == 16 and ids[0] == 1  # BOS is spared
        assert ids[start : start + len(wanted)] == wanted
        assert tok.decode(ids[start + len(wanted) :]).startswith("it is ")
        assert batch["labels"][0, start + len(wanted) :].tolist() == ids[start + len(wanted) :]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("names", [None, ("input", "output"), ("prompt", "completion")])
def test_local_files(form: str, names: tuple[str, str] | None, tmp_path: Path) -> None:
    import datasets

    table = [
        {"messages": chat}
        if names is None
        else {names[0]: chat[0]["content"], names[1]: chat[1]["content"]}
        for chat in chats(3)
    ]
    path = tmp_path / f"chats.{form}"
    if form == "json":
        path.write_text(json.dumps(table))
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    else:
        datasets.Dataset.from_list(table).to_parquet(path)
    assert rows.load_rows(str(path)) == chats(3)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        rows.load_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(rows.RowError, match=r"expected one of \.json, \.jsonl, \.parquet"):
        rows.load_rows(str(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text('{"question": "x"}')
    with pytest.raises(rows.RowError, match=r"row 0 has \['question'\]"):
        rows.load_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": chats(1)[0][:1]}))
    with pytest.raises(rows.RowError, match="must end with the assistant's answer"):
        rows.load_rows(str(tmp_path / "b.jsonl"))


def test_a_gguf_is_converted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def convert(name: str, target: Path) -> Path:
        calls.append(name)
        base_model("gemma3", 6).save_pretrained(target)
        tokenizer(CHAT_TEMPLATE).save_pretrained(target)
        return target

    monkeypatch.setattr(loading, "convert_gguf", convert)
    for _ in range(2):
        assert run(folder, *QUICK, "--base_model", "some.gguf") == 0
    assert calls == ["some.gguf"]
    assert (folder / "out" / "base-model" / "config.json").is_file()
    assert (folder / "out" / "adapter_model.safetensors").is_file()


def test_a_base_model_that_nobody_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--base_model", "nobody/nothing-of-this-name") == 2
    printed = capsys.readouterr().out
    assert "--base_model nobody/nothing-of-this-name: not a local folder" in printed
    assert not (folder / "out").exists()


def test_a_failed_push_loses_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("the line went dead")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    flags = ("--push_to_hub", "--hub_model_id", "me/x")
    assert run(folder, *QUICK, *flags) == 2
    printed = capsys.readouterr().out
    assert "pushing to me/x failed: the line went dead" in printed
    assert "The adapter is safe in" in printed
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert (folder / "out" / "loss.png").is_file()


def test_a_push_takes_the_adapter_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: pushed.update(k))
    flags = ("--push_to_hub", "--hub_model_id", "me/x", "--save_step", "2")
    assert run(folder, *QUICK, *flags) == 0
    assert pushed["repo_id"] == "me/x" and pushed["folder_path"] == str(folder / "out")
    assert "*-checkpoints/*" in pushed["ignore_patterns"]


def test_a_device_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--device", "cuda:99") == 2
    assert "--device cuda:99:" in capsys.readouterr().out
    assert run(folder, "--device", "abacus") == 2
    assert "--device abacus:" in capsys.readouterr().out


def test_a_model_whose_prefix_needs_a_gradient_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base_model("gemma3", 6, attention_dropout=0.1).save_pretrained(folder / "base")
    logs = logs_of(monkeypatch)
    assert run(folder, *QUICK) == 2
    assert "attention_dropout=0.1" in capsys.readouterr().out and not logs
    assert run(folder, *QUICK, "--prefix", "full") == 0


def test_the_hub_is_asked_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, "--push_to_hub") == 2
    assert "--push_to_hub needs --hub_model_id" in capsys.readouterr().out

    def nobody(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", nobody)
    assert run(folder, "--push_to_hub", "--hub_model_id", "me/x") == 2
    assert "no valid login for the hub" in capsys.readouterr().out
    assert not (folder / "out").exists()


def test_bad_flags_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--val_set_size", "12") == 2
    assert "leaves nothing of 12 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_quantize_trains_on_four_bits(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Its CPU kernel packs whole blocks of 64 inputs.
    wide = base_model("gemma3", 6, hidden_size=64, intermediate_size=128, head_dim=16)
    wide.save_pretrained(folder / "base")
    layers: list[Any] = []
    fit = alora_finetuning.fit

    def spy(display: Any, name: str, model: Any, *rest: Any) -> Any:
        layers.extend(m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
        return fit(display, name, model, *rest)

    monkeypatch.setattr(alora_finetuning, "fit", spy)
    flags = ("--num_epochs", "1", "--eval_step", "1", "--no_compare", "--learning_rate", "0.01")
    assert run(folder, "--quantize", *flags) == 0, capsys.readouterr().out
    assert layers and all(layer.weight.quant_type == "nf4" for layer in layers)
