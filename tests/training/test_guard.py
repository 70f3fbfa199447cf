"""The shortcut is refused, with the reason, wherever it would be wrong."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import base_config, make_batch, make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from alora_kernels.training import (
    PrefixError,
    PrefixStore,
    checkpointing,
    guard,
    prefix_forward,
    prefix_problems,
)

BATCH = make_batch([(9, 6)])


def refused(model, match, **inputs):
    with pytest.raises(PrefixError, match=match):
        prefix_forward(model, *BATCH, **inputs)
    assert len(prefix_problems(model, inputs)) == 1
    assert model.training  # nothing ran, nothing changed


def test_a_good_model_has_no_problem():
    for kind in ("llama", "gemma3", "mistral", "qwen3"):
        assert prefix_problems(make_model(kind)) == []


def test_trainable_embeddings():
    model = make_model()
    model.get_input_embeddings().weight.requires_grad_(True)
    refused(model, r"1 trainable parameters outside of the adapter.*embed_tokens")


def test_modules_to_save():
    refused(make_model(modules_to_save=["lm_head"]), "outside of the adapter.*lm_head")


def test_plain_lora():
    model = make_model(tokens=None)
    with pytest.raises(PrefixError, match="plain LoRA"):
        prefix_forward(model, *BATCH)


def test_a_second_active_adapter():
    model = make_model()
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(PrefixError, match=r"'other' is a plain LoRA[\s\S]*2 adapters are active"):
        prefix_forward(model, *BATCH)


def test_prompt_tuning():
    base = AutoModelForCausalLM.from_config(base_config("llama"))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(PrefixError, match="PROMPT_TUNING"):
        prefix_forward(model.train(), *BATCH)


def test_not_a_peft_model():
    base = AutoModelForCausalLM.from_config(base_config("llama"))
    with pytest.raises(PrefixError, match="not a PeftModel"):
        prefix_forward(base, *BATCH)
    with pytest.raises(TypeError, match="must be a PeftModel, got LlamaForCausalLM"):
        prefix_forward(base, *BATCH, "full")


def test_bidirectional_attention():
    model = make_model("gemma3")
    model.get_base_model().config.use_bidirectional_attention = True
    refused(model, "bidirectional")


def test_a_merged_adapter():
    model = make_model(targets=["q_proj"])
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    model.base_model.merge_adapter(["other"])
    refused(model, "'other' is merged into the base")


def small(kind: str, **changes):
    """A tiny model of a kind that names its sizes as BERT does."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, **changes,
    )  # fmt: skip
    return config


ENCODERS = ["Bert", "BertGeneration", "Camembert", "Electra", "Roberta", "RoFormer", "XLMRoberta",
            "MegatronBert", "RemBert"]  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_decoder_that_is_not_told_to_be_one(kind):
    """These see the whole row unless config.is_decoder says otherwise."""
    model = make_model(config=small(kind), targets=["query"], attention="eager")
    problems = prefix_problems(model.eval())
    assert any("bidirectional (config.is_decoder=False" in problem for problem in problems)
    with pytest.raises(PrefixError, match="is_decoder"):
        prefix_forward(model, *BATCH)


@pytest.mark.parametrize("kind", ["Bert", "RoFormer"])
def test_a_decoder_that_is_told_to_be_one(kind):
    config = small(kind, is_decoder=True)
    model = make_model(config=config, targets=["query", "value"], attention="eager").eval()
    assert prefix_problems(model) == []
    with torch.no_grad():
        want = prefix_forward(model, *BATCH, "full").loss
        assert abs(prefix_forward(model, *BATCH).loss - want) <= 1e-5 * want


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_positions_that_do_not_begin_at_zero(kind):
    config = small(kind, is_decoder=True)
    model = make_model(config=config, targets=["query", "value"], attention="eager").eval()
    assert any("counts positions from its padding index" in p for p in prefix_problems(model))


def test_a_model_that_counts_positions_by_its_cache():
    """It is not told them, so prefixes of different lengths would be misplaced."""
    config = small("RoFormer", is_decoder=True)
    model = make_model(config=config, targets=["query", "value"], attention="eager").eval()
    ids = torch.randint(10, 97, (2, 12))
    labels = ids.masked_fill(torch.arange(12) < 8, -100)
    with pytest.raises(PrefixError, match="prefixes of 4 to 6 tokens, or padding on the left"):
        prefix_forward(model, ids, None, labels, starts=[6, 4])
    with torch.no_grad():
        want = prefix_forward(model, ids, None, labels, "full", starts=[6, 6]).loss
        got = prefix_forward(model, ids, None, labels, starts=[6, 6]).loss
    torch.testing.assert_close(got, want)


def test_attention_that_was_made_bidirectional():
    model = make_model()
    model.get_base_model().config.is_causal = False
    refused(model, "config.is_causal=False")
    model = make_model()
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    refused(model, "is_causal=False in its attention layers")


@pytest.mark.parametrize("kind", ["OpenAIGPT", "XLNet", "XLM"])
def test_models_without_a_cache(kind):
    sizes = {"OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4},
             "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
             "XLM": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True}}[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=97, **sizes)
    targets = {"OpenAIGPT": ["c_attn"], "XLNet": ["layer_1"], "XLM": ["q_lin"]}[kind]
    model = make_model(config=config, targets=targets, attention="eager").eval()
    with pytest.raises(PrefixError, match="cache"):
        prefix_forward(model, *BATCH)


def test_a_cache_that_is_not_filled():
    """Whatever the signature says: a layer that stored nothing is found before the loss."""
    model = make_model()
    attention = model.get_base_model().model.layers[1].self_attn
    forward = attention.forward

    def forgetful(*args, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")}
        return forward(*args, **kwargs)

    attention.forward = forgetful
    with pytest.raises(PrefixError, match=r"stored no keys and values.*layers \[1\]"):
        prefix_forward(model, *BATCH)


def test_base_dropout_only_in_training():
    model = make_model(config=base_config("llama", attention_dropout=0.1))
    refused(model, "attention_dropout=0.1")
    assert prefix_problems(model.eval()) == []


def test_dropout_module():
    model = make_model()
    model.get_base_model().model.layers[0].extra = torch.nn.Dropout(0.1).train()
    refused(model, "drops activations.*extra")


def test_adapter_dropout_is_fine():
    assert prefix_problems(make_model(dropout=0.3)) == []


def test_router_loss():
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, sliding_window=None,
        output_router_logits=True,
    )  # fmt: skip
    targets = ["q_proj", "v_proj"]
    refused(make_model(config=config, targets=targets), "router's auxiliary loss")
    config.output_router_logits = False
    assert prefix_problems(make_model(config=config, targets=targets)) == []


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length(kind):
    model = make_model()
    model.get_base_model().config.rope_parameters = {"rope_type": kind, "factor": 2.0}
    refused(model, f"'{kind}' depends on the total length")


def test_recurrent_layers():
    model = make_model()
    model.get_base_model().config.layer_types = [
        "full_attention",
        "linear_attention",
        "full_attention",
    ]
    refused(model, "layer 1 uses linear attention")


@pytest.mark.parametrize("name", ["Mamba", "Bamba"])
def test_models_with_a_recurrent_state(name):
    common = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    if name == "Mamba":
        config = transformers.MambaConfig(**common, state_size=4)
    else:
        config = transformers.BambaConfig(
            **common, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        )  # fmt: skip
    model = make_model(config=config, targets=["in_proj"], attention="eager")
    with pytest.raises(PrefixError, match="recurrent"):
        prefix_forward(model, *BATCH)


def test_chunked_attention():
    model = make_model()
    config = model.get_base_model().config
    config.layer_types = ["chunked_attention"] * 3
    config.attention_chunk_size = 8
    refused(model, "chunked attention")


def test_untested_attention():
    model = make_model()
    model.get_base_model().config._attn_implementation = "flex_attention"
    refused(model, "'flex_attention' is not tested")


def test_neftune():
    model = make_model()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    refused(model, "NEFTune")


def test_prefix_loss_asked_for():
    with pytest.raises(PrefixError, match="prefix_loss"):
        prefix_forward(make_model(), *BATCH, prefix_loss=True)
    assert prefix_forward(make_model(), *BATCH, "full", prefix_loss=True).loss > 0


def test_other_inputs():
    refused(make_model(), "'token_type_ids'", token_type_ids=torch.zeros(1, 18))


def test_checkpointed_layers_without_a_cache(monkeypatch):
    model = make_model()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    monkeypatch.setattr(checkpointing, "CACHE_ARGUMENTS", ())
    refused(model, "takes the cache away under gradient checkpointing")
    with torch.no_grad():
        assert prefix_problems(model) == []


def test_checkpointed_hooks(monkeypatch):
    """transformers 4.57: PEFT's own step fails in torch's checkpoint there."""
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_input_embeddings()._forward_hooks.clear()  # transformers 5 enables it by itself
    monkeypatch.setattr(guard, "hooks_run_again", lambda: True)
    refused(model, r"call model.enable_input_require_grads\(\), or accelerate")
    model.enable_input_require_grads()
    assert prefix_problems(model) == []


def test_a_checkpoint_that_peft_does_not_know():
    """FSDP's activation_checkpointing: PEFT's offsets are gone when the layer runs again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    layers = model.get_base_model().model.layers
    layers[1] = checkpoint_wrapper(layers[1])
    refused(model, "recomputes layers after PEFT has switched the adapter off")
    assert prefix_problems(model.eval()) == []


def test_several_reasons_are_listed_together():
    model = make_model(config=base_config("llama", attention_dropout=0.1))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(PrefixError, match=r"trainable[\s\S]*attention_dropout"):
        prefix_forward(model, *BATCH)


def test_full_is_never_refused():
    model = make_model(config=base_config("llama", attention_dropout=0.1))
    assert prefix_forward(model, *BATCH, "full").loss > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prefix": "none"}, "prefix must be one of"),
        ({"prefix": "cached"}, "needs store"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"starts": [3, 4]}, r"one entry per row, \[1\], got \[2\]"),
        ({"starts": [17]}, r"start at column 17, but its real tokens are \[0, 15\)"),
    ],
)
def test_bad_arguments(change, match):
    with pytest.raises(ValueError, match=match):
        prefix_forward(make_model(), *BATCH, **change)


def test_bad_masks_and_labels():
    model = make_model()
    ids, mask, labels = make_batch([(9, 6)])
    holes = mask.clone()
    holes[0, 4] = 0
    with pytest.raises(ValueError, match="row 0 has holes"):
        prefix_forward(model, ids, holes, labels)
    with pytest.raises(ValueError, match="labels on padding"):
        prefix_forward(model, ids, mask, ids)
    with pytest.raises(ValueError, match="4-D mask"):
        prefix_forward(model, ids, torch.ones(1, 1, 18, 18), labels)
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        prefix_forward(model, ids[0])


def test_store_is_not_used_by_no_grad():
    store = PrefixStore()
    prefix_forward(make_model(), *BATCH, "no_grad", store=store)
    assert len(store) == 0
