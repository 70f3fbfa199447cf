"""AloraTrainer on two gloo processes equals one process with twice the batch."""

from __future__ import annotations

import pytest
import torch
from test_trainer import Stop, adapter, losses, train
from two_processes import run_two, whole

pytestmark = pytest.mark.slow
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
WRAPPERS = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": FSDP2},
    "fsdp2 sharded": {
        "fsdp": True,
        "fsdp_config": {**FSDP2, "state_dict_type": "SHARDED_STATE_DICT"},
    },
    "fsdp2 checkpointed": {
        "fsdp": True,
        "fsdp_config": FSDP2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}
CLASSES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}
COMMON = {
    "gradient_accumulation_steps": 2,
    "eval_strategy": "epoch",
    "max_grad_norm": 0.5,
}


def options_of(wrapper: str) -> dict:
    if wrapper.startswith("fsdp2"):
        _let_accelerate_shard_on_a_cpu()
    return {**COMMON, "ddp_backend": "gloo", **WRAPPERS[wrapper]}


def _let_accelerate_shard_on_a_cpu() -> None:
    """accelerate chooses FSDP on accelerators alone; all that follows is its own code."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        # Every later AcceleratorState() shares this one's fields and would reset the type.
        fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def weights(runner):
    return {n: whole(p).numpy() for n, p in adapter(runner).items()}


def work(rank, folder, wrapper, prefix):
    runner = train(
        f"{folder}/{rank}", prefix=prefix, eval_rows=8, per_device_eval_batch_size=2,
        **options_of(wrapper),
    )  # fmt: skip
    assert runner.accelerator.num_processes == 2
    store = runner.prefix_store
    counts = None if store is None else (store.hits, store.misses)
    return {
        "class": type(runner.model_wrapped).__name__,
        "loss": losses(runner),
        "eval_loss": losses(runner, "eval_loss"),
        "weights": weights(runner),
        "counts": counts,
    }


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        ("ddp", "no_grad"),
        ("ddp", "cached"),
        ("fsdp2", "no_grad"),
        ("fsdp2 checkpointed", "cached"),
    ],
)
def test_equals_one_process(wrapper, prefix, tmp_path):
    """Weights, reported loss and evaluation; with `cached` the ranks hit at different steps."""
    one = train(
        tmp_path / "one", prefix="full", per_device_train_batch_size=4,
        per_device_eval_batch_size=4, eval_rows=8, **COMMON,
    )  # fmt: skip
    got = run_two(work, str(tmp_path), wrapper, prefix)
    for rank, mine in got.items():
        assert mine["class"] == CLASSES[wrapper.split()[0]]
        assert mine["loss"] == pytest.approx(losses(one), rel=1e-5)
        assert mine["eval_loss"] == pytest.approx(losses(one, "eval_loss"), rel=1e-5)
        for name, value in adapter(one).items():
            torch.testing.assert_close(
                torch.from_numpy(mine["weights"][name]), value, rtol=1e-5, atol=1e-5,
                msg=f"rank {rank}: {name}",
            )  # fmt: skip
    if prefix == "cached":
        assert all(hits > 0 and misses > 0 for hits, misses in (g["counts"] for g in got.values()))


def moments(runner):
    """The optimizer's state, gathered."""
    states = enumerate(runner.optimizer.state.values())
    return {f"{i} {n}": whole(t).numpy().copy() for i, s in states for n, t in s.items()}


def content(runner):
    return {**weights(runner), **moments(runner)}


def resume(rank, folder, wrapper):
    options = {
        **options_of(wrapper), "prefix": "cached", "dropout": 0.3, "save_strategy": "steps",
        "save_steps": 2, "eval_strategy": "no", "gradient_accumulation_steps": 1,
        "num_train_epochs": 2, "per_device_train_batch_size": 1,
    }  # fmt: skip
    straight = train(f"{folder}/straight", **options)
    after = torch.get_rng_state()
    train(f"{folder}/part", callbacks=[Stop(2)], **options)
    again = train(f"{folder}/part", resume=f"{folder}/part/checkpoint-2", **options)
    assert again.state.global_step == straight.state.global_step == 12
    assert torch.equal(torch.get_rng_state(), after)
    assert again.prefix_store.misses > 0  # it began empty
    assert moments(straight)
    return losses(straight), losses(again), content(straight), content(again)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 sharded"])
def test_resuming_equals_an_uninterrupted_run(wrapper, tmp_path):
    """Into the next epoch; weights, optimizer, order of the data, random numbers of each rank."""
    for straight_losses, again_losses, straight, again in run_two(
        resume, str(tmp_path), wrapper
    ).values():
        assert again_losses[2:] == straight_losses[2:]
        assert straight.keys() == again.keys()
        for name, value in straight.items():
            assert (again[name] == value).all(), name
