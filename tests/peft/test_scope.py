"""adapter_scope: the adapter of a block, chosen without touching the model."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from alora_kernels import Activation
from alora_kernels.peft import accelerate, adapter_scope

from .models import ASK, SUM, base_model, prompt, put, twins


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def two_rows():
    ids = prompt(2, 14)
    put(ids, 0, 3, ASK)
    return put(ids, 1, 6, SUM)


def test_none_is_the_base_model_whatever_is_active():
    model, stock = twins()
    ids = two_rows()
    with stock.disable_adapter():
        expected = logits(stock, ids)
    with adapter_scope(model, None):
        assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("name", ["ask", "sum", "plain"])
def test_a_name_runs_that_adapter_for_all_rows(name):
    model, stock = twins()
    ids = two_rows()
    stock.set_adapter(name)
    with adapter_scope(model, name):
        torch.testing.assert_close(logits(model, ids), logits(stock, ids))


def test_a_list_runs_one_adapter_in_each_row():
    model, stock = twins()
    ids = two_rows().repeat(2, 1)
    names = ["ask", "sum", None, "plain"]
    expected = logits(stock, ids, adapter_names=["ask", "sum", "__base__", "plain"])
    with adapter_scope(model, names):
        torch.testing.assert_close(logits(model, ids), expected)


def test_an_activation_replaces_the_search():
    model, stock = twins()
    ids = prompt(2, 12)  # no invocation anywhere
    expected = logits(stock, ids, alora_offsets=[5, None])
    with adapter_scope(model, "ask", Activation.from_starts([7, None], 12)):
        torch.testing.assert_close(logits(model, ids), expected)


def test_an_activation_and_a_list_meet():
    model, stock = twins()
    ids = prompt(3, 12)
    names = ["ask", None, "sum"]
    expected = logits(
        stock, ids, adapter_names=["ask", "__base__", "sum"], alora_offsets=[5, None, 9]
    )
    with adapter_scope(model, names, Activation.from_starts([7, 0, 3], 12)):
        torch.testing.assert_close(logits(model, ids), expected)


def test_starts_serve_prefill_and_decoding():
    model, stock = twins()
    ids = prompt(2, 12)
    expected = logits(stock, ids, alora_offsets=[9, 2])
    with adapter_scope(model, "ask", starts=[3, 10]), torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        cache = first.cache if "cache" in first else first.past_key_values
        steps = [first.logits]
        for t in range(5, 12):
            steps.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected)


def test_a_layer_on_its_own():
    model, _ = twins()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 6, layer.in_features)
    base = layer.base_layer(x)
    with adapter_scope(model, "ask", Activation.from_starts([4, None], 6)):
        y = layer(x)
    delta = layer.lora_B["ask"](layer.lora_A["ask"](x)) * layer.scaling["ask"]
    assert torch.equal(y[1], base[1]) and torch.equal(y[0, :4], base[0, :4])
    torch.testing.assert_close(y[0, 4:], (base + delta)[0, 4:])
    with pytest.raises(RuntimeError, match="outside the forward"):
        layer(x)


def test_the_inner_decoder_on_its_own():
    model, _ = twins()
    ids = put(prompt(2, 10), 0, 2, ASK)
    inner = model.get_base_model().model
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        with adapter_scope(model, "ask", Activation.from_starts([2, None], 10)):
            torch.testing.assert_close(inner(input_ids=ids).last_hidden_state, expected)


def test_threads_and_tasks_see_their_own_scope():
    model, _ = twins()
    ids = two_rows()
    names = [None, "ask", "sum", "plain"]
    expected = {}
    for name in names:
        with adapter_scope(model, name):
            expected[name] = logits(model, ids)
    wrong = []
    barrier = threading.Barrier(len(names))

    def work(name):
        with adapter_scope(model, name):
            barrier.wait()
            wrong.extend(
                name for _ in range(5) if not torch.equal(logits(model, ids), expected[name])
            )

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def task(name):
        with adapter_scope(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                if not torch.equal(logits(model, ids), expected[name]):
                    wrong.append(name)

    async def gather():
        await asyncio.gather(*map(task, names))

    asyncio.run(gather())
    assert not wrong
    assert len({expected[n].sum().item() for n in names}) == len(names)


def test_scopes_of_two_models_at_once():
    one, _ = twins()
    two, _ = twins()
    ids = two_rows()
    with adapter_scope(one, "sum"):
        expected = logits(one, ids)
        with adapter_scope(two, None):
            base = logits(two, ids)
            assert torch.equal(logits(one, ids), expected)
    assert not torch.equal(logits(two, ids), base)


def test_what_is_refused():
    model, stock = twins()
    with pytest.raises(ValueError, match="not accelerated"), adapter_scope(stock, "ask"):
        pass
    with (
        pytest.raises(ValueError, match="unknown adapter 'nobody'"),
        adapter_scope(model, "nobody"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="not both"),
        adapter_scope(model, "ask", Activation.none(4), starts=[1]),
    ):
        pass
    with (
        adapter_scope(model, ["ask", "sum", None]),
        pytest.raises(ValueError, match="3 adapter names were given for a batch of 2"),
    ):
        logits(model, two_rows())
    with pytest.raises(TypeError, match="no LoRA layer"):
        accelerate(base_model())
