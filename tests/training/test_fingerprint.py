"""No stale prefix: whatever changes the base model, and by whatever way, changes its name."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from models import make_batch, make_model
from peft import LoraConfig

from alora_kernels.training import PrefixStore, prefix_forward
from alora_kernels.training.checksum import ROW, _distinct, checksum
from alora_kernels.training.fingerprint import base_tensors, fingerprint

# ---------------------------------------------------------------------- the checksum


def sums(*tensors: torch.Tensor) -> list[int]:
    return [int(checksum(tensor)) for tensor in tensors]


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn,
          torch.bool, torch.complex64]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, ROW, ROW + 3, 3 * ROW + 1])
def test_a_single_bit_shows_wherever_it_stands(dtype, size):
    """A modular sum with odd factors: the change of one word cannot vanish."""
    x = torch.randn(size).to(dtype)
    (before,) = sums(x)
    assert sums(x.clone()) == [before]
    data = x.view(-1).view(torch.uint8) if not x.is_complex() else torch.view_as_real(x)
    data = data.reshape(-1).view(torch.uint8)
    for place in {0, len(data) // 2, len(data) - 1}:
        for bit in (1, 128) if dtype is not torch.bool else (1,):
            data[place] ^= bit
            assert sums(x) != [before], (place, bit)
            data[place] ^= bit
    assert sums(x) == [before]


def test_exchanges_show():
    """Also of words that differ in their top bit alone, within a row and across rows."""
    assert len(set((_distinct(ROW) & ((1 << 33) - 1)).tolist())) == ROW
    x = torch.randn(3 * ROW)
    (before,) = sums(x)
    for i, j in ((0, 1), (5, 4000), (ROW - 1, ROW), (2, 2 * ROW + 2), (7, 3 * ROW - 1)):
        y = x.clone()
        y[i], y[j] = x[j], x[i]
        assert sums(y) != [before]
        y = x.clone()
        y[i], y[j] = 1.5, -1.5
        z = y.clone()
        z[i], z[j] = -1.5, 1.5
        assert sums(y) != sums(z)
    assert sums(x.view(3, ROW)[[1, 0, 2]]) != [before]


def test_a_view_is_read_in_its_own_order():
    x = torch.randn(6, 10)
    assert sums(x.t()) == sums(x.t().contiguous()) != sums(x)
    assert sums(x[:, 1:9:2]) == sums(x[:, 1:9:2].clone())
    assert sums(torch.zeros(0)) == [0]
    half = torch.randn(9).to(torch.bfloat16)
    assert sums(half[1:]) == sums(half[1:].clone())  # bytes that no 32-bit word begins at


# ---------------------------------------------------------------------- edits of a model


def weight_of(model: Any) -> torch.nn.Parameter:
    return model.get_base_model().model.layers[1].self_attn.v_proj.base_layer.weight


def by_data(model: Any) -> None:
    weight_of(model).data[3, 5] += 0.5


def by_numpy(model: Any) -> None:
    weight_of(model).detach().numpy()[3, 5] += 0.5


def by_dlpack(model: Any) -> None:
    torch.from_dlpack(weight_of(model).detach())[3, 5] += 0.5


def by_address(model: Any) -> None:
    ctypes.memset(weight_of(model).data_ptr() + 8 * 37, 1, 8)


def by_exchange(model: Any) -> None:
    data = weight_of(model).data
    a, b = data[2, 7].clone(), data[2, 8].clone()
    data[2, 7], data[2, 8] = b, a


def by_set(model: Any) -> None:
    weight = weight_of(model)
    with torch.no_grad():
        weight.set_(weight.detach().clone().mul_(1.01))


def by_storage(model: Any) -> None:
    weight = weight_of(model)
    other = weight.detach().clone()
    other[3, 5] += 0.5
    weight.untyped_storage().copy_(other.untyped_storage())


def by_fused_optimizer(model: Any) -> None:
    weight = weight_of(model)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    weight.grad = None


def by_swap(model: Any) -> None:
    layers = model.get_base_model().model.layers
    layers[0], layers[1] = layers[1], layers[0]


def by_merging(model: Any) -> None:
    """Another adapter becomes part of the base."""
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    model.base_model.merge_adapter(["other"])
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            module.merged_adapters.clear()


def by_buffer(model: Any) -> None:
    model.get_base_model().model.rotary_emb.inv_freq.data[1] *= 1.1


def by_number(model: Any) -> None:
    model.get_base_model().model.layers[0].input_layernorm.variance_epsilon = 0.1


def by_scaling(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.scaling *= 1.5


def by_config(model: Any) -> None:
    model.get_base_model().config.rms_norm_eps = 0.1


EDITS = [by_data, by_numpy, by_dlpack, by_address, by_exchange, by_set, by_storage,
         by_fused_optimizer, by_swap, by_merging, by_buffer, by_number, by_scaling]  # fmt: skip


@pytest.mark.parametrize("check", ["default", "sample", "full"])
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_serves_a_stale_prefix(edit, check, seed):
    model, batch = make_model(seed=seed, targets=["q_proj", "v_proj"]), make_batch([(16, 6)])
    store = PrefixStore() if check == "default" else PrefixStore(check=check)
    before = prefix_forward(model, *batch, "cached", store=store).loss
    assert torch.equal(prefix_forward(model, *batch, "cached", store=store).loss, before)
    assert (store.hits, store.misses) == (1, 1)
    edit(model)
    fresh = prefix_forward(model, *batch).loss
    assert not torch.equal(fresh, before)
    assert torch.equal(prefix_forward(model, *batch, "cached", store=store).loss, fresh)
    assert (store.hits, store.misses) == (1, 2)


def test_what_is_no_part_of_the_base_does_not_count(seed):
    """Training steps, other adapters, modes and passes leave the name as it is."""
    model, batch = make_model(seed=seed), make_batch([(16, 6)])
    name = fingerprint(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    prefix_forward(model, *batch).loss.backward()
    optimizer.step()
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"]))
    model.eval()
    model.set_adapter("default")
    model.get_base_model().gradient_checkpointing_enable()
    assert fingerprint(model) == name
    model.train()
    assert fingerprint(model) == name


@pytest.mark.parametrize("change", ["precision", "config", "autocast", "attention"])
def test_settings_take_part(change, seed):
    model = make_model(seed=seed)
    name = fingerprint(model)
    before = torch.get_float32_matmul_precision()
    try:
        if change == "precision":
            torch.set_float32_matmul_precision("medium")
        elif change == "config":
            by_config(model)
        elif change == "attention":
            model.get_base_model().config._attn_implementation = "eager"
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            assert fingerprint(model) != name
    finally:
        torch.set_float32_matmul_precision(before)


class QuantState:
    """As bitsandbytes keeps it beside a packed weight: nested, and no parameter or buffer."""

    def __init__(self, nested: bool = True) -> None:
        self.absmax, self.code, self.blocksize = torch.rand(8), torch.rand(16), 64
        self.state2 = QuantState(False) if nested else None


@pytest.mark.parametrize("part", ["packed", "absmax", "nested", "attribute", "meta"])
def test_the_state_of_a_quantised_weight_takes_part(part, seed):
    model = make_model(seed=seed)
    module = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    packed = torch.nn.Parameter(torch.randint(0, 255, (64, 1), dtype=torch.uint8), False)
    packed.quant_state = QuantState()
    module.weight = packed
    module.meta = {"scale": torch.rand(4), "group": [torch.rand(2)]}  # as HQQ
    module.SCB = torch.rand(4)
    name = fingerprint(model)
    assert fingerprint(model) == name
    {
        "packed": packed.data,
        "absmax": packed.quant_state.absmax,
        "nested": packed.quant_state.state2.absmax,
        "attribute": module.SCB,
        "meta": module.meta["group"][0],
    }[part].view(-1)[1:2].copy_(torch.tensor([3]))
    assert fingerprint(model) != name


def test_offloaded_weights_are_read_where_they_are_kept(seed):
    accelerate = pytest.importorskip("accelerate")
    model = make_model(seed=seed)
    base = model.get_base_model()
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in base.parameters())
    name = fingerprint(model)
    assert fingerprint(model) == name
    module = base.model.layers[0].mlp.down_proj.base_layer
    module._hf_hook.weights_map["weight"].view(-1)[3] += 1
    assert fingerprint(model) != name


def test_weights_that_nobody_holds_are_refused(seed):
    model = make_model(seed=seed)
    module = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    module.weight = torch.nn.Parameter(module.weight.to("meta"), False)
    with pytest.raises(ValueError, match=r"meta device.*no_grad"):
        fingerprint(model)


def test_every_tensor_of_the_base_is_looked_at(seed):
    """All parameters and buffers but the adapter's, each once."""
    model = make_model("gemma3", seed=seed)
    names = [name for name, _ in base_tensors(model)]
    want = {
        name
        for named in (model.named_parameters(), model.named_buffers())
        for name, _ in named
        if "lora_" not in name
    }
    assert want <= set(names) and len(names) == len(set(names))
    assert not any("lora_" in name for name in names)
