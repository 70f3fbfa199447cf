"""Projections of the whole cache: latent attention, and others that project what they cached."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from alora_kernels.inference import Session
from alora_kernels.peft import accelerate, adapter_scope
from alora_kernels.peft.stream import CACHE, find_places
from alora_kernels.training import prefix_forward, prefix_problems

from ..inference.tiny import tokenizer
from .definition import defined, greedy
from .models import ASK, FIRST, SIZES, SUM, VOCAB, adapted, cache_of, cached

MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
}  # fmt: skip
LATENT = ("DeepseekV2", "DeepseekV3", "MiniCPM3", "Glm4MoeLite", "Mistral4", "Youtu")
TARGETS = {"Doge": ["q_proj", "dt_proj", "o_proj"]}


def base_of(kind: str, **changes: Any) -> Any:
    config_class = getattr(transformers, f"{kind}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {kind}")
    sizes = {**SIZES, **({} if kind == "Doge" else MLA), **changes}
    if kind == "Glm4MoeLite":
        sizes["mlp_layer_types"] = ["dense", "dense"]
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return base


def model_of(base: Any, targets: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM",
                        init_lora_weights=False, alora_invocation_tokens=ASK)  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return accelerate(model)


def pair(kind: str, **changes: Any) -> tuple[Any, Any]:
    base = base_of(kind, **changes)
    if not any("kv_b_proj" in n or "dt_proj" in n for n, _ in base.named_modules()):
        pytest.skip(f"{kind} projects before it caches in this transformers")
    return model_of(base, TARGETS.get(kind, ["q_b_proj", "kv_b_proj", "o_proj"])), base


def prompts(starts: list[int | None], width: int = 20) -> torch.Tensor:
    ids = torch.randint(FIRST, VOCAB, (len(starts), width))
    for row, start in enumerate(starts):
        if start is not None:
            ids[row, start : start + 3] = torch.tensor(ASK)
    return ids


GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": None}


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 6}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [*LATENT, "Doge"])
def test_generate(kind, how):
    """Rows of earlier forwards keep their own part, whatever the cache gives back."""
    model, base = pair(kind)
    starts = [12, 3, None]
    ids = prompts(starts)
    want = greedy(defined(model, base, starts), ids, 5)
    got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, **how,
                         disable_compile=True)  # fmt: skip
    assert torch.equal(got, want)


def test_generate_with_padding_on_the_left():
    model, base = pair("DeepseekV3")
    starts = [12, 9]
    ids = prompts(starts)
    mask = torch.ones_like(ids)
    mask[1, :6] = ids[1, :6] = 0
    want = greedy(defined(model, base, starts), ids, 5, mask)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), want)


@pytest.mark.parametrize("chunks", [(20,), (1,) * 20, (13, 7), (5, 8, 1, 6)], ids=str)
def test_a_cache_that_is_continued(chunks):
    """Every way to cut a row into forwards gives the logits of the whole row."""
    model, base = pair("DeepseekV3")
    starts = [12, 3]
    ids = prompts(starts)
    want = defined(model, base, starts)(input_ids=ids, use_cache=False).logits
    got, cache, begin = [], None, 0
    with torch.no_grad(), adapter_scope(model, "default", starts=starts):
        for length in chunks:
            piece = ids[:, begin : begin + length]
            output = model(input_ids=piece, use_cache=True, **cached(model, cache))
            cache, begin = cache_of(output), begin + length
            got.append(output.logits)
    assert (torch.cat(got, 1) - want).abs().max() < 1e-4


def test_a_chunk_as_long_as_the_static_cache_after_it():
    """The rows coincide with the chunk's tokens once, at the start, and never again."""
    model, base = pair("DeepseekV3")
    starts = [12, 3]
    ids = prompts(starts)
    want = defined(model, base, starts)(input_ids=ids, use_cache=False).logits
    for first in (20, 10):
        cache = transformers.StaticCache(config=base.config, max_cache_len=20)
        got = []
        with torch.no_grad(), adapter_scope(model, "default", starts=starts):
            for piece in ids.split(first, 1):
                got.append(model(input_ids=piece, use_cache=True, **cached(model, cache)).logits)
        assert (torch.cat(got, 1) - want).abs().max() < 1e-4


def test_mixed_rows_and_a_plain_adapter():
    base = base_of("DeepseekV3")
    model = accelerate(adapted(copy.deepcopy(base), target_modules=["q_b_proj", "kv_b_proj"]))
    ids = prompts([12, 3, None])
    rows = ["ask", "plain", "__base__"]
    got = model.generate(input_ids=ids, adapter_names=rows, attention_mask=torch.ones_like(ids),
                         **GREEDY)  # fmt: skip
    for row, (name, start) in enumerate(zip(("ask", "plain", "ask"), (12, 0, None))):
        want = greedy(defined(model, base, [start], name), ids[row : row + 1], 5)
        assert torch.equal(got[row : row + 1], want), name
    model.set_adapter("plain")
    want = greedy(defined(model, base, [0] * 3, "plain"), ids, 5)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), want)


def test_session():
    """Answers over one shared context, alone and in one batch, with and without an adapter."""
    base = base_of("DeepseekV3")
    model = accelerate(adapted(copy.deepcopy(base), target_modules=["q_b_proj", "kv_b_proj"]))
    context = torch.randint(FIRST, VOCAB, (1, 12))
    session = Session(model, tokenizer()).extend(context[0].tolist())
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    asked = [("ask", [*ASK, 20, 21]), ("sum", [30, *SUM]), (None, [40])]
    want = []
    for name, prompt in asked:
        start = None if name is None else 12 + (name == "sum")
        row = torch.cat([context, torch.tensor([prompt])], 1)
        whole = greedy(defined(model, base, [start], name or "ask"), row, 5, bad=[2])
        want.append(whole[0, row.shape[1] :].tolist())
    for (name, prompt), tokens in zip(asked, want):
        assert list(session.generate(name, prompt, **options).token_ids) == tokens
    names, texts = zip(*asked)
    answers = session.ask(list(names), list(texts), **options)
    assert [list(answer.token_ids) for answer in answers] == want


def test_prefix_forward_of_an_accelerated_model():
    model, base = pair("DeepseekV3")
    ids = prompts([12, 3])
    labels = ids.clone()
    for row, start in enumerate((12, 3)):
        labels[row, : start + 3] = -100
    logits = defined(model, base, [12, 3])(input_ids=ids, use_cache=False).logits
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(want, [p for n, p in model.named_parameters() if "lora" in n])
    model.train()
    assert prefix_problems(model) == []
    for prefix in ("full", "no_grad"):
        model.zero_grad()
        loss = prefix_forward(model, ids, None, labels, prefix).loss
        assert abs(loss - want) < 1e-5
        loss.backward()
        got = [p.grad for n, p in model.named_parameters() if "lora" in n]
        for one, other in zip(got, wanted):
            assert (one - other).norm() <= 1e-4 * other.norm()


def test_the_guard_names_the_layer_of_a_model_that_peft_runs():
    base = base_of("DeepseekV3")
    config = LoraConfig(target_modules=["kv_b_proj"], task_type="CAUSAL_LM",
                        alora_invocation_tokens=ASK)  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config)
    (problem,) = prefix_problems(model)
    assert "model.layers.0.self_attn.kv_b_proj" in problem and "DeepseekV3" in problem
    config = LoraConfig(target_modules=["q_b_proj"], task_type="CAUSAL_LM",
                        alora_invocation_tokens=ASK)  # fmt: skip
    assert prefix_problems(get_peft_model(copy.deepcopy(base), config)) == []


class Renamed(nn.Module):
    """An attention of another make: it caches, renames, and projects in a method."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states: Any, past: Any = None) -> Any:
        small = self.down(hidden_states)
        if past is not None:
            small, _ = past.update(small, small, 0)
        seen = small[0].transpose(0, 1)
        return self.out(hidden_states), self.expand(whole=seen)

    def expand(self, whole: Any) -> Any:
        return self.up(whole)


def test_places_are_read_from_the_source():
    places = find_places(nn.ModuleDict({"attention": Renamed()}),
                         [f"attention.{n}" for n in ("down", "up", "out")])  # fmt: skip
    assert places == {"attention.up": CACHE}
    base = base_of("DeepseekV3")
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    found = {n for n, place in find_places(base, linear).items() if place == CACHE}
    assert found == {f"model.layers.{i}.self_attn.kv_b_proj" for i in range(2)}


def test_rows_that_the_cache_does_not_explain_are_refused():
    """A token layer that suddenly gets other rows: an error, also when every token is active."""
    model, _ = pair("DeepseekV3")
    block = model.get_base_model().model.layers[0].self_attn
    block.q_a_proj.register_forward_hook(lambda _, args, y: torch.cat([y, y], 1))
    ids = prompts([0, 0])
    for starts in ([5, 5], [None, None]):
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match="which of its rows are active"),
            adapter_scope(model, "default", starts=starts),
        ):
            model(input_ids=ids)
