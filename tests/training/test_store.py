"""What the prefix store keeps, drops, recognises and survives."""

from __future__ import annotations

import pytest
import torch
from models import make_batch, make_model

from alora_kernels.training import PrefixStore, prefix_forward
from alora_kernels.training.passes import ModelCall

ROW = [(16, 6)]


def step(model, batch, store):
    return prefix_forward(model, *batch, "cached", store=store).loss


def entry_bytes(model, batch) -> int:
    store = PrefixStore()
    step(model, batch, store)
    return store.bytes


def poison(store):
    """Make every stored value visible in the loss."""
    for layers in store._memory.values():
        for _, values in layers:
            values.fill_(float("nan"))


def test_a_hit_reads_the_store(seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore()
    first = step(model, batch, store)
    assert torch.equal(step(model, batch, store), first)
    assert (store.hits, store.misses, len(store)) == (1, 1, 1)
    poison(store)
    assert step(model, batch, store).isnan()


def test_a_prefix_stored_in_inference_mode_serves_training(seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore()
    with torch.inference_mode():
        first = step(model, batch, store)
    loss = step(model, batch, store)
    loss.backward()
    assert store.hits == 1 and torch.equal(loss, first)
    got = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    prefix_forward(model, *batch, "no_grad").loss.backward()
    for grad, p in zip(got, [p for p in model.parameters() if p.requires_grad]):
        torch.testing.assert_close(grad, p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("known", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_any_rows_of_a_batch_may_be_known(known, seed):
    """Whichever rows the store has, the others are computed from their own tokens."""
    model = make_model(seed=seed)
    batch = make_batch([(16, 6), (9, 6), (12, 8)], seed=seed)
    store = PrefixStore()
    step(model, tuple(t[list(known)] for t in batch), store)
    want = prefix_forward(model, *batch, "no_grad").loss
    for _ in range(2):  # the second time all are known
        assert abs(step(model, batch, store) - want) <= 1e-12 * want
    assert (store.hits, store.misses) == (len(known) + 3, 3)


def test_stored_values_are_copies(seed):
    """An entry must not keep the whole batch's tensors alive, nor share their memory."""
    model, batch = make_model("gemma3", seed=seed), make_batch([(16, 6), (5, 6)], seed=seed)
    store = PrefixStore()
    step(model, batch, store)
    held = {
        t.untyped_storage().nbytes() for row in store._memory.values() for kv in row for t in kv
    }
    need = {
        t.numel() * t.element_size() for row in store._memory.values() for kv in row for t in kv
    }
    assert held == need


def test_rows_that_share_a_prefix_share_its_pass(seed, monkeypatch):
    model = make_model(seed=seed)
    ids, mask, labels = make_batch([(16, 6), (9, 6), (16, 8)], seed=seed)
    ids[2, :16] = ids[0, :16]
    rows = []
    for name in ("collect", "run"):
        method = getattr(ModelCall, name)

        def counted(self, input_ids, *args, method=method, **kwargs):
            rows.append(len(input_ids))
            return method(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(ModelCall, name, counted)
    store = PrefixStore()
    loss = step(model, (ids, mask, labels), store)
    assert rows == [2, 3]  # prefixes, suffixes
    assert len(store) == 2
    plain = prefix_forward(model, ids, mask, labels).loss
    assert abs(loss - plain) <= 1e-12 * plain


def scaled(module, factor):
    forward = type(module).forward
    module.forward = lambda x: forward(module, x) * factor


@pytest.mark.parametrize("edit", ["hook", "pre-hook", "removed", "forward", "class", "everywhere"])
def test_the_code_of_others_keeps_nothing(edit, seed, monkeypatch):
    """What it computes has no name: prefixes are computed anew, and it is said once."""
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    layer = model.get_base_model().model.layers[0].mlp
    store, handles = PrefixStore(), []
    if edit == "removed":
        handles.append(layer.register_forward_hook(lambda *args: args[2] * 1.5))
    if edit == "forward":
        scaled(layer, 1.5)
    step(model, batch, store)
    if edit in ("hook", "pre-hook"):
        if edit == "hook":
            handles.append(layer.register_forward_hook(lambda *args: args[2] * 1.5))
        else:
            handles.append(layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,)))
    elif edit == "removed":
        handles.pop().remove()
    elif edit == "forward":
        scaled(layer, 2.5)
    elif edit == "class":
        own = type(layer).forward
        monkeypatch.setattr(type(layer), "forward", lambda self, x: own(self, x) * 1.5)
    else:
        handles.append(
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, _, out: out * 1.5 if module is layer else None
            )
        )
    try:
        want = prefix_forward(model, *batch, "full").loss
        got = prefix_forward(model, *batch, "cached", store=store).loss
    finally:
        for handle in handles:
            handle.remove()
    assert abs(got - want) <= 1e-10 * want


@pytest.mark.parametrize("edit", ["in_place", "data", "replaced", "buffer"])
def test_a_changed_base_is_never_served_stale(edit, seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    base = model.get_base_model().model
    store = PrefixStore(check="full" if edit == "data" else "sample")
    step(model, batch, store)
    weight = base.layers[0].self_attn.v_proj.base_layer.weight
    with torch.no_grad():
        if edit == "in_place":
            weight[3, 5] += 0.5  # one element, between the samples
        elif edit == "data":
            weight.data[3, 5] += 0.5  # behind autograd's version counter
        elif edit == "replaced":
            weight.data = weight.data * 1.5
        else:
            base.rotary_emb.inv_freq.mul_(1.1)
    fresh = prefix_forward(model, *batch).loss
    assert torch.equal(step(model, batch, store), fresh)
    assert store.hits == 0


def test_whole_tensor_edits_through_data_are_sampled(seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore()
    step(model, batch, store)
    model.get_base_model().model.layers[1].self_attn.k_proj.base_layer.weight.data.mul_(1.01)
    fresh = prefix_forward(model, *batch).loss
    assert torch.equal(step(model, batch, store), fresh)


def test_config_dtype_and_attention_take_part(seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore()
    step(model, batch, store)
    model.get_base_model().config._attn_implementation = "eager"
    step(model, batch, store)
    model.get_base_model().config.rms_norm_eps = 0.1
    step(model, batch, store)
    model.float()
    step(model, batch, store)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch, store)
    model.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    step(model, batch, store)
    assert (store.hits, store.misses) == (0, 6)


def test_training_the_adapter_keeps_the_entries(seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        loss = step(model, batch, store)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert (store.hits, store.misses) == (2, 1)
    assert len(set(losses)) == 3


def test_least_recently_used_goes_first(seed):
    model = make_model(seed=seed)
    a, b, c = (make_batch(ROW, seed=seed + i) for i in range(3))
    size = entry_bytes(model, a)
    store = PrefixStore(max_bytes=2 * size)
    for batch in (a, b, a, c):  # b is the oldest when c comes
        step(model, batch, store)
    assert (len(store), store.bytes, store.evictions) == (2, 2 * size, 1)
    store.hits = store.misses = 0
    step(model, a, store)
    step(model, c, store)
    assert (store.hits, store.misses) == (2, 0)
    step(model, b, store)
    assert store.misses == 1


def test_an_entry_above_the_budget_is_not_kept(seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore(max_bytes=100)
    with pytest.warns(UserWarning, match="above the budget"):
        loss = step(model, batch, store)
    assert (len(store), store.bytes) == (0, 0)
    assert torch.equal(loss, prefix_forward(model, *batch).loss)


def test_disk_is_shared_between_stores(tmp_path, seed):
    model, batch = make_model("mistral", seed=seed), make_batch([(16, 6), (5, 7)], seed=seed)
    loss = step(model, batch, PrefixStore(directory=tmp_path))
    again = make_model("mistral", seed=seed)  # the same weights in another process
    store = PrefixStore(directory=tmp_path)
    assert torch.equal(step(again, batch, store), loss)
    assert (store.hits, store.misses) == (2, 0)
    assert not list(tmp_path.glob("*.partial"))
    other = make_model("mistral", seed=seed + 1)
    step(other, batch, store)
    assert store.misses == 2


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "foreign"])
def test_a_damaged_file_is_computed_anew(damage, tmp_path, seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore(directory=tmp_path)
    loss = step(model, batch, store)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    bad = bytearray(good)
    bad[-3] ^= 16  # a value, the header stays valid
    path.write_bytes(
        {"truncated": good[:-8], "bit": bytes(bad), "empty": b"", "foreign": b"x" * 64}[damage]
    )
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(step(model, batch, store), loss)
    assert path.read_bytes() == good  # written again
    assert torch.equal(step(model, batch, store), loss)
    assert (store.hits, store.misses) == (1, 2)


def test_a_crash_while_writing_leaves_no_entry(tmp_path, seed, monkeypatch):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore(directory=tmp_path)

    def crash(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", crash)
        with pytest.raises(OSError, match="disk full"):
            step(model, batch, store)
    assert not list(tmp_path.iterdir())
    assert len(store) == 0


def test_a_file_removed_by_another_process_is_a_miss(tmp_path, seed):
    model, batch = make_model(seed=seed), make_batch(ROW, seed=seed)
    store = PrefixStore(directory=tmp_path)
    loss = step(model, batch, store)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(step(model, batch, store), loss)
    assert store.misses == 2


def test_disk_budget_holds_across_runs(tmp_path, seed):
    model = make_model(seed=seed)
    store = PrefixStore(directory=tmp_path)
    for i in range(3):
        step(model, make_batch(ROW, seed=seed + i), store)
    size = store.bytes // 3
    small = PrefixStore(max_bytes=2 * size + 10, directory=tmp_path)
    assert len(small) == len(list(tmp_path.iterdir())) == 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="check must be"):
        PrefixStore(check="never")
    with pytest.raises(ValueError, match="max_bytes must be positive"):
        PrefixStore(max_bytes=0)
