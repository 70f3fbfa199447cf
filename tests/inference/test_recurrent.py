"""Models with recurrent layers: their state is copied for each call, or they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM, cache_utils

from alora_kernels.inference import CacheError, Session
from alora_kernels.inference.views import tensors_of

from .architectures import small_model
from .tiny import GREEDY, INVOCATIONS, VOCABULARY, base_model, check, context, peft_model, tokenizer

RECURRENT_LAYERS = hasattr(cache_utils, "LinearAttentionLayer")


@pytest.mark.skipif(RECURRENT_LAYERS, reason="this transformers has layers for recurrent states")
def test_a_recurrent_model_of_older_transformers_is_refused() -> None:
    with pytest.raises(CacheError, match="BambaForCausalLM does not keep what it has read"):
        Session(base_model("bamba", 1), tokenizer())


@pytest.mark.skipif(not RECURRENT_LAYERS, reason="this transformers refuses Bamba, see above")
def test_a_recurrent_state_is_copied_for_each_call(seed: int) -> None:
    """Several tokens on a state, alone and by ask, kept, in chunks; the base's state untouched."""
    model, reference = peft_model("bamba", seed), peft_model("bamba", seed)
    ids = context(20, seed)
    session = Session(model, tokenizer(), prefill_chunk=7).extend(ids)
    kinds = {type(layer).__name__ for layer in session.cache.layers}
    assert kinds == {"LinearAttentionLayer", "DynamicLayer"}
    before = [t.clone() for t in tensors_of(session.cache)]
    answers = [session.generate(name, **GREEDY) for name in (None, *INVOCATIONS)]
    answers += session.ask([None, *INVOCATIONS], **GREEDY)
    after = tensors_of(session.cache)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    kept = session.generate("red", keep=True, **GREEDY)
    assert [check(reference, ids, answer) for answer in (*answers, kept)] == [0] * 9
    later = [*session.token_ids]
    assert later == [*ids, *kept.invocation, *kept.token_ids]
    fresh = Session(model, tokenizer()).extend(later)
    for grown, scratch in zip(tensors_of(session.cache), tensors_of(fresh.cache)):
        torch.testing.assert_close(grown, scratch, rtol=0, atol=2e-4)
    assert check(reference, later, session.generate("blue", **GREEDY)) == 0


def test_a_state_outside_the_cache_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=8)).eval()
    wanted = r"every layer of the cache is recurrent \(LinearAtt|does not keep what it has read"
    with pytest.raises(CacheError, match=wanted):
        Session(mamba, tokenizer())
    rwkv = RwkvForCausalLM(RwkvConfig(**sizes, context_length=64)).eval()
    with pytest.raises(CacheError, match="RwkvForCausalLM does not keep what it has read"):
        Session(rwkv, tokenizer())


@pytest.mark.skipif(not RECURRENT_LAYERS, reason="refused by its missing DynamicCache")
def test_a_state_in_the_modules_is_refused() -> None:
    """RecurrentGemma: an answer would depend on the calls before it."""
    session = Session(small_model("recurrent_gemma"), tokenizer())
    with pytest.raises(CacheError, match="RecurrentGemmaForCausalLM keeps the state of its rec"):
        session.extend(context(12, 1))
    assert session.token_ids == ()
