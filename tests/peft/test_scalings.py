"""PEFT's ways of changing a scaling: hot swaps, rescaling, set_scale, compiled or not."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from alora_kernels.peft import accelerate

from .models import ASK, base_model, layers, lora, prompt, put, twins


@pytest.fixture
def ids():
    return put(prompt(2, 12), 0, 4, ASK)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("order", ["prepared first", "accelerated first"])
def test_a_hot_swap(tmp_path, ids, order, compiled):
    base = base_model()
    wanted = {}
    for name, rank, alpha in (("a", 4, 16), ("b", 8, 8), ("c", 2, 64)):
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
            init_lora_weights=False, alora_invocation_tokens=ASK,
        )  # fmt: skip
        stock = get_peft_model(copy.deepcopy(base), config).eval()
        stock.save_pretrained(tmp_path / name)
        with torch.no_grad():
            wanted[name] = stock(input_ids=ids).logits
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    if order == "accelerated first":
        accelerate(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    if order == "prepared first":
        accelerate(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
    with torch.no_grad():
        torch.testing.assert_close(run(input_ids=ids, use_cache=False).logits, wanted["a"])
        for name in ("b", "c"):
            hotswap_adapter(model, str(tmp_path / name), adapter_name="default")
            torch.testing.assert_close(run(input_ids=ids, use_cache=False).logits, wanted[name])
    assert len(graphs) <= 1


def test_a_block_with_another_scale(ids):
    model, stock = twins()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with rescale_adapter_scale(model, 0.3), rescale_adapter_scale(stock, 0.3):
            torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_scalings_of_one_group_differ(ids):
    model, stock = twins()
    for m in (model, stock):
        q, v, _ = layers(m)
        q.scaling["ask"], v.scaling["ask"] = torch.tensor(0.5), 3
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("dynamic", [None, True], ids=str)
def test_no_more_graphs_than_peft(ids, dynamic):
    """A plain LoRA, which PEFT compiles as one graph; its scale changes between the calls."""
    base = base_model(num_hidden_layers=1)
    stock = get_peft_model(base, lora(None, target_modules=["q_proj", "up_proj"])).eval()
    counts = []
    for model in (stock, accelerate(copy.deepcopy(stock), strict=True)):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
        with torch.no_grad():
            for scale, length in ((1.0, 12), (0.5, 12), (2.0, 9)):
                with rescale_adapter_scale(model, scale):
                    got = compiled(input_ids=ids[:, :length], use_cache=False).logits
                    wanted = model(input_ids=ids[:, :length], use_cache=False).logits
                torch.testing.assert_close(got, wanted)
        counts.append(len(graphs))
    assert counts[1] <= counts[0]
