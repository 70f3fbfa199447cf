"""The LoRA ops that stand in for vLLM's, without vLLM: the arithmetic and its layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alora_kernels.vllm import ops
from alora_kernels.vllm.lora_cpu import Slots, add_linear, expand, group_rows, shrink
from alora_kernels.vllm.lora_gpu import DeviceRows

from ..oracle import assert_error, errors_of_pytorch
from .layout import BATCHES, Layer, make_layer, poison_unused

MODE = os.environ.get("ALORA_TRITON_MODE")
HERE = Path(__file__)
DTYPES = (torch.float32, torch.bfloat16)


def grouped(layer: Layer) -> torch.Tensor:
    slots, y = Slots(), layer.base.clone()
    a, b = [slots(t) for t in layer.lora_a], [slots(t) for t in layer.lora_b]
    add_linear(y, layer.x, a, b, group_rows(layer.indices), layer.scale, layer.slices)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_linear_on_grouped_rows(batch: str, dtype: torch.dtype) -> None:
    layer = poison_unused(make_layer(batch, dtype=dtype))
    layer.check(grouped(layer))


@pytest.mark.parametrize("rows", [1, 2, 200, 1000])
def test_linear_of_many_and_few_rows(rows: int) -> None:
    layer = poison_unused(make_layer(rows=rows, slots=4, widths=(17,)))
    layer.check(grouped(layer))


def test_float32_adapters_over_16_bit_rows() -> None:
    layer = make_layer(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    y = grouped(layer)
    rounded = Layer(
        layer.x, layer.base, tuple(a.bfloat16() for a in layer.lora_a),
        tuple(b.bfloat16() for b in layer.lora_b), layer.indices, layer.scale,
    )  # fmt: skip
    rounded.check(y)


def test_weights_that_change_in_their_slot_are_seen() -> None:
    layer = make_layer(dtype=torch.bfloat16, adapter_dtype=torch.float32, widths=(12,))
    slots, groups = Slots(), group_rows(layer.indices)

    def run() -> torch.Tensor:
        y = layer.base.clone()
        lora_a, lora_b = [slots(layer.lora_a[0])], [slots(layer.lora_b[0])]
        add_linear(y, layer.x, lora_a, lora_b, groups, layer.scale, layer.slices)
        return y

    before = run()
    layer.lora_b[0][:] = 0  # what vLLM does when it evicts an adapter
    assert not torch.equal(before, layer.base)
    assert torch.equal(run(), layer.base)


def test_rows_beyond_the_mapping_are_left_alone() -> None:
    layer = make_layer("every row one adapter", rows=24)
    layer.indices[16:] = -1
    y, slots = layer.base.clone(), Slots()
    add_linear(
        y, layer.x, [slots(a) for a in layer.lora_a], [slots(b) for b in layer.lora_b],
        group_rows(layer.indices[:16]), layer.scale, layer.slices,
    )  # fmt: skip
    layer.check(y)


@pytest.mark.parametrize("batch", BATCHES)
def test_shrink_then_expand_is_the_linear(batch: str) -> None:
    layer = poison_unused(make_layer(batch))
    slots, groups = Slots(), group_rows(layer.indices)
    low = torch.full((len(layer.slices), layer.x.shape[0], layer.lora_a[0].shape[2]), torch.nan)
    shrink(low, layer.x, [slots(a) for a in layer.lora_a], groups, layer.scale)
    assert (low[:, layer.indices < 0] == 0).all()
    y = layer.base.clone()
    expand(y, low, [slots(b) for b in layer.lora_b], groups, layer.slices)
    layer.check(y)


def test_expand_at_an_offset_and_without_adding() -> None:
    layer = make_layer(widths=(8,), rank=5)
    slots, groups = Slots(), group_rows(layer.indices)
    low = torch.randn(1, layer.x.shape[0], 5)
    y = torch.full((layer.x.shape[0], 14), 7.0)
    expand(y, low, [slots(layer.lora_b[0])], groups, (8,), offset=4, add_inputs=False)
    assert (y[:, :4] == 7).all() and (y[:, 12:] == 7).all()

    def expected(dtype, change):
        b = change(layer.lora_b[0])[:, 0].to(dtype)
        rows = torch.einsum("mr,mnr->mn", change(low)[0].to(dtype), b[layer.indices.clamp_min(0)])
        return [torch.where((layer.indices >= 0)[:, None], rows, 0)]

    own = errors_of_pytorch(expected, torch.float32)[0]
    exact = expected(torch.float64, lambda t: t)[0]
    assert_error("y", y[:, 4:12], exact, own, torch.float32)
    assert (y[layer.indices < 0, 4:12] == 0).all()


def test_a_vocabulary_that_is_padded_less_than_b() -> None:
    layer = make_layer(widths=(30,))
    slots, groups, low = Slots(), group_rows(layer.indices), torch.randn(1, 37, 5)
    whole, cut = torch.zeros(37, 30), torch.zeros(37, 26)
    for y in (whole, cut):
        expand(y, low, [slots(layer.lora_b[0])], groups, [y.shape[1]])
    assert whole.any() and torch.allclose(whole[:, :26], cut)


def test_groups_know_their_rows_on_the_host() -> None:
    groups = group_rows(torch.tensor([-1, 2, 2, 0, -1, 2]))
    assert [g.slot for g in groups] == [0, 2]
    assert [g.activation.segments for g in groups] == [((3, 4),), ((1, 3), (5, 6))]
    assert [g.activation.num_active for g in groups] == [1, 3]
    assert group_rows(torch.tensor([], dtype=torch.int64)) == []


def test_nothing_is_gathered() -> None:
    """No tensor is made but the low-rank rows: no copy of A, B, x or y, for one row or for all."""
    layer = make_layer("requests one after another", rows=256, depth=64, widths=(48,), rank=8)
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in old:
                made.append(out.numel())
            return out

    y, slots, groups = layer.base.clone(), Slots(), group_rows(layer.indices)
    a, b = [slots(layer.lora_a[0])], [slots(layer.lora_b[0])]
    with Sizes():
        add_linear(y, layer.x, a, b, groups, layer.scale, layer.slices)
    layer.check(y)
    assert made and max(made) <= 256 * 16  # xa's rows are padded to 16 columns


# ---------------------------------------------------------------------- a GPU's op


def on_device(layer: Layer, capacity: int) -> torch.Tensor:
    """The registered op, as vLLM would call it, on tensors of fixed address."""
    rows = DeviceRows(layer.lora_a[0].shape[0], capacity, "cpu")
    rows.update(torch.randint(-1, 2, (capacity,)))  # an earlier batch
    rows.update(layer.indices)
    y = layer.base.clone()
    torch.ops.alora_kernels_vllm.add_linear(
        y, layer.x, list(layer.lora_a), list(layer.lora_b), rows.row_adapter, rows.active_rows,
        rows.active_count, layer.scale, list(layer.slices),
    )  # fmt: skip
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_device_op(batch: str, dtype: torch.dtype) -> None:
    layer = make_layer(batch, dtype=dtype, rank=16, depth=48)
    layer.check(on_device(layer, capacity=64))


def test_the_device_op_with_fewer_rows_than_the_batch_is_padded_to() -> None:
    layer = make_layer("every row one adapter", rows=32)
    layer.indices[20:] = -1
    mapped, layer.indices = layer.indices, layer.indices[:20]
    y = on_device(layer, capacity=40)
    layer.indices = mapped
    layer.check(y)


def test_device_rows_of_an_uneven_batch() -> None:
    rows = DeviceRows(3, 8, "cpu")
    before = [t.data_ptr() for t in vars(rows).values()]
    rows.update(torch.tensor([1, 1, 1, 1, 1, 1, 1, 1]))
    rows.update(torch.tensor([2, -1, 0, 2, -1]))
    assert rows.active_rows.tolist() == [
        [2, *[-1] * 7],
        [-1] * 8,
        [0, 3, *[-1] * 6],
    ]
    assert rows.active_count.tolist() == [1, 0, 2]
    assert rows.row_adapter[2].tolist() == [0, -1, -1, 0, -1, -1, -1, -1]
    assert before == [t.data_ptr() for t in vars(rows).values()]


def test_the_device_op_under_a_compiler() -> None:
    layer = make_layer(rank=8, depth=16)
    rows = DeviceRows(3, 40, "cpu")
    rows.update(layer.indices)

    def step(base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = base + 0
        torch.ops.alora_kernels_vllm.add_linear(
            y, x, list(layer.lora_a), list(layer.lora_b), rows.row_adapter, rows.active_rows,
            rows.active_count, layer.scale, list(layer.slices),
        )  # fmt: skip
        return y * 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    layer.check(compiled(layer.base, layer.x))
    layer.indices = layer.indices.flip(0)
    rows.update(layer.indices)
    layer.check(compiled(layer.base, layer.x))


def test_the_device_op_in_the_interpreter() -> None:
    """The same tests with Triton's kernels, in a process where Triton interprets."""
    pytest.importorskip("triton")
    if MODE is not None:
        pytest.skip("this is that process")
    from ..triton.conftest import why_no_interpreter

    if (reason := why_no_interpreter()) is not None:
        pytest.skip(reason)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", str(HERE),
         "-k", "the_device_op and not compiler and not interpreter"],
        env={**os.environ, "ALORA_TRITON_MODE": "interpret", "TRITON_INTERPRET": "1",
             "ALORA_BACKEND": "triton", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=HERE.parents[2],
    )  # fmt: skip
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


# ---------------------------------------------------------------------- what is touched


def test_the_gpu_is_touched_on_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    assert not ops.on_gpu()
    assert not any("punica_gpu" in t.name for t in ops.TOUCHED)
    monkeypatch.setenv(ops.VARIABLE, "1")
    assert ops.on_gpu()
    monkeypatch.setenv(ops.VARIABLE, "yes")
    with pytest.raises(ValueError, match="ALORA_VLLM_OPS='yes': expected 0"):
        ops.on_gpu()
