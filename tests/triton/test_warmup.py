"""`alora_kernels.warmup`: what a model will need is compiled, and nothing else happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import alora_kernels
from alora_kernels import Activation, AloraLinear, activate, dispatch, warmup
from alora_kernels.backends.triton import run
from alora_kernels.run import forget

from .compile_only import compile_only
from .conftest import CHOSEN

pytestmark = pytest.mark.skipif(CHOSEN == "interpret", reason="the interpreter compiles nothing")


@pytest.fixture
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors are Triton's: compiled for sm_90, launched by nothing."""
    monkeypatch.setenv("ALORA_BACKEND", "triton")
    with compile_only(90):
        forget()
        yield
    forget()


def layer(**options: object) -> AloraLinear:
    made = AloraLinear(64, 128, r=8, lora_alpha=16, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    made.strategy = "tail"
    return made


def test_the_first_step_compiles_nothing_more(triton_alone: None) -> None:
    """Forward and backward after `warmup` find every kernel in Triton's own cache."""
    from triton.runtime.jit import JITFunction

    model = nn.Sequential(layer(lora_dropout=0.1))
    count = warmup(model, [40], active_fractions=(0.5,), progress=False)
    assert count >= 4
    caches = [k.device_caches for k in run.KERNELS.values()]
    before = [[len(c[0]) for c in cache.values()] for cache in caches]
    x = torch.zeros(40, 64, dtype=torch.bfloat16, requires_grad=True)
    with activate(Activation.from_starts([20], 40)):
        y = model(x)
    y.backward(torch.zeros_like(y))
    assert isinstance(run.KERNELS["gemm"], JITFunction)
    assert [[len(c[0]) for c in cache.values()] for cache in caches] == before


def test_a_peft_model_s_first_forward_compiles_nothing_more(triton_alone: None) -> None:
    """Its groups of q, k and v, and of gate and up, are known too."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = peft.LoraConfig(
        r=8, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM", init_lora_weights=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(LlamaForCausalLM(llama).to(torch.bfloat16), config).eval()
    alora_kernels.accelerate(model)
    assert warmup(model, [40], active_fractions=(0.5,), progress=False) >= 3
    caches = [k.device_caches for k in run.KERNELS.values()]
    before = [[len(c[0]) for c in cache.values()] for cache in caches]
    ids = torch.ones(1, 40, dtype=torch.int64)
    ids[0, 20:22] = torch.tensor([5, 6])
    with torch.no_grad():
        model(input_ids=ids)
    assert [[len(c[0]) for c in cache.values()] for cache in caches] == before


def test_equal_layers_are_compiled_once_and_nothing_changes(
    triton_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    compile_ = dispatch.BACKENDS["triton"].compile  # type: ignore[attr-defined]
    monkeypatch.setattr(
        dispatch.BACKENDS["triton"], "compile",
        lambda *a, **k: calls.append(a) or compile_(*a, **k), raising=False,
    )  # fmt: skip
    model = nn.Sequential(*[layer() for _ in range(5)]).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    warmup(model, [1, 1], active_fractions=(1.0,), progress=False)
    assert len(calls) == 1
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_a_bar_moves_on(triton_alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert warmup(layer().eval(), [1], active_fractions=(1.0,)) > 0


def test_where_triton_does_not_run_it_says_what_does(caplog: pytest.LogCaptureFixture) -> None:
    assert warmup(AloraLinear(8, 8, r=2, lora_alpha=2), [4]) == 0
    assert "Triton runs none of these calls: cpu runs them on cpu" in caplog.text
    assert "the tensors are on cpu" in caplog.text


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Linear has no AloraLinear.*accelerate\(model\) first"):
        alora_kernels.warmup(nn.Linear(8, 8), [4])
    for lengths in ([], [0, 4]):
        with pytest.raises(ValueError, match="lengths must be positive"):
            warmup(AloraLinear(8, 8, r=2, lora_alpha=2), lengths)
