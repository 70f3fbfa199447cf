"""Layers over a quantised or foreign base keep that base's own forward."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from alora_kernels.peft import accelerate

from .models import ASK, FIRST, SUM, adapted, base_model, layers, lora, prompt, put


def quantised(how: str):
    """A tiny Llama with a quantised base and its adapters."""
    base = base_model(hidden_size=64, intermediate_size=64)
    if how == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        config = torchao.Int8WeightOnlyConfig()
        torchao.quantize_(base, config)
        # Where PEFT 0.19 looks for the configuration, to quantise what it merges.
        where = SimpleNamespace(get_apply_tensor_subclass=lambda: config)
        base.hf_quantizer = SimpleNamespace(quantization_config=where)
        stock = adapted(base)
        del base.hf_quantizer
        return stock
    bnb = pytest.importorskip("bitsandbytes")
    for block in base.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                sizes = (linear.in_features, linear.out_features)
                if how == "4bit":
                    new = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                    new.weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4"
                    )
                else:
                    new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(
                        linear.weight.data, requires_grad=False, has_fp16_weights=False
                    )
                setattr(parent, name, new.to("cpu"))
    if how == "4bit":
        base.is_loaded_in_4bit = True
    else:
        base.is_loaded_in_8bit = True
    return adapted(base)


@pytest.mark.parametrize("how", ["4bit", "8bit", "torchao"])
def test_quantised_bases_run_their_own_forward(how):
    stock = quantised(how)
    model = accelerate(copy.deepcopy(stock), strict=True)
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt", "torchao": "TorchaoLoraLinear"}[how]
    assert {type(layer).__name__ for layer in layers(model)} == {kind}
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 6, ASK)
    model(input_ids=ids, labels=ids).loss.backward()
    assert layers(model)[0].lora_A["ask"].weight.grad.any()
    if how != "8bit":  # PEFT writes in place into a view that bitsandbytes made without gradient
        stock(input_ids=ids, labels=ids).loss.backward()
    for mine, other in zip(model.parameters(), stock.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=2e-5, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-4, rtol=1e-3
        )
        # Two aLoRAs in one batch: each row its own offsets (PEFT's bnb layers mix them up).
        put(ids, 1, 6, SUM)
        put(ids, 1, 8, [FIRST])
        mixed = model(input_ids=ids, adapter_names=["ask", "sum"]).logits
        for row, name in enumerate(("ask", "sum")):
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, atol=1e-4, rtol=1e-3)


def test_a_foreign_layer_that_knows_no_offsets():
    """A layer class as GPTQ's and HQQ's: its forward has no room for aLoRA's keyword."""
    from peft.tuners.lora.layer import Linear

    class GPTQLoraLinear(Linear):
        def forward(self, x):  # raises TypeError on alora_offsets, as those do
            return super().forward(x)

    stock = get_peft_model(base_model(), lora(ASK)).eval()
    model = copy.deepcopy(stock)
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = GPTQLoraLinear
    ids = put(prompt(2, 12), 0, 3, ASK)
    with pytest.raises(TypeError):
        copy.deepcopy(model)(input_ids=ids)
    accelerate(model, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
