"""vLLM's own wrapper classes with this package's ops in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping

from alora_kernels.vllm import ops
from alora_kernels.vllm.patch import find, mismatches, unwrap
from alora_kernels.vllm.wrappers import AloraWrapperCPU

from ..oracle import assert_error, errors_of_pytorch
from .layout import BATCHES, Layer, make_layer, poison_unused

pytestmark = pytest.mark.vllm

VOCABULARY = 50


def mapped(wrapper: Any, indices: torch.Tensor, slots: int, prompts: torch.Tensor) -> Any:
    """`wrapper` after vLLM told it which adapter every row and every sampled row runs."""
    ids = [10 + slot for slot in range(slots)]
    mapping = LoRAMapping(
        tuple(0 if i < 0 else ids[i] for i in indices.tolist()),
        tuple(0 if i < 0 else ids[i] for i in prompts.tolist()),
        is_prefill=True,
    )
    wrapper.update_metadata(mapping, ids, slots, VOCABULARY)
    return wrapper


def cpu_wrapper(layer: Layer, prompts: torch.Tensor | None = None) -> AloraWrapperCPU:
    wrapper = AloraWrapperCPU(64, 8, torch.device("cpu"))
    return mapped(wrapper, layer.indices, 3, layer.indices if prompts is None else prompts)


def test_every_touched_place_is_as_expected() -> None:
    assert mismatches((ops.CHOICE, *ops.ON_CPU, *ops.ON_GPU)) == []


def test_vllm_makes_our_wrapper(registered: None) -> None:
    from vllm.lora.punica_wrapper import get_punica_wrapper

    wrapper = get_punica_wrapper(64, 8, torch.device("cpu"))
    assert type(wrapper) is AloraWrapperCPU
    unwrap(ops.CHOICE)
    assert find(ops.CHOICE.name)[2].__func__(None).endswith("PunicaWrapperCPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_linear(batch: str, dtype: torch.dtype) -> None:
    layer = poison_unused(make_layer(batch, dtype=dtype))
    y = layer.base.clone()
    # The transformers backend hands over an extra dimension.
    cpu_wrapper(layer).add_lora_linear(
        y[None], layer.x[None], layer.lora_a, layer.lora_b, layer.scale, layer.slices
    )
    layer.check(y)


def test_stock_takes_minus_one_for_the_last_adapter() -> None:
    """What is replaced: should vLLM mend it, this says so."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    layer = make_layer("prefill of an aLoRA")
    stock = mapped(PunicaWrapperCPU(64, 8, torch.device("cpu")), layer.indices, 3, layer.indices)
    y = layer.base.clone()
    stock.add_lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.scale, layer.slices)
    base_rows = layer.indices < 0
    assert not torch.equal(y[base_rows], layer.base[base_rows])
    layer.base[base_rows], layer.indices[:] = y[base_rows], layer.indices.clamp_min(-1)
    layer.check(y)


def test_shrink_and_expand_of_fully_sharded_layers() -> None:
    layer = poison_unused(make_layer())
    wrapper, y = cpu_wrapper(layer), layer.base.clone()
    low = torch.zeros(3, layer.x.shape[0], 5)
    wrapper.add_shrink(low, layer.x, layer.lora_a, layer.scale)
    wrapper.add_expand(y, low, layer.lora_b, layer.slices, offset_start=0, add_input=True)
    layer.check(y)


def test_logits_follow_the_sampled_rows() -> None:
    layer = poison_unused(make_layer(rows=6, widths=(VOCABULARY,)))
    tokens = torch.full((20,), -1)
    wrapper = mapped(AloraWrapperCPU(64, 8, torch.device("cpu")), tokens, 3, layer.indices)
    y = layer.base.clone()
    wrapper.add_lora_logits(y, layer.x, layer.lora_a[0], layer.lora_b[0], layer.scale)
    layer.check(y)


def test_float32_logits_over_16_bit_rows() -> None:
    layer = make_layer(rows=6, widths=(VOCABULARY,), dtype=torch.bfloat16)
    layer.base = layer.base.float()
    y = layer.base.clone()
    cpu_wrapper(layer).add_lora_logits(y, layer.x, layer.lora_a[0], layer.lora_b[0], layer.scale)
    layer.check(y)


def test_embedding() -> None:
    """x is what the embedding of A looked up; only B is applied, on the token's rows."""
    layer = poison_unused(make_layer(widths=(12,)))
    low, b = torch.randn(37, 5), layer.lora_b[0]
    y = layer.base.clone()
    cpu_wrapper(layer).add_lora_embedding(y, low, b, add_input=True)

    def expected(dtype: torch.dtype, change: Any) -> list[torch.Tensor]:
        out = change(layer.base).to(dtype).clone()
        for slot in range(3):
            rows = layer.indices == slot
            if rows.any():
                out[rows] += change(low).to(dtype)[rows] @ change(b)[slot, 0].to(dtype).t()
        return [out]

    own = errors_of_pytorch(expected, torch.float32)[0]
    assert_error("y", y, expected(torch.float64, lambda t: t)[0], own, torch.float32)
    assert torch.equal(y[layer.indices < 0], layer.base[layer.indices < 0])


def test_classification_heads() -> None:
    """Rows whose adapter has a head of its own take it; all others keep the base's output."""
    layer = make_layer(rows=9, widths=(12,), rank=4, depth=16)
    head, bias = torch.randn(3, 1, 12, 16), torch.randn(3, 12)
    enabled = torch.tensor([True, False, True])
    head[1], bias[1] = torch.nan, torch.nan
    layer.indices = torch.tensor([-1, 0, 1, 2, 2, -1, 0, 0, 1])
    y = layer.base.clone()
    cpu_wrapper(layer).apply_lora_full_linear(y, layer.x, head, bias, enabled)
    for row, slot in enumerate(layer.indices.tolist()):
        if slot in (0, 2):
            want = head[slot, 0] @ layer.x[row] + bias[slot]
            assert torch.allclose(y[row], want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(y[row], layer.base[row])


def test_no_adapter_costs_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("no adapter")
    wrapper, y = cpu_wrapper(layer), layer.base.clone()
    monkeypatch.setattr("alora_kernels.vllm.wrappers.add_linear", None)
    monkeypatch.setattr("alora_kernels.vllm.wrappers.expand", None)
    wrapper.add_lora_linear(y, layer.x, layer.lora_a, layer.lora_b, 1.0, layer.slices)
    wrapper.add_lora_logits(y, layer.x, layer.lora_a[0], layer.lora_b[0], 1.0)
    assert torch.equal(y, layer.base)


@pytest.mark.parametrize("batch", ["scattered", "prefill of an aLoRA", "no adapter"])
def test_the_gpu_wrapper_on_request(
    batch: str, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's GPU class, its own index kernels left out, with this package's op behind it."""
    from vllm.lora.punica_wrapper import punica_gpu

    class NoMeta:
        make = classmethod(lambda cls, *a, **k: cls())

        def prepare_tensors(self, indices: torch.Tensor) -> None: ...

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", NoMeta, raising=False)
    monkeypatch.setenv(ops.VARIABLE, "1")
    ops.install()
    try:
        config = SimpleNamespace(max_loras=3, specialize_active_lora=False)
        wrapper = punica_gpu.PunicaWrapperGPU(64, 8, torch.device("cpu"), lora_config=config)
        layer = make_layer(batch)
        mapped(wrapper, layer.indices, 3, layer.indices)
        y = layer.base.clone()
        wrapper.add_lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.scale, layer.slices)
        layer.check(y)
    finally:
        for touch in ops.ON_GPU:
            unwrap(touch)
