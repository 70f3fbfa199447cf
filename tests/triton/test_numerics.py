"""What a comparison with the reference does not show: bits, poison, masks, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alora_kernels.activation import Activation
from alora_kernels.backends.triton import TritonBackend
from alora_kernels.contract import DEFAULTS, Call, Needs, Projection
from alora_kernels.functional import alora_linear
from alora_kernels.reference import keep_mask

from .conftest import Place
from .problems import Case, Problem

F32, BF16 = torch.float32, torch.bfloat16
STRATEGIES = ("delta", "tail", "onepass")


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_delta_leaves_inactive_rows_bit_for_bit(dtype, place: Place, seed: int) -> None:
    problem = Problem(Case("delta", dtype=dtype), place.device, seed)
    y, dx, *_ = problem.run()
    weight, bias = problem.layers[0][:2]
    inactive = ~problem.mask
    assert torch.equal(y[inactive], F.linear(problem.x, weight, bias)[inactive])
    assert torch.equal(dx[inactive], (problem.dys[0] @ weight)[inactive])


def test_delta_stays_finite_on_inactive_rows_with_an_infinite_adapter(place: Place, seed) -> None:
    problem = Problem(Case("delta"), place.device, seed)
    problem.layers[0][3][3] = torch.inf
    (y,) = problem.run(grad=False)
    assert y[~problem.mask].isfinite().all() and not y[problem.mask].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"p": 0.3}, {"prefix": False}], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_poison_in_inactive_rows_reaches_no_other_row(
    strategy: str, options: dict, place: Place, seed: int
) -> None:
    if strategy == "onepass" and "p" in options:
        strategy = "tail"  # forward is refused with dropout
    for dtype in (F32, BF16):
        problem = Problem(Case(strategy, dtype=dtype, **options), place.device, seed)
        clean = problem.run()
        bad = torch.nonzero(~problem.mask).flatten()
        problem.x[bad[0]] = torch.nan
        problem.x[bad[1]] = torch.inf
        problem.dys[0][bad[2]] = torch.nan
        got = problem.run()
        good = torch.ones_like(problem.mask)
        good[bad[:3]] = False
        for name, before, after in zip(["y", "dx", "dA", "dB", "dbias"], clean, got):
            if name in ("y", "dx"):
                before, after = before[good], after[good]
            assert torch.equal(before, after), name
        if not problem.case.prefix:
            assert (got[1][~problem.mask] == 0).all()


@pytest.mark.ptx
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_runs_give_equal_bits(strategy: str, place: Place, seed: int) -> None:
    # Split K in forward and backward, and more than one split of the rows.
    size = (9, 520, 40, 5) if place.compiled else (140, 520, 70, 24)
    case = Case(strategy, dtype=BF16, size=size, active=0.9, count=1 if place.compiled else 2)
    problem = Problem(case, place.device, seed)
    for a, b in zip(problem.run(), problem.run()):
        assert torch.equal(a, b)


@pytest.mark.ptx
@pytest.mark.parametrize("p", [0.25, 0.7])
def test_the_keep_mask_is_the_reference_s(p: float, place: Place, seed: int) -> None:
    """With x = 1, lora_a = e_r and lora_b = e_n the output shows the mask itself."""
    rows, depth = 21, 64
    mask = torch.rand(rows, device=place.device) < 0.7
    eye = torch.eye(depth, device=place.device)
    key = torch.tensor([seed * 2**31 + 12345], device=place.device)
    y = alora_linear(
        torch.ones(rows, depth, device=place.device), torch.zeros_like(eye), None, eye, eye,
        Activation.from_mask(mask), 1.0, dropout_p=p, seed=key, backend="triton", strategy="delta",
    )  # fmt: skip
    kept = keep_mask(key, p, rows, depth) & mask.unsqueeze(1)
    assert torch.equal(y != 0, kept)
    assert 0 < kept.sum() < mask.sum() * depth
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))


@pytest.mark.parametrize("strategy", ["delta", "tail", "onepass"])
def test_dropout_in_dx_on_every_strategy(strategy: str, place: Place, seed: int) -> None:
    """Backward may take another strategy than forward; onepass's dx drops in its epilogue."""
    for dtype in (F32, BF16):
        problem = Problem(Case("tail", dtype=dtype, p=0.4), place.device, seed)
        expected = problem.run()
        w, bias, a, b, s, c = problem.layers[0]
        call = Call(problem.activation, (s,), DEFAULTS._replace(dropout_p=0.4), problem.key)
        projections = [Projection(w, bias, a, b, c)]
        backend = TritonBackend()
        _, xa = backend.forward(call, "tail", problem.x, projections, None, True)
        needs = Needs(True, (True,), (True,), (True,))
        got = backend.backward(call, strategy, problem.x, projections, xa, problem.dys, needs)
        problem.check([expected[0], got.x, got.lora_a[0], got.lora_b[0], got.lora_bias[0]])


def test_expanded_gradients(place: Place, seed: int) -> None:
    """`y.sum().backward()` hands over a dy whose strides are zero."""
    for strategy in STRATEGIES:
        problem = Problem(Case(strategy, dtype=BF16), place.device, seed)
        problem.dys = [torch.ones((), dtype=BF16, device=place.device).expand(37, 90)]
        problem.check(problem.run())


def test_unwritten_output_would_show(place: Place, seed: int, monkeypatch) -> None:
    """Fresh memory is poisoned with NaN: every element of every result must be written."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    for strategy in STRATEGIES:
        for options in ({}, {"prefix": False}, {"count": 2}, {"known": False, "active": 0.0}):
            for size in ((9, 600, 70, 20), (40, 64, 520, 12)):
                case = Case(strategy, dtype=BF16, size=size, **options)
                problem = Problem(case, place.device, seed)
                for result in problem.run():
                    assert result is None or result.isfinite().all(), str(case)


def test_inference_allocates_no_row_of_xa_for_inactive_rows(
    place: Place, seed, monkeypatch
) -> None:
    """delta keeps xa of the active rows alone, onepass none at all."""
    problem = Problem(Case(dtype=BF16, size=(37, 70, 90, 24)), place.device, seed)
    sizes: list[int] = []
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def noted(t: torch.Tensor) -> torch.Tensor:
        sizes.extend([t.numel()] if t.numel() else [])  # the interpreter makes empty ones
        return t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: noted(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: noted(new_empty(*a, **k)))
    problem.run("onepass", grad=False)
    assert sizes == [37 * 90]
    sizes.clear()
    problem.run("delta", grad=False)
    assert sizes == [problem.activation.num_active * 32]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_rows_at_all(strategy: str, place: Place, seed: int) -> None:
    problem = Problem(Case(strategy, size=(0, 33, 17, 3)), place.device, seed)
    y, dx, da, db, dbias = problem.run()
    assert y.shape == (0, 17) and dx.shape == (0, 33)
    for grad in (da, db, dbias):
        assert (grad == 0).all()
