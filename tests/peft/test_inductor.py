"""Inductor's code for an accelerated decoder, and `generate` with a compiled forward."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
import transformers

from .models import ASK, VOCAB, prompt, put, twins

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
    ),
]


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_logits(kind, dtype):
    """Bound by twice the error of PEFT's eager model, or inductor's own on the base model.

    PEFT's error is the largest of five draws, as in the other tests' oracle.
    """
    model, stock = twins(kind, dtype)
    exact = copy.deepcopy(stock).double()
    base, ids = copy.deepcopy(stock).unload(), prompt(3, 12)
    with torch.no_grad():
        plain = torch.compile(base, fullgraph=True)(input_ids=ids, use_cache=False).logits
        with exact.disable_adapter():
            inductors = (plain - exact(input_ids=ids).logits).norm()
    fast = torch.compile(model, fullgraph=True)
    before = graphs()
    for places in ((3, 7), (0, 9)):
        bound = 0.0
        with torch.no_grad():
            for _ in range(5):
                ids = put(put(prompt(3, 12), 0, places[0], ASK), 1, places[1], ASK)
                true = exact(input_ids=ids).logits
                bound = max(bound, (stock(input_ids=ids).logits - true).norm())
            error = (fast(input_ids=ids, use_cache=False).logits - true).norm()
        assert error <= 2 * max(bound, inductors)
    assert graphs() == before + 1  # the starts are no part of the graph


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name.removeprefix("_orig_mod."): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def test_gradients():
    """Bound by twice the error of PEFT's model, eager or in inductor's code, of five draws."""
    model, stock = twins()
    exact = copy.deepcopy(stock).double()
    fast, inductors = torch.compile(model, fullgraph=True), torch.compile(stock)
    bounds: dict[str, float] = {}
    for _ in range(5):
        ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 7, ASK)
        true = gradients(exact, ids)
        for theirs in (stock, inductors):
            for name, grad in gradients(theirs, ids).items():
                error = float((grad - true[name]).norm())
                bounds[name] = max(bounds.get(name, 0.0), error)
    mine = gradients(fast, ids)
    assert mine.keys() == true.keys() == bounds.keys()
    for name, grad in mine.items():
        assert (grad - true[name]).norm() <= 2 * bounds[name] + 1e-7 * true[name].norm(), name


def settings(backend: str) -> transformers.CompileConfig:
    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU alone
    return config


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_compiles_its_decoding(kind):
    """A static cache; the graph of one prompt serves the next, whose invocation is elsewhere."""
    model, _ = twins(kind)
    made = []
    for places in ((3, 7), (0, 9), (6, 2)):
        ids = put(put(prompt(3, 12), 0, places[0], ASK), 1, places[1], ASK)
        how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        how |= {"attention_mask": torch.ones_like(ids), "cache_implementation": "static"}
        how |= {"output_logits": True, "return_dict_in_generate": True}
        slow = model.generate(input_ids=ids, disable_compile=True, **how)
        fast = model.generate(input_ids=ids, compile_config=settings("inductor"), **how)
        assert fast.sequences.shape == (3, 17) and slow.sequences.max() < VOCAB
        made.append(graphs())
        for one, other in zip(fast.logits, slow.logits):
            torch.testing.assert_close(one, other)
    assert made == [1, 1, 1]
