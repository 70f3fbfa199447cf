"""What the plugin says of an adapter's folder before any worker hears of it."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import LoRAConfig, ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from alora_kernels.vllm import peft_config, validate
from alora_kernels.vllm.patch import mismatches

from .bad_adapters import BAD, CONFIG, TENSORS, make_bad
from .serving import INVOCATION, RANK, make_adapter, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("registered")]
TOUCHES = (*peft_config.TOUCHED, *validate.TOUCHED)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def good(model: Path) -> Path:
    return make_adapter(model, model.parent / "good", INVOCATION)


@pytest.fixture(scope="module")
def config(model: Path) -> SimpleNamespace:
    """The parts of vLLM's configuration that are looked at."""
    return SimpleNamespace(
        lora_config=LoRAConfig(max_lora_rank=RANK),
        model_config=ModelConfig(model=str(model), dtype="float32"),
    )


def check(path: Path, config: Any) -> None:
    validate.check(str(path), config.lora_config, config.model_config)


def test_every_touched_place_is_as_expected() -> None:
    assert mismatches(TOUCHES) == []


def test_good_adapters_pass(model: Path, good: Path, config: Any, tmp_path: Path) -> None:
    check(good, config)
    check(make_adapter(model, tmp_path / "plain", None, target_modules="all-linear"), config)
    pattern = {"q_proj": RANK // 2}
    check(make_adapter(model, tmp_path / "ranks", None, rank_pattern=pattern), config)
    ends = ["q_proj", "embed_tokens", "lm_head"]
    check(make_adapter(model, tmp_path / "ends", None, target_modules=ends), config)


def test_the_older_file_format_passes(good: Path, config: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    old = tmp_path / "old"
    shutil.copytree(good, old)
    tensors = load_file(old / TENSORS)
    (old / TENSORS).unlink()
    torch.save(tensors, old / "adapter_model.bin")
    check(old, config)
    (old / "adapter_model.bin").write_bytes(b"no tensors")
    with pytest.raises(validate.BadAdapter, match="not a readable file of tensors"):
        check(old, config)


@pytest.mark.parametrize("what", BAD)
def test_bad_adapters_are_told_apart(what: str, good: Path, config: Any, tmp_path: Path) -> None:
    _, status, words = BAD[what]
    with pytest.raises(validate.BadAdapter) as caught:
        check(make_bad(good, tmp_path / "bad", what), config)
    assert words in str(caught.value)
    assert caught.value.missing == (status == 404)


def test_a_mended_adapter_passes_and_a_broken_one_is_seen(
    good: Path, config: Any, tmp_path: Path
) -> None:
    bad = make_bad(good, tmp_path / "bad", "cut safetensors")
    with pytest.raises(validate.BadAdapter):
        check(bad, config)
    shutil.copy(good / TENSORS, bad / TENSORS)
    check(bad, config)
    (bad / CONFIG).write_text("{")
    os.utime(bad / CONFIG, ns=(1, 1))
    with pytest.raises(validate.BadAdapter):
        check(bad, config)


def test_a_folder_is_read_once_until_it_changes(
    good: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(good, config)
    monkeypatch.setattr(validate, "_examine", None)
    check(good, config)


def test_a_model_that_transformers_cannot_build_is_checked_by_its_configuration(
    good: Path, config: Any, tmp_path: Path
) -> None:
    unknown = SimpleNamespace(
        lora_config=config.lora_config, model_config=SimpleNamespace(hf_config=None)
    )
    check(good, unknown)
    with pytest.raises(validate.BadAdapter, match="says r=4"):
        check(make_bad(good, tmp_path / "bad", "another rank in the tensors"), unknown)


def test_every_way_into_the_engine_is_guarded(good: Path, config: Any, tmp_path: Path) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    reached: list[Any] = []

    async def later(request: Any) -> bool:
        return bool(reached.append(request)) or True

    core = SimpleNamespace(add_lora=lambda r: bool(reached.append(r)) or True, add_lora_async=later)
    engine: Any = SimpleNamespace(
        vllm_config=config, engine_core=core, lora_config=config.lora_config, tokenizer=None
    )
    bad = LoRARequest("bad", 1, str(make_bad(good, tmp_path / "bad", "cut safetensors")))
    fine = LoRARequest("fine", 2, str(good))
    with pytest.raises(VLLMValidationError, match=r"Loading lora bad failed: .*safetensors"):
        LLMEngine.add_lora(engine, bad)
    with pytest.raises(VLLMValidationError, match="Loading lora bad failed"):
        asyncio.run(AsyncLLM.add_lora(engine, bad))
    with pytest.raises(VLLMValidationError, match="Loading lora bad failed"):
        InputProcessor._validate_lora(engine, bad)
    assert not reached
    assert LLMEngine.add_lora(engine, fine) and asyncio.run(AsyncLLM.add_lora(engine, fine))
    InputProcessor._validate_lora(engine, fine)
    InputProcessor._validate_lora(engine, None)
    assert reached == [fine, fine]


def test_a_loaded_adapter_outlives_its_folder(good: Path, config: Any, tmp_path: Path) -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    shutil.copytree(good, tmp_path / "gone")
    engine: Any = SimpleNamespace(
        vllm_config=config, lora_config=config.lora_config, tokenizer=None
    )
    request = LoRARequest("gone", 1, str(tmp_path / "gone"))
    InputProcessor._validate_lora(engine, request)
    shutil.rmtree(tmp_path / "gone")
    InputProcessor._validate_lora(engine, request)
    with pytest.raises(VLLMValidationError, match="is not a folder"):
        InputProcessor._validate_lora(engine, LoRARequest("other", 2, str(tmp_path / "gone")))
