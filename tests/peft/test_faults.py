"""Training, checkpointing, packing, threads, exceptions; and what is refused."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model

import alora_kernels
from alora_kernels.peft import accelerate, check_adapter_folder, restore

from .models import ASK, SUM, adapted, base_model, lora, prompt, put, twins


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(mine, other):
    assert mine.keys() == other.keys() and mine
    for name in other:
        torch.testing.assert_close(mine[name], other[name], atol=1e-5, rtol=1e-4)


def batches():
    first = put(put(prompt(2, 14), 0, 3, ASK), 1, 9, ASK)
    return first, put(put(prompt(3, 11), 0, 6, ASK), 2, 1, ASK)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_two_forwards_before_a_backward(reentrant):
    """Each recomputation runs under its own forward's activation, evaluation in between."""
    model, stock = twins()
    first, second = batches()
    stock.train()
    loss = stock(input_ids=first, labels=first).loss + stock(input_ids=second, labels=second).loss
    loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    one = model(input_ids=first, labels=first, use_cache=False).loss
    two = model(input_ids=second, labels=second, use_cache=False).loss
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=first, labels=first).loss, one.detach())
        model.generate(input_ids=first, max_new_tokens=2, attention_mask=torch.ones_like(first))
    model.train()
    (one + two).backward()
    close(grads(model), grads(stock))
    gc.collect()


def test_states_of_a_checkpointed_forward_are_freed():
    model, _ = twins()
    first, _ = batches()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    owner = model.__dict__["_alora_acceleration"]
    seen = []
    state_of = owner.state_of
    owner.state_of = lambda *a: seen.append(weakref.ref(s := state_of(*a))) or s
    loss = model(input_ids=first, labels=first, use_cache=False).loss
    assert seen[0]() is not None
    loss.backward()
    del loss, owner.state_of
    gc.collect()
    assert seen[0]() is None


def test_trainer_with_checkpointing_and_evaluation(tmp_path):
    """The losses and weights of a Trainer equal PEFT's without checkpointing."""
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in (put(prompt(1, 12), 0, i % 6, ASK)[0] for i in range(8))
    ]
    results = []
    model, stock = twins()
    for m, checkpointing in ((model, True), (stock, False)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)),
            per_device_train_batch_size=2,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=m, args=arguments, train_dataset=rows, eval_dataset=rows[:3]
        )
        trainer.train()
        history = trainer.state.log_history
        results.append([h.get("loss", h.get("eval_loss")) for h in history[:-1]])
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]))
    for mine, other in zip(model.parameters(), stock.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_a_training_row_without_its_invocation_warns_once_with_its_index():
    model, _ = twins()
    ids = put(prompt(3, 12), 0, 4, ASK)
    model.train()
    with pytest.warns(UserWarning, match="training row 1, 2 of this batch has no invocation"):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=ids)
        model.eval()(input_ids=ids)


def test_rows_without_invocation_give_zero_gradients():
    model, _ = twins()
    ids = prompt(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    found = grads(model)
    assert len(found) == 28 and not any(g.any() for g in found.values())


def test_no_gradient_to_the_prefix_is_a_choice():
    _, stock = twins()
    model = accelerate(copy.deepcopy(stock), prefix_grad=False)
    ids = put(prompt(2, 12), 0, 3, ASK)
    for m in (model, stock):
        m(input_ids=ids, labels=ids).loss.backward()
    close(grads(model), grads(stock))


# ---------------------------------------------------------------------- packed rows


def test_packed_rows_run_each_sequence_on_its_own():
    """Two sequences in a row, each with its invocation, equal the sequences alone."""
    model, _ = twins()
    one, two, three = prompt(1, 9), prompt(1, 12), prompt(1, 5)
    put(put(one, 0, 1, ASK), 0, 4, ASK)
    put(two, 0, 6, ASK)
    row = torch.cat([one, two, three], 1)
    position_ids = torch.cat([torch.arange(n) for n in (9, 12, 5)])[None]
    owner = model.__dict__["_alora_acceleration"]
    state = owner.state_of((), {"input_ids": row, "position_ids": position_ids})
    alone = [owner.state_of((), {"input_ids": s}) for s in (one, two, three)]
    expected = torch.cat([s.activations["ask"].mask for s in alone])
    assert torch.equal(state.activations["ask"].mask, expected)
    assert expected.sum() == 5 + 6
    borders = {"input_ids": row, "cu_seq_lens_q": torch.tensor([0, 9, 21, 26])}
    by_borders = owner.state_of((), borders)
    assert torch.equal(by_borders.activations["ask"].mask, expected)
    with torch.no_grad():
        got = model(input_ids=row, position_ids=position_ids, use_cache=False).logits
        logits = torch.cat([model(input_ids=s).logits for s in (one, two, three)], 1)
    torch.testing.assert_close(got, logits)


def test_an_invocation_across_a_border_does_not_count():
    model, _ = twins()
    row = put(prompt(1, 12), 0, 5, ASK)
    position_ids = torch.cat([torch.arange(6), torch.arange(6)])[None]
    owner = model.__dict__["_alora_acceleration"]
    state = owner.state_of((), {"input_ids": row, "position_ids": position_ids})
    assert not state.activations["ask"].mask.any()
    state = owner.state_of((), {"input_ids": row})
    assert state.activations["ask"].mask.sum() == 7


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_of_padding_are_no_border(side):
    model, stock = twins()
    real = put(prompt(1, 10), 0, 4, ASK)
    pad = torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([pad, real] if side == "left" else [real, pad], 1)
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    keywords = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        got, expected = model(**keywords).logits, stock(**keywords).logits
        torch.testing.assert_close(got[mask != 0], expected[mask != 0])
        alone = model(input_ids=real).logits[0]
    torch.testing.assert_close(got[mask != 0], alone, atol=1e-4, rtol=1e-4)


def test_random_packings():
    """The packed search against a loop over the sequences."""
    from alora_kernels.peft.search import packed_mask

    for _ in range(50):
        length, tokens = int(torch.randint(1, 24, ())), [1, 2][: int(torch.randint(1, 3, ()))]
        ids = torch.randint(0, 3, (2, length))
        begin = torch.rand(2, length) < 0.25
        expected = torch.zeros(2, length, dtype=torch.bool)
        for b in range(2):
            edges = sorted({0, length, *begin[b].nonzero().flatten().tolist()})
            for lo, hi in itertools.pairwise(edges):
                own = ids[b, lo:hi].tolist()
                places = [i for i in range(len(own)) if own[i : i + len(tokens)] == tokens]
                if places:
                    expected[b, lo + places[-1] : hi] = True
        assert torch.equal(packed_mask(ids, tokens, begin), expected)


# ---------------------------------------------------------------------- semantics


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ([20, 5, 6, 7, 30, 31], 1),
        ([5, 6, 7, 30, 5, 6, 7], 4),  # the last one
        ([20, 21, 5, 6], None),  # cut off
        ([5, 6, 7], 0),  # nothing else
        ([5, 6, 5, 6, 7, 5, 6], 2),  # overlapping beginnings
        ([0, 0, 0, 0, 0], None),  # padding only
        ([0, 0, 5, 6, 7, 20], 2),  # left padding
        ([20, 5, 6, 7, 0, 0], 1),  # right padding
        ([5, 20, 6, 7], None),  # not in one piece
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_where_a_row_begins(row, start, masked):
    model, stock = twins()
    ids = torch.tensor([row])
    keywords = {"attention_mask": (ids != 0).long()} if masked and any(row) else {}
    owner = model.__dict__["_alora_acceleration"]
    mask = owner.state_of((), {"input_ids": ids, **keywords}).activations["ask"].mask
    expected = torch.arange(len(row)) >= (len(row) if start is None else start)
    assert torch.equal(mask, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, **keywords).logits, stock(input_ids=ids, **keywords).logits
        )


def test_token_ids_are_matched_not_text():
    """The same text in other tokens is no invocation: only the ids count."""
    model, _ = twins()
    owner = model.__dict__["_alora_acceleration"]
    merged = torch.tensor([[20, 40, 41]])  # ids that a tokenizer may give the same letters
    assert not owner.state_of((), {"input_ids": merged}).activations["ask"].mask.any()


# ---------------------------------------------------------------------- robustness


def test_an_exception_inside_forward_leaves_nothing_behind():
    from alora_kernels.peft.ambient import current_state

    model, stock = twins()
    ids = put(prompt(2, 12), 0, 3, ASK)

    def fail(*_):
        raise KeyError("mine")

    handle = model.get_base_model().model.layers[1].mlp.act_fn.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            model(input_ids=ids)
        with pytest.raises(KeyError, match="mine"):
            model.generate(input_ids=ids, max_new_tokens=2)
        assert current_state() is None
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_groups_hold_nothing_after_a_forward_and_dissolve_when_wrong():
    model, stock = twins()
    attention = model.get_base_model().model.layers[0].self_attn
    group = attention.q_proj.alora_group
    assert [
        m is getattr(attention, n) for m, n in zip(group.members, ("q_proj", "k_proj", "v_proj"))
    ]
    assert (
        len(group) == 3 and len(model.get_base_model().model.layers[0].mlp.up_proj.alora_group) == 2
    )
    forward = attention.k_proj.forward
    copies = lambda x: forward(x.clone())  # noqa: E731
    attention.k_proj.__dict__["forward"] = copies
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        assert not group.enabled
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_a_hook_on_a_grouped_layer_or_its_parts_is_called():
    model, stock = twins()
    calls = []
    for m in (model, stock):
        attention = m.get_base_model().model.layers[0].self_attn
        attention.k_proj.register_forward_hook(lambda *_: calls.append("layer"))
        attention.v_proj.base_layer.register_forward_hook(lambda *_: calls.append("base"))
        attention.v_proj.lora_A["ask"].register_forward_hook(lambda *_: calls.append("a"))
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        mine = model(input_ids=ids).logits
        first, calls[:] = list(calls), []
        torch.testing.assert_close(mine, stock(input_ids=ids).logits)
    assert sorted(first) == sorted(calls) == ["a", "base", "layer"]


# ---------------------------------------------------------------------- other ways in


def test_tasks_other_than_causal_lm():
    base = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).eval()
    with pytest.warns(UserWarning, match="CAUSAL_LM"):
        config = lora(ASK, task_type=TaskType.SEQ_CLS, target_modules=["q_proj", "down_proj"])
    stock = get_peft_model(base, config).eval()
    model = accelerate(copy.deepcopy(stock))
    ids = put(prompt(2, 10), 0, 4, ASK)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, stock(input_ids=ids, alora_offsets=[6, None]).logits
        )
        assert not torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("way", ["add_adapter", "inject"])
def test_adapters_without_a_peft_model(way):
    torch.manual_seed(5)
    base = base_model()
    if way == "add_adapter":
        try:
            base.add_adapter(lora(ASK, target_modules=["q_proj", "down_proj"]), "default")
        except ValueError as error:
            pytest.skip(f"this transformers refuses this peft: {error}")
    else:
        config = lora(ASK, target_modules=["q_proj", "down_proj"])
        inject_adapter_in_model(config, base, "default")
    plain = base_model()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora" not in k}
    )
    stock = get_peft_model(plain, lora(ASK, target_modules=["q_proj", "down_proj"]))
    for (name, layer), other in zip(base.named_modules(), plain.modules()):
        if hasattr(layer, "lora_A"):
            assert name
            other.load_state_dict(layer.state_dict())
    model = accelerate(base)
    assert model is base
    ids = put(prompt(2, 10), 0, 4, ASK)
    keywords = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        assert torch.equal(
            model.generate(input_ids=ids, use_cache=False, **keywords),
            stock.generate(input_ids=ids, **keywords),
        )


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_rewrites_the_base_is_refused(start):
    model = get_peft_model(base_model(), lora(ASK, init_lora_weights=start))
    with pytest.raises(ValueError, match="changes the base weights"):
        accelerate(model)
    accelerate(get_peft_model(base_model(), lora(None, init_lora_weights=start)))


def test_empty_tokens_are_refused():
    model = get_peft_model(base_model(), lora([]))
    with pytest.raises(ValueError, match="alora_invocation_tokens is empty"):
        accelerate(model)
    model, _ = twins()
    with pytest.raises(ValueError, match="alora_invocation_tokens is empty"):
        model.add_adapter("new", lora([]))
    assert "new" not in model.peft_config


def test_the_older_format_is_refused(tmp_path):
    model, stock = twins()
    stock.save_pretrained(tmp_path, selected_adapters=["ask"])
    folder = tmp_path / "ask"
    assert check_adapter_folder(folder)["alora_invocation_tokens"] == ASK
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = None
    config["invocation_string"] = "<|start_of_role|>check"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="older aLoRA format"):
        check_adapter_folder(folder)
    with pytest.raises(ValueError, match="older aLoRA format"):
        model.load_adapter(str(folder), "old")
    assert "old" not in model.peft_config


def test_an_encoder_decoder_is_refused():
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.warns(UserWarning):
        config = LoraConfig(
            task_type="SEQ_2_SEQ_LM", target_modules=["q"], alora_invocation_tokens=ASK
        )
    with pytest.raises(ValueError, match="encoder-decoder"):
        accelerate(get_peft_model(base, config))


# ---------------------------------------------------------------------- PEFT's other methods


def same(model, stock, ids, **keywords):
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, **keywords).logits, stock(input_ids=ids, **keywords).logits
        )


def test_adapters_come_and_go(tmp_path):
    model, stock = twins()
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 5, SUM)
    for name in ("sum", "plain", "ask"):
        model.set_adapter(name)
        stock.set_adapter(name)
        same(model, stock, ids)
    with model.disable_adapter(), stock.disable_adapter():
        same(model, stock, ids)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    for m in (model, stock):
        m.load_adapter(str(tmp_path / "sum"), "again")
        m.delete_adapter("sum")
        m.set_adapter("again")
    same(model, stock, ids)
    reloaded = PeftModel.from_pretrained(
        copy.deepcopy(stock).unload(), str(tmp_path / "sum"), adapter_name="again"
    )
    same(model, reloaded, ids)
    new = lora(ASK, target_modules=["q_proj", "v_proj"], r=3)
    torch.manual_seed(1)
    model.add_adapter("few", new)
    torch.manual_seed(1)
    stock.add_adapter("few", copy.deepcopy(new))
    for m in (model, stock):
        m.set_adapter("few")
    same(model, stock, ids)
    same(model, stock, ids, adapter_names=["few", "again"])


def test_an_adapter_may_bring_new_layers():
    stock = get_peft_model(base_model(), lora(ASK, target_modules=["q_proj"]), "ask").eval()
    model = accelerate(copy.deepcopy(stock))
    config = lora(SUM, target_modules=["up_proj", "gate_proj"])
    for m in (model, stock):
        torch.manual_seed(2)
        m.add_adapter("sum", copy.deepcopy(config))
        m.set_adapter("sum")
    owner = model.__dict__["_alora_acceleration"]
    assert len(owner.served) == 6
    same(model, stock, put(prompt(2, 10), 0, 4, SUM))


def test_merging_plain_adapters():
    model, stock = twins()
    ids = put(prompt(2, 12), 0, 3, ASK)
    for m in (model, stock):
        m.set_adapter("plain")
        m.merge_adapter()
    same(model, stock, ids)
    for m in (model, stock):
        m.unmerge_adapter()
    same(model, stock, ids)
    model.set_adapter("ask")
    with pytest.raises(NotImplementedError):
        model.merge_adapter()
    model.set_adapter("plain")
    merged, expected = model.merge_and_unload(["plain"]), stock.merge_and_unload(["plain"])
    same(merged, expected, ids)


def test_restore_leaves_the_model_as_it_was():
    stock = adapted(base_model())
    model = copy.deepcopy(stock)
    before = [(n, type(m), dict(m.__dict__)) for n, m in model.named_modules()]
    accelerate(model)
    model.train()
    model.gradient_checkpointing_enable()
    ids = put(prompt(2, 12), 0, 3, ASK)
    model(input_ids=ids)
    model.gradient_checkpointing_disable()
    assert restore(model) is model
    model.eval()
    for (name, kind, fields), (path, module) in zip(before, model.named_modules()):
        assert (name, kind) == (path, type(module))
        # What transformers itself leaves after gradient checkpointing was on.
        extra = {
            key
            for key in set(module.__dict__) - set(fields)
            if "gradient_checkpointing" not in key and "_require_grads" not in key
        }
        assert not extra, (name, extra)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not [h for h in hooks if h.__module__.startswith("alora_kernels")]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert alora_kernels.restore(model) is model  # again: nothing to do
    assert repr(model) == repr(stock)


def test_unload_restores():
    model, stock = twins()
    ids = prompt(2, 9)
    base = model.unload()
    same(base, stock.unload(), ids)
    assert not base._forward_pre_hooks and "generate" not in base.__dict__


def test_copies_are_accelerated_models_of_their_own():
    model, stock = twins()
    twin = copy.deepcopy(model)
    ids = put(put(prompt(2, 12), 0, 3, ASK), 1, 4, SUM)
    twin.set_adapter("sum")
    stock.set_adapter("sum")
    same(twin, stock, ids)
    stock.set_adapter("ask")
    same(model, stock, ids)
    owner = twin.__dict__["_alora_acceleration"]
    assert owner.root is twin.get_base_model()
    assert owner is not model.__dict__["_alora_acceleration"]
    layer = twin.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.alora_owner is owner and layer in layer.alora_group.members
    assert restore(twin) is twin and type(twin) is type(stock)


def test_state_dict_names_and_class_names_are_pefts():
    model, stock = twins()
    assert list(model.state_dict()) == list(stock.state_dict())
    assert type(model).__name__ == type(stock).__name__ and isinstance(model, type(stock))
    assert pickle.dumps(model.state_dict())
    import inspect

    assert inspect.signature(model.forward) == inspect.signature(stock.forward)


def test_names_are_checked():
    model, _ = twins()
    ids = prompt(2, 9)
    with pytest.raises(ValueError, match="unknown adapter 'nobody'"):
        model(input_ids=ids, adapter_names=["ask", "nobody"])
    with pytest.raises(ValueError, match="unknown adapter 'nobody'"):
        model.generate(input_ids=ids, adapter_names=["ask", "nobody"])
    with pytest.raises(ValueError, match="3 starts or alora_offsets were given for a batch of 2"):
        model(input_ids=ids, alora_offsets=[1, 2, 3])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=ids, adapter_names=["ask", "sum"])
