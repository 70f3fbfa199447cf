"""A session on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from alora_kernels.inference import Session, identity, storage
from alora_kernels.inference.context import Context
from alora_kernels.inference.views import tensors_of

from .architectures import small_model
from .tiny import WINDOW, base_model, context, peft_model, tokenizer

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, 2 * WINDOW])
def test_a_loaded_session_answers_and_grows_as_the_saved_one(tmp_path: Path, length: int) -> None:
    model = peft_model("gemma3", 8)
    session = Session(model, tokenizer()).extend(context(length, 8))
    session.save(tmp_path / "a")
    other = Session.load(tmp_path / "a", peft_model("gemma3", 8), tokenizer())
    assert other.token_ids == session.token_ids
    for a, b in zip(tensors_of(session.cache), tensors_of(other.cache)):
        assert torch.equal(a, b)
    for s in (session, other):
        s.extend(context(5, 9)[1:])
    assert other.generate("red", **GREEDY) == session.generate("red", **GREEDY)
    assert other.ask(["blue", None], **GREEDY) == session.ask(["blue", None], **GREEDY)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    Session(peft_model("gemma3", 8), tokenizer()).extend(context(9, 8)).save(tmp_path / "a")
    with pytest.raises(ValueError, match="saved for another base model: weights is"):
        Session.load(tmp_path / "a", peft_model("gemma3", 10), tokenizer())
    with pytest.raises(ValueError, match="model_type is 'llama', saved 'gemma3_text'"):
        Session.load(tmp_path / "a", peft_model("llama", 8), tokenizer())


def test_one_changed_element_of_the_weights_is_another_model(tmp_path: Path) -> None:
    """Whatever the element, and whichever way it changed."""
    Session(peft_model("llama", 8), tokenizer()).extend(context(9, 8)).save(tmp_path / "a")
    for path in ("model.layers.1.mlp.down_proj.base_layer.weight", "model.norm.weight"):
        model = peft_model("llama", 8)
        weight = model.get_base_model().get_parameter(path)
        weight.data.view(-1)[7] += 1e-3
        with pytest.raises(ValueError, match="another base model: weights is"):
            Session.load(tmp_path / "a", model, tokenizer())
        weight.data.view(-1)[7] *= -1  # a sum of sizes would not tell
        with pytest.raises(ValueError, match="another base model: weights is"):
            Session.load(tmp_path / "a", model, tokenizer())


def test_adapters_are_not_the_base_model(tmp_path: Path) -> None:
    """A session moves between the base alone and whatever adapters it has."""
    session = Session(peft_model("llama", 8), tokenizer()).extend(context(9, 8))
    session.save(tmp_path / "a")
    bare = Session.load(tmp_path / "a", base_model("llama", 8), tokenizer())
    assert bare.generate(**GREEDY).token_ids == session.generate(**GREEDY).token_ids
    model = peft_model("llama", 8, plain=True)
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_B.red").weight.data += 1
    assert Session.load(tmp_path / "a", model, tokenizer()).token_ids == session.token_ids


def test_a_folder_of_the_first_format_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(peft_model("llama", 8), tokenizer()).extend(context(9, 8))
    session.save(tmp_path / "a")
    header = tmp_path / "a" / "session.json"
    data = json.loads(header.read_text())
    del data["context"]
    data["format"] = "alora_kernels.session.1"
    data["base"]["weights"] = identity.sampled_weights(session.base)
    header.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING, "alora_kernels"):
        other = Session.load(tmp_path / "a", peft_model("llama", 8), tokenizer())
    assert "older version" in caplog.text and other.token_ids == session.token_ids
    assert other.generate("red", **GREEDY) == session.generate("red", **GREEDY)
    other.extend("more")
    with pytest.raises(ValueError, match="another base model: weights is"):
        Session.load(tmp_path / "a", peft_model("llama", 10), tokenizer())


def test_another_config_over_the_same_weights_is_refused(tmp_path: Path) -> None:
    Session(peft_model("mistral", 8), tokenizer()).extend(context(9, 8)).save(tmp_path / "a")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    with pytest.raises(ValueError, match=r"another base model: rope is .*500.0.*, saved .*10000"):
        Session.load(tmp_path / "a", peft_model("mistral", 8, rope_parameters=rope), tokenizer())
    for name, value in (("sliding_window", 8), ("rms_norm_eps", 1e-3), ("sliding_window", None)):
        model = peft_model("mistral", 8)
        setattr(model.get_base_model().config, name, value)
        with pytest.raises(ValueError, match=f"another base model: {name} is {value}, saved"):
            Session.load(tmp_path / "a", model, tokenizer())


def test_a_setting_that_no_list_names_is_compared(tmp_path: Path) -> None:
    """Of the same weights: a dropped rotary embedding, another scale, another activation's clip."""
    Session(small_model("smollm3"), tokenizer()).extend(context(9, 8)).save(tmp_path / "a")
    model = small_model("smollm3")
    assert len(Session.load(tmp_path / "a", model, tokenizer())) == 9
    model.config.no_rope_layers = [0, 0, 1, 1]
    with pytest.raises(ValueError, match="another base model: no_rope_layers is"):
        Session.load(tmp_path / "a", model, tokenizer())


def test_a_config_with_settings_of_each_layer_is_saved(tmp_path: Path) -> None:
    model = small_model("gemma4_text", num_kv_shared_layers=0)
    session = Session(model, tokenizer()).extend(context(20, 8))
    session.save(tmp_path / "a")
    other = Session.load(tmp_path / "a", model, tokenizer())
    assert other.generate(**GREEDY) == session.generate(**GREEDY)


def test_what_does_not_change_the_cache_may_differ(tmp_path: Path) -> None:
    Session(peft_model("mistral", 8), tokenizer()).extend(context(9, 8)).save(tmp_path / "a")
    model = peft_model("mistral", 8, attention="eager", bos_token_id=4, initializer_range=0.2)
    config = model.get_base_model().config
    config._name_or_path, config.transformers_version = "elsewhere", "0"
    config.use_cache = False
    assert len(Session.load(tmp_path / "a", model, tokenizer())) == 9


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    session = Session(peft_model("llama", 8), tokenizer()).extend(context(9, 8))
    session.save(tmp_path / "a")
    with pytest.raises(FileExistsError, match="not empty"):
        session.save(tmp_path / "a")
    header = tmp_path / "a" / "session.json"
    data = json.loads(header.read_text())
    header.write_text(json.dumps({**data, "cached_length": 5}))
    with pytest.raises(ValueError, match=r"layer 0 in .* does not hold 5 tokens"):
        Session.load(tmp_path / "a", session.model, session.tokenizer)
    header.write_text(json.dumps({**data, "format": "other"}))
    with pytest.raises(ValueError, match="has format 'other'"):
        Session.load(tmp_path / "a", session.model, session.tokenizer)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(peft_model("llama", 8), tokenizer()).extend(context(9, 8))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        session.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_files_hold_the_values_that_were_given(tmp_path: Path) -> None:
    """Without a session and without a model: a context, a cache and an identity go to and fro."""
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3), layer)
    context = Context(
        ids=(3, 1, 4, 1, 5, 9),
        border=2,
        text="§",
        messages=({"role": "user", "content": "hi"},),
        rendered="<u>hi",
        prompted=True,
        since="x",
        answer="yes",
    )
    whose = identity.Identity({"model_type": "none", "weights": "0"}, {"clip": 1.5})
    storage.save(tmp_path / "a", context, cache, whose)
    assert storage.read_header(tmp_path / "a") == storage.Saved(context, 5, whose)
    other = DynamicCache()
    for _ in range(2):
        other.layers.append(type(cache.layers[0])())
    storage.fill_cache(tmp_path / "a", 5, other, torch.device("cpu"))
    for a, b in zip(tensors_of(cache), tensors_of(other), strict=True):
        assert torch.equal(a, b)
