"""Derivatives of a whole accelerated model, as influence functions and penalties ask for them."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from .models import ASK, prompt, put, twins


@pytest.fixture
def models():
    """In float64; sdpa has no forward mode on a CPU."""
    pair = twins("llama", torch.float64, layers=1, target_modules=["q_proj", "v_proj"])
    for model in pair:
        model.get_base_model().set_attn_implementation("eager")
    return pair


def trained(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    def loss(parameters, ids):
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        return functional_call(model, parameters, (), inputs).loss

    return loss


def test_torch_func(models):
    ids = put(prompt(1, 12), 0, 4, ASK)
    results = []
    for model in models:
        parameters, loss = trained(model), loss_of(model)
        tangents = {n: torch.ones_like(p) for n, p in parameters.items()}
        gradients = grad(loss)(parameters, ids)
        value, slope = jvp(lambda p, loss=loss: loss(p, ids), (parameters,), (tangents,))
        results.append((list(gradients.values()), value, slope))
    torch.testing.assert_close(*results)


def test_gradients_of_each_sample(models):
    """vmap over token ids, each row with an invocation of its own, or none."""
    model, stock = models
    ids = prompt(3, 12)
    put(put(ids, 0, 2, ASK), 1, 7, ASK)
    together = vmap(grad(loss_of(model)), in_dims=(None, 0))(trained(model), ids.unsqueeze(1))
    for i in range(3):
        stock.zero_grad()
        stock(input_ids=ids[i : i + 1], labels=ids[i : i + 1], use_cache=False).loss.backward()
        for name, value in together.items():
            mine, theirs = value[i], stock.get_parameter(name).grad
            torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_a_gradient_penalty(models):
    ids = put(prompt(1, 12), 0, 4, ASK)
    results = []
    for model in models:
        parameters = [p for p in model.parameters() if p.requires_grad]
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=ids, alora_offsets=[8]).loss
        (dx,) = torch.autograd.grad(loss, embeds, create_graph=True)
        results.append(torch.autograd.grad(dx.pow(2).sum(), parameters, allow_unused=True))
    torch.testing.assert_close(*results)
