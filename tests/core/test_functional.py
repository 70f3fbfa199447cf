"""alora_linear, alora_linear_group and alora_add against the reference, on the CPU backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alora_kernels import Activation, alora_add, alora_linear, alora_linear_group
from alora_kernels.reference import keep_mask

from ..oracle import assert_within_bound, make_case, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One row, one feature, one column, one rank; odd sizes; more rows than features; R > N.
SIZES = [((1,), 1, 1, 1), ((7,), 33, 21, 5), ((2, 50), 16, 48, 24), ((2, 3, 5), 40, 8, 65)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("strided", [True, False])
def test_values_and_gradients(dtype, size, fraction, strided) -> None:
    lead, depth, width, rank = size
    case = make_case(lead, depth, width, rank, dtype=dtype, fraction=fraction, strided=strided)
    assert_within_bound(run(case, alora_linear), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(1,), (1, 1), (9,), (2, 9)])
@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 4}], ids=["", "dropout"])
def test_without_gradients(dtype, lead, fraction, options) -> None:
    """Inference has short ways of its own: one row, and all rows active."""
    case = make_case(lead, 70, 48, 8, dtype=dtype, fraction=fraction)
    if "seed" in options:
        options = {**options, "seed": torch.tensor([options["seed"]])}
    case = case.with_options(**options)
    args = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation)
    with torch.no_grad():
        linear = alora_linear(*args, case.scaling, lora_bias=case.lora_bias, **options)
        base = F.linear(case.x, case.weight, case.bias)
        added = alora_add(
            base, case.x, *args[3:], case.scaling, lora_bias=case.lora_bias, **options
        )
    assert_within_bound({"y": linear}, case)
    assert_within_bound({"y": added}, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["compute", "fp32"])
def test_float32_adapters_over_a_16_bit_base(dtype, precision) -> None:
    case = make_case(
        (3, 40), 64, 48, 8, dtype=dtype, adapter_dtype=torch.float32, adapter_precision=precision
    )
    got = run(case, alora_linear)
    assert got["y"].dtype == got["dx"].dtype == dtype
    assert got["dlora_a"].dtype == torch.float32
    assert_within_bound(got, case)


def test_the_precisions_differ() -> None:
    case = make_case((3, 40), 64, 48, 8, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    compute = run(case, alora_linear)
    fp32 = run(case.with_options(adapter_precision="fp32"), alora_linear)
    assert not torch.equal(compute["dlora_a"], fp32["dlora_a"])


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 3, 4)])
def test_one_to_four_dimensions(lead) -> None:
    case = make_case(lead, strided=bool(lead), fraction=0.7)
    got = run(case, alora_linear)
    assert got["y"].shape == (*lead, 21)
    assert_within_bound(got, case)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset"])
def test_any_strides_of_x(layout) -> None:
    case = make_case((3, 8), 16, strided=False)
    x = torch.randn(8, 3, 16)
    case.x = {
        "transposed": x.transpose(0, 1),
        "expanded": x[:1, :1].expand(3, 8, 16),
        "offset": torch.randn(5, 11, 20)[1:4, 2:10, 3:19],
    }[layout]
    assert_within_bound(run(case, alora_linear), case)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_bias", [True, False])
def test_with_and_without_biases(bias, lora_bias) -> None:
    case = make_case(bias=bias, lora_bias=lora_bias)
    assert_within_bound(run(case, alora_linear), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inactive_rows_equal_the_base_bit_for_bit(dtype) -> None:
    case = make_case((2, 40), 64, 48, 8, dtype=dtype, strided=False)
    case.lora_b[0, 0] = torch.inf  # even beside an adapter that overflowed
    y = alora_linear(
        case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation, 1.5
    ).view(80, -1)
    base = F.linear(case.x, case.weight, case.bias).view(80, -1)
    assert torch.equal(y[~case.mask], base[~case.mask])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_what_an_inactive_row_holds_stays_there(bad, dropout_p, seed) -> None:
    case = make_case((30,), dropout_p=dropout_p, seed=torch.tensor([seed]))
    case.mask[4] = False
    clean = run(case, alora_linear)
    case.x[4] = bad
    case.dy[4] = bad
    dirty = run(case, alora_linear)
    for name in ("dlora_a", "dlora_b", "dlora_bias"):
        assert torch.equal(clean[name], dirty[name]), name
    others = torch.arange(30) != 4
    for name in ("y", "dx"):
        torch.testing.assert_close(clean[name][others], dirty[name][others])


@pytest.mark.parametrize("strided", [True, False])
def test_prefix_grad_false_leaves_inactive_rows_at_zero(strided) -> None:
    case = make_case((2, 30), prefix_grad=False, strided=strided)
    got = run(case, alora_linear)
    assert (got["dx"].view(60, -1)[~case.mask] == 0).all()
    assert_within_bound(got, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix_grad", [True, False])
@pytest.mark.parametrize("segments", ["contiguous", "scattered"])
def test_dropout(dtype, prefix_grad, segments, seed) -> None:
    case = make_case(
        (4, 60),
        70,
        dtype=dtype,
        dropout_p=0.3,
        seed=torch.tensor([-seed - 2**40]),
        prefix_grad=prefix_grad,
    )
    if segments == "contiguous":
        case.mask = Activation.from_starts([3, None, 59, 0], 60).mask
    assert_within_bound(run(case, alora_linear), case)


def test_dropout_draws_a_new_mask_each_time_and_repeats_with_its_seed() -> None:
    case = make_case((40,), fraction=1.0, dropout_p=0.5)
    args = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.activation, 1.0)
    assert not torch.equal(alora_linear(*args, dropout_p=0.5), alora_linear(*args, dropout_p=0.5))
    seeds = (7, torch.tensor([7]))
    first, second = (alora_linear(*args, dropout_p=0.5, seed=s) for s in seeds)
    assert torch.equal(first, second)
    eye = torch.eye(8)
    kept = alora_linear(
        torch.ones(6, 8), torch.zeros(8, 8), None, eye, eye, Activation.all(6), 1.0,
        dropout_p=0.25, seed=3,
    )  # fmt: skip
    torch.testing.assert_close(kept, keep_mask(torch.tensor([3]), 0.25, 6, 8) / 0.75)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("prefix_grad", [True, False])
def test_a_group_equals_its_layers(count, dropout_p, prefix_grad, seed) -> None:
    options = {"dropout_p": dropout_p, "seed": torch.tensor([seed]), "prefix_grad": prefix_grad}
    cases = [make_case((2, 30), 24, 10 + 3 * i, 4 + i, **options) for i in range(count)]
    x = cases[0].x.detach().requires_grad_()
    leaves, projections, dx = [], [], torch.zeros_like(x, dtype=torch.float64)
    for case in cases:
        case.x, case.mask = cases[0].x, cases[0].mask
        mine = [case.leaves[n].detach().requires_grad_() for n in ("lora_a", "lora_b", "lora_bias")]
        leaves += mine
        projections.append((case.weight, case.bias, *mine[:2], case.scaling, mine[2]))
    ys = alora_linear_group(x, projections, cases[0].activation, **options)
    grads = torch.autograd.grad(ys, [x, *leaves], [c.dy for c in cases])
    for i, case in enumerate(cases):
        da, db, dc = grads[1 + 3 * i : 4 + 3 * i]
        got = {"y": ys[i].detach(), "dlora_a": da, "dlora_b": db, "dlora_bias": dc}
        assert_within_bound(got, case)
        dx += run(case, alora_linear)["dx"].double()
    torch.testing.assert_close(grads[0].double(), dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_add_is_the_adapter_part_alone(dtype, inplace, dropout_p, seed) -> None:
    case = make_case((2, 30), dtype=dtype, dropout_p=dropout_p, seed=torch.tensor([seed]))

    def composed(x, weight, bias, lora_a, lora_b, activation, scaling, **options):
        base = F.linear(x, weight, bias)
        before = base.detach().clone()
        y = alora_add(base, x, lora_a, lora_b, activation, scaling, inplace=inplace, **options)
        assert (y is base) == inplace
        assert torch.equal(base.detach(), before) != inplace
        return y

    assert_within_bound(run(case, composed), case)


def test_add_inplace_without_grad_and_on_a_strided_output() -> None:
    case = make_case((2, 30), strided=False, lora_bias=False)
    wide = torch.randn(2, 30, 42)
    base = wide[..., :21]
    args = (case.x, case.lora_a, case.lora_b, case.activation, 1.5)
    want = alora_add(base, *args)
    rest = wide[..., 21:].clone()
    assert alora_add(base, *args, inplace=True) is base
    assert torch.equal(base, want) and torch.equal(wide[..., 21:], rest)


def test_unknown_number_of_active_rows() -> None:
    case = make_case()
    known = case.activation
    bare = Activation(known.row_adapter, known.active_rows, known.active_count)
    assert bare.num_active is None
    y, again = (
        alora_linear(case.x, case.weight, case.bias, case.lora_a, case.lora_b, a, 1.5)
        for a in (known, bare)
    )
    assert torch.equal(y, again)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_an_empty_batch(lead) -> None:
    got = run(make_case(lead, strided=False), alora_linear)
    assert got["y"].shape == (*lead, 21) and got["dx"].shape == (*lead, 33)
    assert (got["dlora_a"] == 0).all() and (got["dlora_b"] == 0).all()


def test_backends_agree_on_scattered_and_sliced_rows() -> None:
    """More than sixteen short segments are gathered; the result is the same as by slices."""
    scattered = make_case((80,), fraction=0.5)
    scattered.mask = torch.arange(80) % 2 == 0
    assert_within_bound(run(scattered, alora_linear), scattered)
    assert_within_bound(
        run(scattered.with_options(prefix_grad=False), alora_linear),
        scattered.with_options(prefix_grad=False),
    )


def test_reference_backend() -> None:
    case = make_case(backend="reference")
    assert_within_bound(run(case, alora_linear), case)
    added = make_case(lora_bias=False)
    base = F.linear(added.x, added.weight, added.bias)
    args = (added.x, added.lora_a, added.lora_b, added.activation, 1.5)
    torch.testing.assert_close(
        alora_add(base, *args, backend="reference"), alora_add(base, *args, backend="cpu")
    )
