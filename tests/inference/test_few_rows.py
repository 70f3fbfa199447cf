"""The output layer of a few rows: the same sums, for this thread only, and gone afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alora_kernels.inference import Session
from alora_kernels.inference import few_rows as module
from alora_kernels.inference.few_rows import FEW, few_rows

from .tiny import INVOCATIONS, context, peft_model, tokenizer


def tiny(bias: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=93,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    if bias:
        model.set_output_embeddings(nn.Linear(48, 93))
    return model


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """How many rows each turned product had."""
    rows: list[int] = []
    true = module.turned_linear

    def counted(x, weight, bias):
        rows.append(x.shape[:-1].numel())
        return true(x, weight, bias)

    monkeypatch.setattr(module, "turned_linear", counted)
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (5, 1), (5,), (2, 2, 2)], ids=str)
def test_result(shape, bias, count):
    """Bound by twice the largest error of PyTorch's own product in five draws."""
    model = tiny(bias)
    head = model.get_output_embeddings()
    exact = nn.Linear(48, 93, bias=bias).double()
    exact.load_state_dict(head.state_dict())
    bound = 0.0
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(*shape, 48)
            true = exact(x.double())
            bound = max(bound, float((head(x) - true).norm()))
        with few_rows(model):
            y = head(x)
    assert len(count) == 1
    assert y.shape == true.shape and y.is_contiguous() and y.dtype == torch.float32
    assert (y - true).norm() <= 2 * bound


@torch.no_grad()
def test_what_is_left_alone(count):
    model = tiny()
    head = model.get_output_embeddings()
    few, one, many = torch.randn(3, 48), torch.randn(1, 48), torch.randn(FEW + 1, 48)
    with few_rows(model):
        assert torch.equal(head(one), nn.functional.linear(one, head.weight))
        assert torch.equal(head(many), nn.functional.linear(many, head.weight))
        with torch.enable_grad():
            assert head(few).requires_grad
        model.bfloat16()
        head(few.bfloat16())
    assert count == []
    with few_rows(model.float()):
        head(few)
        with few_rows(model):  # as when two threads ask
            head(few)
        head(few)
    head(few)
    assert count == [3, 3, 3] and "forward" not in head.__dict__


def test_an_error_and_hooks(count):
    model = tiny()
    head = model.get_output_embeddings()
    seen = []
    head.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(KeyError), few_rows(model), torch.no_grad():
        head(torch.randn(2, 48))
        raise KeyError
    assert seen == [1] and count == [2] and "forward" not in head.__dict__


def test_other_threads_keep_theirs(count):
    model = tiny()
    head, x = model.get_output_embeddings(), torch.randn(3, 48)
    with few_rows(model), torch.no_grad():
        other = threading.Thread(target=lambda: head(x))
        other.start()
        other.join()
        assert count == []
        head(x)
    assert count == [3]


def test_a_layer_that_is_not_plain_is_left_alone(count):
    class Head(nn.Linear):
        """Somebody's own."""

    model = tiny()
    for head in (Head(48, 93), nn.Linear(48, 93)):
        model.set_output_embeddings(head)
        if type(head) is nn.Linear:
            own = lambda x: x  # noqa: E731
            head.forward = own
        with few_rows(model), torch.no_grad():
            head(torch.randn(3, 48))
        assert count == [] and (type(head) is Head or head.__dict__["forward"] is own)


def test_ask_takes_it(count):
    model = peft_model("llama", 0)
    session = Session(model, tokenizer()).extend(context(12, 0))
    answers = session.ask([*INVOCATIONS, None], max_new_tokens=3, do_sample=False)
    assert set(count) == {len(answers)} and len(count) >= 3
    count.clear()
    session.generate("red", max_new_tokens=3, do_sample=False)
    assert count == []
