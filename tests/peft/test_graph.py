"""What the layers do not do: search, synchronise, upload, break a graph."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alora_kernels import Activation
from alora_kernels.peft import accelerate, adapter_scope

from .models import ASK, SUM, adapted, base_model, prompt, put, twins

# Ops that read the device from the host, or make the host's data a device tensor.
WAITING = ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal", "masked_select")
UPLOADING = ("lift_fresh", "_to_copy", "scalar_tensor")


class Count(TorchDispatchMode):
    """Counts ops by name while a LoRA layer runs, and outside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.outside: list[str] = []
        self.depth = 0
        self.handles = []
        for module in model.modules():
            if hasattr(module, "lora_A"):
                self.handles += [
                    module.register_forward_pre_hook(lambda *_: self.step(1)),
                    module.register_forward_hook(lambda *_: self.step(-1)),
                ]

    def step(self, change):
        self.depth += change

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        (self.inside if self.depth else self.outside).append(name)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)


def of(names, kinds):
    return [n for n in names if n in kinds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_layers_neither_wait_nor_upload(dtype, train):
    model, stock = twins(dtype=dtype)
    ids = put(put(prompt(3, 12), 0, 3, ASK), 1, 7, ASK)
    model.train(train)
    stock.train(train)
    counts = []
    for m in (model, stock):
        with torch.set_grad_enabled(train):
            if not train:
                m(input_ids=ids)  # casts of frozen weights are made once, not per call
            with Count(m) as count:
                loss = m(input_ids=ids, labels=ids).loss
                count.inside.append("mark")
                if train:
                    count.depth = 1  # backward: nothing at all may wait or upload
                    loss.backward()
        counts.append(count)
    ours, theirs = counts
    assert "addmm" in ours.inside or "mm" in ours.inside
    assert not of(ours.inside, WAITING)
    assert not of(ours.inside, ("lift_fresh", "scalar_tensor"))
    assert len(of(theirs.inside, (*WAITING, "index", "index_put_"))) >= 14  # what PEFT does
    if dtype is torch.float32:
        assert not of(ours.inside, UPLOADING)


def test_the_search_happens_once_per_forward(monkeypatch):
    from alora_kernels.peft import generate, sequences

    model, _ = twins()
    calls = []
    search = sequences.find_invocation_starts
    for module in (sequences, generate):
        monkeypatch.setattr(
            module, "find_invocation_starts", lambda *a: calls.append(1) or search(*a)
        )
    ids = put(prompt(2, 12), 0, 3, ASK)
    model(input_ids=ids)
    assert len(calls) == 1
    model.base_model.set_adapter(["ask", "sum"])
    model(input_ids=ids)
    assert len(calls) == 3  # once for each invocation
    model.set_adapter("ask")
    calls.clear()
    model.generate(input_ids=ids, max_new_tokens=5, attention_mask=torch.ones_like(ids))
    assert len(calls) == 1  # in the prompt


def test_a_group_reads_x_once(monkeypatch):
    from alora_kernels.peft import layers

    model, _ = twins()
    counts, run = [], layers.run

    def counted(name, x, projections, *args, **kwargs):
        counts.append(len(projections))
        return run(name, x, projections, *args, **kwargs)

    monkeypatch.setattr(layers, "run", counted)
    model(input_ids=put(prompt(2, 12), 0, 3, ASK))
    assert counts == [3, 1, 2, 1] * 2


# ---------------------------------------------------------------------- torch.compile


def compiled(model, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset leaves: the process counts on
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


def test_fullgraph_of_the_whole_model():
    """The search is part of the graph: other starts, same graph, right result.

    In a new thread, where nothing has run: the graph must not be guarded by that.
    """
    model, stock = twins(layers=1)
    fast = compiled(model)

    def run():
        for places in ((3, 7), (0, 9), (5, 2)):
            ids = put(put(prompt(3, 12), 0, places[0], ASK), 1, places[1], ASK)
            with torch.no_grad():
                torch.testing.assert_close(
                    fast(input_ids=ids, use_cache=False).logits, stock(input_ids=ids).logits
                )

    with ThreadPoolExecutor(1) as threads:
        threads.submit(run).result()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_fullgraph_training():
    model, stock = twins(layers=1)
    fast = compiled(model)
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 7, ASK)
    fast(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    stock(input_ids=ids, labels=ids).loss.backward()
    for mine, other in zip(model.parameters(), stock.parameters()):
        if other.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_fullgraph_of_the_inner_decoder_under_a_scope():
    model, _ = twins(layers=1)
    inner = model.get_base_model().model
    fast = compiled(inner)
    ids = prompt(2, 12)
    activations = [Activation.from_starts(s, 12) for s in ([3, 7], [None, 2])]
    with torch.no_grad():
        for activation in activations:
            with adapter_scope(model, "ask", activation):
                expected = inner(input_ids=ids, use_cache=False).last_hidden_state
                got = fast(input_ids=ids, use_cache=False).last_hidden_state
                torch.testing.assert_close(got, expected)


def test_fullgraph_of_the_decoder_that_the_hook_prepares():
    """The model is eager, its decoder is compiled: the state comes from outside the graph."""
    model, stock = twins(layers=1)
    decoder = model.get_base_model().model
    decoder.compile(backend="aot_eager", fullgraph=True)
    for start in (3, 6):
        ids = put(prompt(2, 12), 0, start, ASK)
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=ids, use_cache=False).logits, stock(input_ids=ids).logits
            )


@pytest.mark.slow
def test_two_adapters_in_one_graph():
    model, stock = twins(layers=1)
    model.base_model.set_adapter(["ask", "sum"])
    eager = copy.deepcopy(model)
    ids = put(put(prompt(2, 14), 0, 3, ASK), 1, 7, SUM)
    with torch.no_grad():
        expected = eager(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled(model)(input_ids=ids, use_cache=False).logits, expected)
    assert not torch.equal(expected, stock(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
@pytest.mark.slow
def test_fullgraph_of_other_decoders(kind):
    stock = adapted(base_model(kind))
    model = accelerate(copy.deepcopy(stock))
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(model)(input_ids=ids, use_cache=False).logits, stock(input_ids=ids).logits
        )
