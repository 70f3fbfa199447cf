"""A tensor may change in ways that leave no trace on it; no result is of its old values."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alora_kernels import Activation, AloraLinear, alora_linear


def by_data(tensor):
    tensor.data.copy_(torch.randn(tensor.shape))


def by_numpy(tensor):
    bits = tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    fresh = torch.randn(tensor.shape).to(tensor.dtype)
    bits.numpy()[...] = fresh.view(bits.dtype).numpy()


def by_dlpack(tensor):
    torch.from_dlpack(tensor.detach()).copy_(torch.randn(tensor.shape))


def by_storage(tensor):
    fresh = torch.randn(tensor.shape).to(tensor.dtype)
    tensor.untyped_storage().copy_(fresh.untyped_storage())


def by_set(tensor):
    with torch.no_grad():
        tensor.set_(torch.randn(tensor.shape).to(tensor.dtype))


def by_swapped_data(tensor):
    tensor.data = torch.randn(tensor.shape).to(tensor.dtype)


def by_fused_optimizer(tensor):
    leaf = tensor.detach().requires_grad_()
    leaf.grad = torch.randn(tensor.shape).to(tensor.dtype)
    torch.optim.AdamW([leaf], lr=3.0, fused=True).step()


WAYS = [by_data, by_numpy, by_dlpack, by_storage, by_set, by_swapped_data, by_fused_optimizer]


def expected(layer, x, activation):
    """In float64, of the layer's tensors as they are now."""
    layer = copy.deepcopy(layer).double()
    part = x.double() @ layer.lora_A.T @ layer.lora_B.T + layer.lora_bias
    base = F.linear(x.double(), layer.weight, layer.bias)
    return (base + layer.scaling * part * activation.mask.view(*x.shape[:-1], 1)).detach()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("precision", ["compute", "fp32"])
@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B", "lora_bias"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_layer_computes_with_what_its_tensors_hold(way, name, precision, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    base = nn.Linear(16, 24).to(dtype)
    layer = AloraLinear.from_linear(base, r=4, lora_alpha=8, lora_bias=True)
    layer.adapter_precision = precision
    for parameter in (layer.lora_B, layer.lora_bias):
        nn.init.normal_(parameter)
    for activation in (Activation.from_starts([2, None], 6), Activation.all(12)):
        x = torch.randn(2, 6, 16, dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x, activation)
            layer(x, activation)
            before = expected(layer, x, activation)
            way(getattr(layer, name))
            got = layer(x, activation).double()
        wanted = expected(layer, x, activation)
        change = (before - wanted).abs().max()
        assert (got - wanted).abs().max() < 0.25 * change


def test_autocast_casts_as_torch_does():
    """Once in every call, and no copy outlives it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    weight, casts = torch.randn(24, 16), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in func._schema.name and args[0].shape == weight.shape:
                casts.append(func)
            return func(*args, **(kwargs or {}))

    args = (weight, None, torch.randn(4, 16), torch.randn(24, 4), Activation.all(3), 1.0)
    x = torch.randn(3, 16)
    for call in (lambda: F.linear(x, weight), lambda: alora_linear(x, *args)):
        casts.clear()
        with torch.no_grad(), Casts(), torch.autocast("cpu", torch.bfloat16):
            call()
            call()
        assert len(casts) == 2
