"""Layers outside the tokens: towers, projectors, cross-attention over other states."""

from __future__ import annotations

import copy
import logging
import types
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from alora_kernels import Activation
from alora_kernels.peft import accelerate, adapter_scope, restore
from alora_kernels.peft.stream import BESIDE, HEAD, find_places

from .definition import defined, greedy
from .models import ASK, FIRST, SIZES, SUM, VOCAB, base_model, lora

TEXT: dict[str, Any] = {**SIZES, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
IMAGE = 60  # the token that stands for a patch
OFF = ("vision", "visual", "projector", "connector", "audio_tower", "cross_attn.k", "cross_attn.v")


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config={**VISION}, scale_factor=2, image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def mllama() -> Any:
    config = transformers.MllamaConfig(
        text_config={**SIZES, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 16, "patch_size": 4,
            "vision_output_dim": 32, "intermediate_layers_indices": [0], "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )  # fmt: skip
    model = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.7)  # zero gates would hide the image
    return model


def images(kind: str, length: int) -> dict[str, Tensor]:
    """A row of `length` tokens with an image and an invocation behind it, at column 22."""
    ids = torch.randint(FIRST, 58, (1, length))
    ids[0, 22:25] = torch.tensor(ASK)
    if kind == "mllama":
        ids[0, 1] = IMAGE
        return {
            "input_ids": ids, "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.int64),
            "cross_attention_mask": torch.ones(1, length, 1, 1, dtype=torch.int64),
        }  # fmt: skip
    places = {"gemma3": slice(3, 7), "llava": slice(3, 19), "idefics3": slice(3, 7)}[kind]
    ids[0, places] = IMAGE
    pixels = torch.randn(1, 1, 3, 16, 16) if kind == "idefics3" else torch.randn(1, 3, 16, 16)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if kind == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


MAKERS = {"gemma3": gemma3, "llava": llava, "idefics3": idefics3, "mllama": mllama}


def prepared(base: Any) -> Any:
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return base.eval()


def with_adapter(base: Any, tokens: Any = ASK, targets: Any = "all-linear") -> Any:
    model = get_peft_model(copy.deepcopy(base), lora(tokens, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", MAKERS)
def test_an_activated_lora_is_off_outside_the_tokens(kind):
    """Whatever the row count is: also as many patches as tokens, and an adapter that is on for
    every token or for none."""
    base = prepared(MAKERS[kind]())
    stock = with_adapter(base)
    model = accelerate(copy.deepcopy(stock))
    for length in (32, 26):
        inputs = images(kind, length)
        with torch.no_grad():
            got = model(**inputs).logits
            want = defined(stock, base, [22], off=OFF)(**inputs).logits
            assert (got - want).abs().max() < 1e-4
            assert (got[:, :22] - base(**inputs).logits[:, :22]).abs().max() < 1e-4
            assert (got[:, 22:] - base(**inputs).logits[:, 22:]).abs().max() > 1e-2
            inputs["input_ids"][0, 22:25] = FIRST  # no invocation at all
            assert (model(**inputs).logits - base(**inputs).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_generate_with_an_image(kind):
    base = prepared(MAKERS[kind]())
    stock = with_adapter(base)
    inputs = images(kind, 28)
    whole = defined(stock, base, [22], off=OFF)
    ids = inputs["input_ids"]
    for _ in range(4):
        new = {**inputs, "input_ids": ids}
        if kind == "gemma3":
            new["token_type_ids"] = (ids == IMAGE).long()
        with torch.no_grad():
            logits = whole(**new, use_cache=False).logits[:, -1:]
        logits[..., [IMAGE, 61, 62]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    got = accelerate(stock).generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None,
        suppress_tokens=[IMAGE, 61, 62],
    )  # fmt: skip
    assert torch.equal(got, ids)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plain_lora_runs_as_peft_runs_it(kind):
    base = prepared(MAKERS[kind]())
    stock = with_adapter(base, tokens=None)
    model = accelerate(copy.deepcopy(stock))
    inputs = images(kind, 26)
    with torch.no_grad():
        assert (model(**inputs).logits - stock(**inputs).logits).abs().max() < 1e-4
        assert (model(**inputs).logits - base(**inputs).logits).abs().max() > 1e-2


def test_features_asked_for_outside_of_a_forward():
    base = prepared(gemma3())
    pixels = torch.randn(2, 3, 16, 16)

    def features(model: Any) -> Tensor:
        with torch.no_grad():
            found = getattr(model, "get_base_model", lambda: model)().model
            found = found.get_image_features(pixels)
        return found if isinstance(found, Tensor) else torch.cat(list(found.pooler_output))

    assert (features(accelerate(with_adapter(base))) - features(base)).abs().max() < 1e-5
    stock = with_adapter(base, tokens=None)
    want = features(stock)
    assert (features(accelerate(stock)) - want).abs().max() < 1e-5
    assert (want - features(base)).abs().max() > 1e-3


def test_it_is_said_once_with_the_paths(caplog):
    base = prepared(gemma3())
    model = with_adapter(base)
    with caplog.at_level(logging.WARNING, "alora_kernels"):
        accelerate(model)
        assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in caplog.text
        assert "language_model" not in caplog.text
        caplog.clear()
        model.add_adapter("plain", lora(None))
        model(**images("gemma3", 26))
        assert "do not see the tokens" not in caplog.text
        caplog.clear()
        accelerate(get_peft_model(base_model(), lora(ASK)))  # nothing but text
        assert "do not see the tokens" not in caplog.text


def test_a_tower_trains_nothing_but_gets_zeros():
    """Under DDP a parameter without a gradient is an error; PEFT would train it."""
    model = accelerate(with_adapter(prepared(gemma3()))).train()
    model(**images("gemma3", 26)).logits.sum().backward()
    seen = dict.fromkeys(("tower", "text"), 0)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name and "lora_" in name:
            assert parameter.grad is not None and not parameter.grad.any()
            seen["tower"] += 1
        elif "q_proj.lora_B" in name:
            assert parameter.grad.any()
            seen["text"] += 1
    assert min(seen.values()) > 0


def test_rows_of_different_adapters_are_refused_by_path():
    """Which images belong to which row is not known, so a plain LoRA cannot be mixed."""
    model = with_adapter(prepared(gemma3()))
    model.add_adapter("plain", lora(None))
    model.add_adapter("sum", lora(SUM))
    model = accelerate(model).eval()
    inputs = {k: torch.cat([v, v]) for k, v in images("gemma3", 26).items()}
    with torch.no_grad():
        model(**inputs, adapter_names=["default", "sum"])
        model(**inputs, adapter_names=["plain", "plain"])
        with pytest.raises(RuntimeError, match=r"'plain'.*model\.\S+.*separate batches"):
            model(**inputs, adapter_names=["default", "plain"])


@pytest.mark.parametrize("kind", ["activated", "plain", "both"])
def test_layers_that_keep_the_forward_of_peft(kind):
    base = prepared(gemma3())
    model = with_adapter(base, tokens=ASK if kind == "activated" else None)
    if kind == "both":
        model.add_adapter("ask", lora(ASK, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "ask"])
    tower = model.get_base_model().model.vision_tower
    for layer in tower.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = types.MethodType(type(layer).forward, layer)  # a foreign hook's way
    stock = copy.deepcopy(model)
    model = accelerate(model)
    inputs = images("gemma3", 26)
    with torch.no_grad():
        if kind == "activated":
            want = defined(stock, base, [22], off=OFF)(**inputs).logits
        elif kind == "plain":
            want = with_adapter(base, tokens=None)
            want.load_state_dict(stock.state_dict())
            want = want(**inputs).logits
        else:
            plain = defined(stock, base, [0], "default")
            want = defined(stock, plain, [22], "ask", off=OFF)(**inputs).logits
        assert (model(**inputs).logits - want).abs().max() < 1e-4


def test_restore_leaves_nothing():
    model = with_adapter(prepared(gemma3()))
    restore(accelerate(model))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert layers and not any("alora" in name for m in layers for name in m.__dict__)


# ---------------------------------------------------------------------- models of other makes


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Nested(nn.Module):
    """A tower, a bridge and a language model of its own, none from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes, self.bridge = Tower(), nn.Linear(8, 16)
        self.lm = nn.Module()
        self.lm.embed, self.lm.layers = nn.Embedding(VOCAB, 16), nn.ModuleList([Block(16)])
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor, patches: Tensor | None = None) -> Tensor:
        x = self.lm.embed(input_ids)
        if patches is not None:
            x = x + self.bridge(self.eyes(patches)).mean(1, keepdim=True)
        for layer in self.lm.layers:
            x = layer(x)
        return self.head(x)


class Flat(Nested):
    """The same with everything at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder, self.vision_proj = self.eyes, self.bridge
        self.wte, self.h = self.lm.embed, self.lm.layers
        del self.eyes, self.bridge, self.lm

    def forward(self, input_ids: Tensor, patches: Tensor | None = None) -> Tensor:
        x = self.wte(input_ids)
        if patches is not None:
            x = x + self.vision_proj(self.vision_encoder(patches)).mean(1, keepdim=True)
        for layer in self.h:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Nested, Flat])
def test_a_model_of_another_make(kind):
    base = prepared(kind())
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(target_modules=["fc", "bridge", "vision_proj", "head"], init_lora_weights=False,
                   r=4, alora_invocation_tokens=ASK),
    ).eval()  # fmt: skip
    model = accelerate(model)
    ids = torch.randint(FIRST, VOCAB, (2, 12))
    ids[:, 6:9] = torch.tensor(ASK)
    off = ("eyes", "bridge", "vision")
    with torch.no_grad():
        for patches in (torch.randn(2, 12, 8), torch.randn(2, 5, 8)):
            want = defined(model, base, [6, 6], off=off)(ids, patches)
            assert (model(input_ids=ids, patches=patches) - want).abs().max() < 1e-5
    places = find_places(base, [n for n, m in base.named_modules() if isinstance(m, nn.Linear)])
    assert {path for path, place in places.items() if place == HEAD} == {"head"}
    assert all(any(part in path for part in off) for path in places if places[path] == BESIDE)
    assert sum(place == BESIDE for place in places.values()) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3"])
def test_nothing_of_a_text_model_is_outside(kind):
    base = base_model(kind)
    places = find_places(base, [n for n, m in base.named_modules() if hasattr(m, "weight")])
    assert set(places.values()) <= {HEAD}
    assert BESIDE not in places.values()


def test_cross_attention_of_a_decoder():
    """Keys and values over other states; queries and outputs are the tokens'."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True
    )
    base = transformers.GPT2LMHeadModel(config)
    linear = [n for n, m in base.named_modules() if type(m).__name__ == "Conv1D"]
    beside = {n for n, place in find_places(base, linear).items() if place == BESIDE}
    assert beside == {"transformer.h.0.crossattention.c_attn"}
    model = with_adapter(prepared(base), targets=["c_attn", "q_attn"])
    fast = accelerate(copy.deepcopy(model))
    ids = torch.randint(FIRST, VOCAB, (1, 10))
    ids[0, 4:7] = torch.tensor(ASK)
    for width in (10, 7):
        other = torch.randn(1, width, 32)
        with torch.no_grad():
            want = defined(model, base, [4], off=("crossattention.c_attn",))
            want = want(input_ids=ids, encoder_hidden_states=other).logits
            got = fast(input_ids=ids, encoder_hidden_states=other).logits
        assert (got - want).abs().max() < 1e-4


def test_experts_are_not_told_by_their_row_count():
    """A router may send as many rows to an expert as there are tokens, in another order."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 16)
            self.experts = nn.ModuleList([Block(16)])
            self.head = nn.Linear(16, VOCAB)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            rows = x.flatten(0, 1).flip(0)
            return self.head(self.experts[0](rows).flip(0).view_as(x))

    base = prepared(Routed())
    config = LoraConfig(target_modules=["fc"], init_lora_weights=False, alora_invocation_tokens=ASK)
    model = accelerate(get_peft_model(copy.deepcopy(base), config).eval())
    ids = torch.randint(FIRST, VOCAB, (1, 8))
    with torch.no_grad():
        assert (model(input_ids=ids) - base(ids)).abs().max() < 1e-6
        ids[0, 4:7] = torch.tensor(ASK)
        with pytest.raises(RuntimeError, match="routed experts"):
            model(input_ids=ids)
        # Called alone it runs the rows that it is told.
        expert, rows = model.get_base_model().experts[0], torch.randn(6, 16)
        mask = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.bool)
        with adapter_scope(model, "default", Activation.from_mask(mask)):
            got = expert(rows)
        plain = base.experts[0](rows)
        assert torch.equal(got[~mask], plain[~mask])
        assert ((got - plain).abs().amax(1) > 1e-4).equal(mask)


def test_greedy_of_the_definition_is_that_of_peft():
    """The reference itself, against PEFT where PEFT is right."""
    base = prepared(base_model())
    stock = with_adapter(base)
    ids = torch.randint(FIRST, VOCAB, (2, 12))
    ids[0, 4:7] = torch.tensor(ASK)
    want = greedy(defined(stock, base, [4, None]), ids, 4)
    got = stock.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                         eos_token_id=None)  # fmt: skip
    assert torch.equal(got, want)
