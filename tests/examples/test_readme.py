"""The Python of README.md runs as it stands, given the names that it does not define."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def run(word: str, **given: Any) -> dict[str, Any]:
    """Runs the one snippet that contains `word`; returns its names."""
    (snippet,) = (s for s in SNIPPETS if word in s)
    exec(compile(snippet, f"README.md ({word})", "exec"), given)
    return given


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its tokenizer; float64 when loaded, so that equal means equal."""
    pytest.importorskip("peft")
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("readme") / "tiny")


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = ROOT / "examples" / "data" / "chat_template.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(folder).double(), tokenizer


def adapter(tokenizer: Any, text: str) -> Any:
    """A config; its adapter is not zero."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "v_proj"],
        alora_invocation_tokens=tokenizer.encode(text, add_special_tokens=False),
        init_lora_weights=False,
    )


def test_every_snippet_is_run_here() -> None:
    assert len(SNIPPETS) == 5


def test_a_layer() -> None:
    names = run("from_linear")
    assert names["activation"].mask.view(2, 8).nonzero().tolist() == [[0, i] for i in range(4, 8)]
    for parameter in (names["layer"].lora_A, names["layer"].lora_B):
        assert parameter.grad is not None


def test_functions_of_tensors() -> None:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    weights = {name: drawn(32, 48) for name in ("weight", "wq", "wk")}
    a = {name: drawn(4, 48) for name in ("lora_a", "aq", "ak")}
    b = {name: drawn(32, 4) for name in ("lora_b", "bq", "bk")}
    x, base_out = drawn(2, 8, 48), drawn(2, 8, 32)
    names = run("alora_add(", x=x, base_out=base_out, bias=None, scaling=2.0, **weights, **a, **b)
    change = 2.0 * x[0, 4:] @ a["lora_a"].T @ b["lora_b"].T
    torch.testing.assert_close(names["y"][0, 4:], base_out[0, 4:] + change)
    assert torch.equal(names["y"][1], base_out[1])
    base = x @ weights["wk"].T
    torch.testing.assert_close(names["k"][1], base[1])
    assert not torch.allclose(names["k"][0, 4:], base[0, 4:])


def test_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model

    monkeypatch.chdir(tmp_path)
    base, tokenizer = load(tiny)
    plain = get_peft_model(base, adapter(tokenizer, "<judge>")).eval()
    plain.save_pretrained("my-alora")
    ids = tokenizer("a chat <judge>so", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits
        model = run("PeftModel.from_pretrained", base=load(tiny)[0])["model"].eval()
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)


def test_training(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    base, tokenizer = load(tiny)
    prompt = tokenizer.encode("a long prompt\n<judge>")
    run(
        "AloraTrainer(",
        base=base,
        tokenizer=tokenizer,
        pad=tokenizer.pad_token_id,
        rows=[{"prompt_ids": prompt, "answer_ids": [9, tokenizer.eos_token_id]}] * 4,
        arguments=TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True),
    )
    model = PeftModel.from_pretrained(load(tiny)[0], "my-alora")
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert trained and all(p.any() for p in trained)


@pytest.mark.slow
def test_the_prompt_holds_the_invocation_in_gemmas_tokens() -> None:
    """The invocation of the training snippet, and the prompt of the request to vLLM."""
    import json

    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    from alora_kernels.gguf import gemma_270m

    try:
        tokenizer = AutoTokenizer.from_pretrained(gemma_270m())
    except ImportError:
        pytest.skip("the extra `model` is not installed")
    (line,) = (s for s in SNIPPETS if "encode_invocation(" in s)
    call = next(row for row in line.splitlines() if row.startswith("invocation_tokens ="))
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec("from alora_kernels.invocation import encode_invocation\n" + call, names)
    (request,) = re.findall(r"'(\{\"model\": \"judge\".*\})'", README)
    prompt = tokenizer(json.loads(request)["prompt"])["input_ids"]
    tokens = names["invocation_tokens"]
    assert len(tokens) == 3 and prompt[-3:] == tokens


def test_a_session(tiny: Path) -> None:
    from peft import get_peft_model

    base, tokenizer = load(tiny)
    model = get_peft_model(base, adapter(tokenizer, "<summary>"), adapter_name="summary")
    model.add_adapter("safety", adapter(tokenizer, "<safety>"))
    names = run(
        "session.ask(", model=model.eval(), tokenizer=tokenizer, document="A long document."
    )
    assert len(names["answers"]) == 3
    alone = names["session"].generate("safety", max_new_tokens=64, do_sample=False)
    assert names["answers"][1].token_ids == alone.token_ids
