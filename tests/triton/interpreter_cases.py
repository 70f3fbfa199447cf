"""Forward and all gradients of the backend against the float64 reference.

Collected by `test_interpreter.py` in a process whose TRITON_INTERPRET is set before any import.
"""

from __future__ import annotations

import pytest
import torch

from alora_kernels.activation import Activation
from alora_kernels.backends import Call, Needs, Projection
from alora_kernels.backends.triton import TritonBackend
from alora_kernels.reference import alora_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1, 1), (5, 33, 17, 3), (37, 70, 90, 24), (70, 64, 128, 65)]


def run(seed, strategy, dtype, size, fraction, *, p=0.0, prefix=True, known=True, count=1,
        precision="compute", add=False, adapter=None):  # fmt: skip
    m, k, n, r = size
    mask = torch.rand(m) < fraction
    act = Activation.from_mask(mask)
    if not known:
        act = Activation(act.row_adapter, act.active_rows, act.active_count)
    dev = "cpu"
    x = torch.randn(m, 2 * k, device=dev).to(dtype)[:, ::2]
    x[~mask] = 3.0
    ad = adapter or dtype
    ps = [
        Projection(
            torch.randn(k, n).to(dtype).t() / k**0.5, torch.randn(n).to(dtype),
            (torch.randn(r, k) / k**0.5).to(ad), (torch.randn(n, r) / r**0.5).to(ad),
            torch.randn(n).to(ad),
        )
        for _ in range(count)
    ]  # fmt: skip
    dys = [torch.randn(n, m).to(dtype).t() for _ in ps]
    key = torch.tensor([-(seed + 2**40)])
    scalings = tuple(1.5 - 0.5 * i for i in range(count))
    call = Call(act, scalings, p, key if p else None, prefix, precision)
    needs = Needs(True, (True,) * count, (True,) * count, (True,) * count)

    def expected(dt):
        leaf = x.to(dt).detach().requires_grad_()
        params, outs = [], []
        for q, s in zip(ps, scalings):
            a, b, c = ((t.to(dtype) if precision == "compute" else t).to(
                dt).requires_grad_() for t in (q.lora_a, q.lora_b, q.lora_bias))  # fmt: skip
            base = torch.zeros(m, n, dtype=dt) if add else None
            outs.append(alora_linear_reference(
                leaf, q.weight.to(dt), q.bias.to(dt), a, b, mask, s, lora_bias=c, dropout_p=p,
                seed=key, prefix_grad=prefix, adapter_precision=precision, base_out=base,
            ))  # fmt: skip
            params += [a, b, c]
        g = torch.autograd.grad(outs, [leaf, *params], [d.to(dt) for d in dys], allow_unused=True)
        return [*outs, *g]

    backend = TritonBackend()
    given = [torch.zeros(m, n, dtype=dtype) for _ in ps] if add else None
    todo = [q._replace(weight=None, bias=None) for q in ps] if add else ps
    ys, xa = backend.forward(call, strategy, x, todo, given, True)
    got = backend.backward(call, strategy, x, todo, xa, dys, needs)
    again = backend.backward(call, strategy, x, todo, xa, dys, needs)
    flat = [*ys, got.x]
    for i in range(count):
        flat += [got.lora_a[i], got.lora_b[i], got.lora_bias[i]]
        assert torch.equal(got.lora_a[i], again.lora_a[i])
        assert torch.equal(got.lora_b[i], again.lora_b[i])
    for i, (g, exact, torchs) in enumerate(zip(flat, expected(torch.float64), expected(dtype))):
        if exact is None:
            exact = torchs = torch.zeros_like(g)
        error = (g.double() - exact).abs().max().item()
        size = exact.abs().max().item()
        limit = 2 * (torchs.double() - exact).abs().max().item()
        # The largest error of few elements is noisy: two ulp are always allowed.
        assert error <= max(limit, 2 * torch.finfo(dtype).eps * size), (i, error, limit, size)
    if not prefix:
        assert (got.x[~mask] == 0).all()


@pytest.mark.parametrize("strategy", ["delta", "tail"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_matches_reference(seed, strategy, dtype, size, fraction):
    run(seed, strategy, dtype, size, fraction)


@pytest.mark.parametrize("strategy", ["delta", "tail"])
@pytest.mark.parametrize(
    "options",
    [{"p": 0.3}, {"prefix": False}, {"prefix": False, "p": 0.3}, {"known": False}, {"count": 3},
     {"count": 2, "p": 0.3}],
    ids=str,
)  # fmt: skip
def test_options(seed, strategy, options):
    run(seed, strategy, torch.float32, (37, 70, 90, 24), 0.4, **options)


def test_add(seed):
    run(seed, "delta", torch.float32, (37, 70, 90, 24), 0.4, add=True)
