"""`ask` answers as `generate` on whatever model it accepts, and says when it goes one by one."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from alora_kernels.inference import Session, attending

from .architectures import Said, compare, small_model
from .tiny import INVOCATIONS, WINDOW, base_model, context, peft_model, tokenizer

BATCH = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "granite", "cohere", "cohere2"),
    *("olmo2", "gpt2", "gpt_neox", "gptj", "phi", "starcoder2", "mixtral", "qwen3_moe"),
    *("olmoe", "smollm3", "opt", "glm"),
]
ALONE = {
    "gemma2": "attn_logit_softcapping",
    "gemma3n_text": "not plain keys and values",
    "diffllama": "changes the values between the cache and the attention",
    "deepseek_v3": "changes the keys between the cache and the attention",
    "gpt_oss": "computes more than softmax",
    "bloom": "does not take",
    "llama4_text": "attention_chunk_size",
    "doge": "a mask of its own",
    "jetmoe": "changes the keys",
}


@pytest.mark.parametrize(
    "name",
    [n if i < 6 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(BATCH)],
)
def test_models_that_share_the_prefix(name: str) -> None:
    equal, how = compare(small_model(name))
    assert equal and how == "batch"


@pytest.mark.parametrize(
    "name",
    [n if i < 5 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(ALONE)],
)
def test_models_that_do_not(name: str) -> None:
    equal, how = compare(small_model(name))
    assert equal and ALONE[name] in how


# ---------------------------------------------------------------- models as the field changes them


def scaled_values(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return ORIGINAL(module, query, key, value * 1.5, *args, **kwargs)


def rolled_keys(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return ORIGINAL(module, query, key.roll(1, 1), value, *args, **kwargs)


def with_a_sink(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
) -> Any:
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling + mask
    sink = scores.new_full((*scores.shape[:-1], 1), 2.0)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), None


ORIGINAL = modeling_llama.eager_attention_forward


def answers(session: Session, **changes: Any) -> tuple[list[Any], list[Any], list[str]]:
    """`ask`, `generate`, and what was said, on rows of several lengths."""
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    names = [*INVOCATIONS, None] if session.adapters.is_peft else [None] * 3
    prompts = [[20 + i, *range(30, 30 + 2 * i)] for i in range(len(names))]
    with Said() as said:
        together = session.ask(names, prompts, **options, **changes)
    alone = [session.generate(n, p, **options, **changes) for n, p in zip(names, prompts)]
    return together, alone, said.lines


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (with_a_sink, "computes more than softmax"),
        (scaled_values, "computes more than softmax"),
        (rolled_keys, "computes more than softmax"),
    ],
)
def test_an_attention_function_of_its_own(
    monkeypatch: pytest.MonkeyPatch, attention: Any, reason: str
) -> None:
    """Eager attention is the function of a model's file, which a patch may replace at any time."""
    session = Session(base_model("llama", 5, attention="eager").double(), tokenizer())
    session.extend(context(30, 5))
    together, alone, said = answers(session)
    assert together == alone and not said
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    session = Session(session.model, tokenizer()).extend(context(30, 5))
    together, alone, said = answers(session)
    assert together == alone and len(said) == 1 and reason in said[0]


def between_cache_and_attention(change: Callable[..., Any]) -> Callable[..., Any]:
    """A LlamaAttention.forward that changes what comes back from the cache."""

    def forward(
        self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        cache = kwargs.pop("cache", None)
        if cache is None:
            cache = kwargs.pop("past_key_values", None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            p(hidden_states).view(shape).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = cache.update(k, v, self.layer_idx)
        k, v = change(k, v)
        function = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, _ = function(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

    return forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda k, v: (k, v * 2), "changes the values"),
        (lambda k, v: (k, nn.functional.layer_norm(v, v.shape[-1:])), "changes the values"),
        (lambda k, v: (k * 0.7, v), "changes the keys"),
        (lambda k, v: (k, v.contiguous().clone()), "changes the values"),  # could be served; is not
        (lambda k, v: (k, v), None),
    ],
)
def test_values_changed_between_the_cache_and_the_attention(
    monkeypatch: pytest.MonkeyPatch, change: Any, reason: str | None
) -> None:
    forward = between_cache_and_attention(change)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    session = Session(base_model("llama", 6).double(), tokenizer()).extend(context(30, 6))
    together, alone, said = answers(session)
    assert together == alone
    assert (reason is None) is (not said) and (not said or str(reason) in said[0])


def test_a_layer_that_reads_the_cache_without_the_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One layer of three: the suffix alone would be all that it sees."""
    forward = modeling_llama.LlamaAttention.forward

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx != 1:
            return forward(self, *args, **kwargs)
        kept, self.config = self.config, type(self.config)(**self.config.to_dict())
        self.config._attn_implementation = "sdpa"
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config = kept

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", own)
    session = Session(base_model("llama", 6).double(), tokenizer()).extend(context(30, 6))
    together, alone, said = answers(session)
    assert together == alone and len(said) == 1


def test_a_mask_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that the cache knows nothing of, crossed only in the middle of the answers."""
    original = modeling_llama.create_causal_mask

    def windowed(*args: Any, **kwargs: Any) -> Any:
        return original(
            *args, **kwargs, and_mask_function=lambda batch, head, q, kv: kv > q - 2 * WINDOW
        )

    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    session = Session(base_model("llama", 6).double(), tokenizer()).extend(context(22, 6))
    together, alone, said = answers(session)
    assert together == alone and "sees other tokens" in said[0]


def test_positions_counted_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for rows of one length; padding would shift the others."""
    forward = modeling_mistral.MistralModel.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        ids = kwargs["input_ids"]
        begin = cache.get_seq_length() if cache is not None else 0
        kwargs["position_ids"] = torch.arange(begin, begin + ids.shape[1])[None]
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral.MistralModel, "forward", counted)
    session = Session(base_model("mistral", 6).double(), tokenizer()).extend(context(40, 6))
    together, alone, said = answers(session)
    assert together == alone and "has other logits in a batch" in said[0]
    with Said() as silent:
        many = session.ask([None, None], [[30, 31], [40, 41]], max_new_tokens=8, do_sample=False)
    alike = [session.generate(None, p, max_new_tokens=8, do_sample=False) for p in ([30, 31],)]
    assert many[:1] == alike and not silent.lines


def test_rows_that_change_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaMLP.forward

    def mixed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + 0.1 * x.mean(0, keepdim=True)

    session = Session(base_model("llama", 6).double(), tokenizer()).extend(context(40, 6))
    together, alone, said = answers(session)
    assert together == alone and not said
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", mixed)  # after the first ask
    session = Session(session.model, tokenizer()).extend(context(40, 6))
    together, alone, said = answers(session)
    assert together == alone and "has other logits in a batch" in said[0]


def test_the_verdict_is_of_the_config_and_dtype_at_hand() -> None:
    """A config changed after the first ask is looked at again."""
    session = Session(base_model("llama", 6).double(), tokenizer()).extend(context(30, 6))
    forwards: list[int] = []
    handle = session.base.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs["input_ids"].shape[0]),
        with_kwargs=True,
    )

    def asked() -> set[int]:
        forwards.clear()
        session.ask([None] * 3, max_new_tokens=1)
        return set(forwards)

    assert asked() == {1, 3}  # compared with a row alone
    assert asked() == {3}
    session.base.config.rms_norm_eps = 1e-3
    assert asked() == {1, 3}
    session.base.float()
    session = Session(session.base, tokenizer()).extend(context(30, 6))
    assert asked() == {1, 3}
    assert asked() == {3}
    handle.remove()


def test_a_verdict_does_not_keep_a_model_alive() -> None:
    model = base_model("llama", 6)
    model.forward = functools.partial(type(model).forward, model)
    Session(model, tokenizer()).extend(context(12, 6)).ask([None, None], max_new_tokens=1)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_that_fails_in_a_batch_answers_one_by_one() -> None:
    session = Session(base_model("llama", 6).double(), tokenizer()).extend(context(30, 6))

    def one_row(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 1:
            raise RuntimeError("one row at a time")

    handle = session.base.model.register_forward_pre_hook(one_row, with_kwargs=True)
    together, alone, said = answers(session)
    assert together == alone and "a batch fails: RuntimeError: one row" in said[0]
    handle.remove()
    assert not answers(session)[2]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotary_embedding_that_looks_at_the_longest_row(kind: str) -> None:
    """Rows on both sides of the length at which it changes."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope["original_max_position_embeddings"] = 40
    model = base_model("llama", 6, rope_parameters=rope).double()
    session = Session(model, tokenizer()).extend(context(36, 6))
    together, alone, said = answers(session)
    assert together == alone and kind in said[0]


def test_attention_of_other_parts_is_left_alone() -> None:
    """Only the decoder's config is switched, and put back."""
    model = base_model("llama", 6)
    session = Session(model, tokenizer()).extend(context(12, 6))
    seen: list[Any] = []
    handle = model.model.register_forward_pre_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    session.ask([None, None], max_new_tokens=1)
    handle.remove()
    assert f"{attending.NAME}_sdpa" in seen
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_batched_all_the_same(dtype: torch.dtype) -> None:
    """The comparison allows for rounding, and no more: a wrong scale is found."""
    session = Session(peft_model("gemma3", 6).to(dtype), tokenizer()).extend(context(40, 6))
    with Said() as said:
        session.ask([*INVOCATIONS, None], max_new_tokens=4)
    assert not said.lines


def test_stop_strings_of_rows_are_their_own() -> None:
    """A row that has stopped has no padding in its answer, with an end token or without."""
    session = Session(peft_model("llama", 6).double(), tokenizer()).extend(context(30, 6))
    names = [*INVOCATIONS, None]
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    free = [session.generate(n, **options, min_new_tokens=10).token_ids for n in names]
    stops = [session.tokenizer.decode([row[i + 2]]) for i, row in enumerate(free)]
    for ends in ({}, {"eos_token_id": None}):
        alone = [session.generate(n, stop_strings=stops, **options, **ends) for n in names]
        assert session.ask(names, stop_strings=stops, **options, **ends) == alone
        assert len({len(a.token_ids) for a in alone}) > 1
