"""prefix_forward on a model that `accelerate` serves."""

from __future__ import annotations

import pytest
from models import KINDS, alone, gradients, make_batch, make_model, worst

from alora_kernels.peft import accelerate
from alora_kernels.training import PrefixStore, prefix_forward


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_alone(kind, checkpointing, seed):
    model = make_model(kind, seed=seed)
    batch = make_batch([(20, 6), (11, 9), (3, 4), (0, 7)], "left", seed)
    loss, grads = alone(model, *batch)
    accelerate(model, strict=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    store = PrefixStore()
    for mode in ("full", "no_grad", "cached", "cached"):
        output = prefix_forward(model, *batch, mode, store=store, chunk_size=8)
        output.loss.backward()
        assert abs(output.loss - loss) <= 1e-12 * loss, mode
        assert worst(gradients(model), grads) <= 1e-12, mode
    assert (store.misses, store.hits) == (3, 3)


def test_two_forwards_before_a_backward_with_checkpointing(seed):
    """PEFT's own hooks refuse this; the accelerated model does not need them."""
    model = make_model(seed=seed)
    batch = make_batch([(20, 6), (11, 9)], seed=seed)
    _, grads = alone(model, *batch)
    accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first, second = prefix_forward(model, *batch).loss, prefix_forward(model, *batch).loss
    (first / 2).backward()
    (second / 2).backward()
    assert worst(gradients(model), grads) <= 1e-12
