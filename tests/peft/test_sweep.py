"""The sweep: a sample of architectures, and what the sweep itself must be able to see."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

if not dataclasses.is_dataclass(transformers.LlamaConfig):
    pytest.skip("the sweep needs configs that are dataclasses", allow_module_level=True)

from alora_kernels import Activation
from alora_kernels.peft import accelerate
from alora_kernels.reference import alora_linear_reference

from . import sweep as program
from .sweeping import checks, models, subject
from .sweeping.definition import Definition, RowsUnknown, spread, strays, weights_of
from .sweeping.models import Architecture, NotMade, architectures
from .sweeping.subject import Subject
from .sweeping.verdict import failure

ARCHITECTURES = {arch.name: arch for arch in architectures()}
# Kinds: positions of its own, latent attention, recurrent, both.
FAST = ("bart", "roberta", "diffllama", "deepseek_v3", "mamba2", "bamba")
ALL_EQUAL = ("llama", "gemma3_text", "qwen3", "mixtral", "gpt_neox")
BATCH, TOKENS = 2, 7


def verdicts(name: str, only: Any = tuple(checks.CHECKS)) -> dict[str, Any]:
    return dict(program.run_one(ARCHITECTURES[name], only))


def bad(rows: dict[str, Any]) -> list[str]:
    """What is neither equal nor refused, in words."""
    return [
        f"{name}, {check}: {verdict.kind}: {verdict.detail}"
        for name, row in rows.items()
        for check, verdict in row.items()
        if verdict.bad
    ]


# ---------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", FAST)
def test_equal_or_refused_by_name(name: str) -> None:
    row = verdicts(name)
    assert row["made"].kind == "made"
    assert not bad({name: row})


@pytest.mark.parametrize("name", ALL_EQUAL[:2])
def test_plain_decoders_refuse_nothing(name: str) -> None:
    row = verdicts(name)
    assert {check: v.kind for check, v in row.items() if check not in ("made", "others")} == {
        check: "equal" for check in checks.CHECKS if check != "others"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_EQUAL[2:])
def test_more_plain_decoders_refuse_nothing(name: str) -> None:
    test_plain_decoders_refuse_nothing(name)


@pytest.mark.slow
def test_a_random_sample(seed: int) -> None:
    names = random.Random(seed).sample(sorted(ARCHITECTURES), 40)
    args = argparse.Namespace(only=list(checks.CHECKS), jobs=1, limit=120.0, seed=0)
    rows = program.sweep([ARCHITECTURES[name] for name in names], args)
    assert sum(row["made"].kind == "made" for row in rows.values()) > 25
    assert not bad(rows)


# ---------------------------------------------------------------------- the definition


@pytest.fixture(scope="module")
def llama() -> Subject:
    return Subject(ARCHITECTURES["llama"])


def test_the_definition_is_what_stock_peft_computes(llama: Subject) -> None:
    with torch.no_grad():
        stock = llama.stock(input_ids=llama.ids, use_cache=False).logits
        defined = llama.definition.logits(llama.ids, ["ask"] * 2, llama.starts)
        base = llama.base(input_ids=llama.ids, use_cache=False).logits
    torch.testing.assert_close(defined, stock, rtol=0, atol=1e-6)
    assert (stock - base).abs().max() > 0.1


def test_the_definition_over_a_cache_is_the_one_without(llama: Subject) -> None:
    whole = llama.definition.greedy(llama.ids, ["ask", "sum"], [12, 20], 4)
    with llama.definition.running(["ask", "sum"], [12, 20], cached=True) as model:
        out = model.generate(
            llama.ids, max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    # `generate` rounds logits to float32.
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), whole, rtol=0, atol=1e-5)
    assert not llama.base._forward_pre_hooks  # nothing stays on the base model


@pytest.mark.parametrize(
    ("lead", "first", "kept", "rows"),
    [
        ((BATCH, TOKENS), 0, 0, slice(None)),
        ((BATCH, TOKENS, 4), 0, 0, slice(None)),
        ((BATCH, 4, TOKENS), 0, 0, slice(None)),
        ((TOKENS, BATCH), 0, 0, slice(None)),
        ((BATCH * TOKENS,), 0, 0, slice(None)),
        ((1, BATCH * TOKENS), 0, 0, slice(None)),
        ((BATCH, 3), 4, 0, slice(4, None)),  # the new tokens behind a cache of 4
        ((BATCH, 1, TOKENS), 4, 0, slice(None)),  # all of them: a latent cache
        ((BATCH, 1), 0, 1, slice(6, None)),  # logits_to_keep=1
    ],
)
def test_rows_are_told_apart_by_their_position(
    lead: tuple[int, ...], first: int, kept: int, rows: slice
) -> None:
    on = torch.rand(BATCH, TOKENS) > 0.5
    found = spread(on, lead, first, kept)
    assert found is not None
    full = found.expand(*lead, 1).squeeze(-1)
    wanted = on[:, rows]
    if lead[:2] == (TOKENS, BATCH):
        full = full.transpose(0, 1)
    for row in range(BATCH):
        for column in range(wanted.shape[1]):
            mine = full.reshape(BATCH, -1) if len(lead) < 3 else full
            cell = (
                mine[row, :, column] if lead[-1] == TOKENS and len(lead) > 2 else mine[row, column]
            )
            assert (cell == wanted[row, column]).all()


@pytest.mark.parametrize("lead", [(BATCH, 5), (BATCH,), (3, TOKENS), (BATCH * TOKENS + 1,)])
def test_other_rows_are_nobody_s(lead: tuple[int, ...]) -> None:
    assert spread(torch.ones(BATCH, TOKENS), lead, 0) is None


def test_a_layer_with_other_rows_is_named(llama: Subject) -> None:
    model = torch.nn.ModuleDict({"inner": torch.nn.Linear(4, 4), "outer": torch.nn.Linear(4, 4)})

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        x = torch.ones(*input_ids.shape, 4)
        return model["outer"](x), model["inner"](x[:, :3])

    model.forward = forward  # type: ignore[method-assign]
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    found, ran = strays(model, ["inner", "outer"], ids)
    assert list(found) == ["inner"] and "[2, 3]" in found["inner"]
    assert ran == {"inner", "outer"}
    weights = {"a": {"inner": (torch.ones(1, 4), torch.ones(4, 1), 1.0)}}
    with (
        pytest.raises(RowsUnknown, match="inner"),
        Definition(model, weights).running(["a"] * BATCH, [0] * BATCH) as base,
    ):
        base(input_ids=ids, use_cache=False)


# ---------------------------------------------------------------------- what must be seen


def test_an_adapter_that_is_off_is_wrong(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: Any) -> Any:
        model.base_model.disable_adapter_layers()
        return model

    monkeypatch.setattr(subject, "accelerate", off)
    kinds = {name: checks.CHECKS[name](llama).kind for name in ("forward", "left", "generate")}
    assert kinds == {"forward": "WRONG", "left": "WRONG", "generate": "WRONG"}


def test_an_adapter_that_begins_too_early_is_wrong(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(model: Any) -> Any:
        for config in model.peft_config.values():
            config.alora_invocation_tokens = None
        for module in model.modules():
            getattr(module, "lora_variant", {}).clear()
        return model

    monkeypatch.setattr(subject, "accelerate", plain)
    assert checks.forward(llama).kind == "WRONG"
    assert checks.chunks(llama).kind == "WRONG"


def test_a_gradient_that_is_scaled_is_wrong(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checks.prefix_forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        out.loss = out.loss.detach() + 1.01 * (out.loss - out.loss.detach())
        return out

    assert checks.prefix(llama).kind == "equal"
    monkeypatch.setattr(checks, "prefix_forward", scaled)
    assert checks.prefix(llama).detail.startswith("gradient")


def test_other_answers_of_a_session_are_wrong(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checks.Session.generate

    def later(self: Any, adapter: str | None, prompt: Any, **options: Any) -> Any:
        return real(self, None, prompt, **options)

    monkeypatch.setattr(checks.Session, "generate", later)
    assert checks.session(llama).kind == "WRONG"


def test_refused_is_an_error_raised_here_and_nothing_else() -> None:
    def kind(function: Any) -> str:
        with pytest.raises(Exception) as caught:
            function()
        return failure(caught.value).kind

    assert kind(lambda: accelerate(torch.nn.Linear(2, 2))) == "refused"
    assert kind(lambda: torch.ones(2) @ torch.ones(3)) == "error"
    assert kind(lambda: [].pop()) == "error"
    # Torch's own complaint about shapes, from inside the package, names no reason.
    layer = torch.nn.Linear(2, 2)
    adapter = (torch.ones(1, 2), torch.ones(2, 1), Activation.all(1), 1.0)
    product = functools.partial(alora_linear_reference, torch.ones(1, 3), layer.weight, None)
    assert kind(lambda: product(*adapter)) == "error"


def test_a_large_model_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MOST_PARAMETERS", 1000)
    with pytest.raises(NotMade, match="parameters"):
        models.base_model(ARCHITECTURES["llama"])


def test_every_kind_of_layer_comes_up() -> None:
    config = models.small_config("qwen3_next")
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert set(models.small_config("gemma3_text").layer_types) == {
        "sliding_attention",
        "full_attention",
    }


def test_markdown_joins_what_is_equal(tmp_path: Path) -> None:
    made, equal, wrong = (program.Verdict(k) for k in ("made", "equal", "WRONG"))
    rows = {
        "one": {"made": made, "forward": equal},
        "two": {"made": made, "forward": wrong},
        "three": {"made": made, "forward": equal},
        "four": {"made": program.Verdict("not made", "too\n large")},
    }
    table = program.markdown(rows, ["forward"])
    lines = table.splitlines()
    assert lines[0].startswith("3 of 4 architectures")
    assert "| equal | 2: one, three |" in lines and "| WRONG | 1: two |" in lines
    assert lines[-1] == "- four: too large"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sweep -->\nold\n<!-- /sweep -->\nafter\n")
    program.write_markdown(page, table)
    assert page.read_text() == f"before\n<!-- sweep -->\n{table}\n<!-- /sweep -->\nafter\n"
    page.write_text("no place")
    with pytest.raises(SystemExit, match="once each"):
        program.write_markdown(page, table)


@pytest.mark.slow
def test_the_command_and_its_limit(tmp_path: Path) -> None:
    command = [sys.executable, program.__file__, "llama", "--only", "forward"]
    file = tmp_path / "sweep.csv"
    done = subprocess.run([*command, "--csv", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llama,forward,equal," in file.read_text()
    done = subprocess.run([*command, "--limit", "0"], capture_output=True, text=True)
    assert done.returncode == 0 and "no answer within 0 s" in done.stdout


def test_two_adapters_of_a_model_are_read_apart() -> None:
    base = models.base_model(Architecture("llama", "LlamaForCausalLM", "causal"))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    a, b = weights_of(model, "a"), weights_of(model, "b")
    assert set(a) == {f"model.layers.{i}.self_attn.q_proj" for i in range(len(base.model.layers))}
    assert not torch.equal(*(w["model.layers.0.self_attn.q_proj"][0] for w in (a, b)))
