"""What runs on the host: choices as pure functions, refusals, tuning. No kernel is launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alora_kernels.backends.triton import TritonBackend, configs, target, tune
from alora_kernels.backends.triton.configs import Config
from alora_kernels.contract import Problem

from .conftest import CHOSEN

PROBLEM = Problem(
    rows=64, in_features=128, out_features=(256,), ranks=(32,), active=8, dtype=torch.bfloat16,
    adapter_dtype=torch.float32, device="cpu",
)  # fmt: skip


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    made = TritonBackend()
    monkeypatch.setattr(made, "why_not_here", lambda: None)
    monkeypatch.setattr(made, "accepts_device", lambda device: device == "cpu")
    return made


@pytest.mark.parametrize(
    ("change", "strategy", "reason"),
    [
        ({"device": "mps"}, "delta", "the tensors are on mps"),
        ({"dtype": torch.float64}, "delta", "torch.float64 has no Triton kernel"),
        ({"ranks": (32, 257)}, "delta", "rank 257 is above 256"),
        ({"ranks": (65,)}, "onepass", "rank 65 is above the 64 columns that 'onepass' can hold"),
        ({"dropout": True}, "onepass", "read different inputs"),
        ({"base_given": True}, "tail", "only 'delta' adds"),
        ({"base_given": True}, "onepass", "only 'delta' adds"),
        ({"adapter_precision": "fp32"}, "tail", "needs 'delta'"),
        ({"strict_inactive": True}, "onepass", "needs 'delta'"),
    ],
)
def test_refusals_say_why(backend, change, strategy, reason) -> None:
    assert backend.why_not(PROBLEM, strategy) is None
    assert reason in backend.why_not(PROBLEM._replace(**change), strategy)


def test_what_is_not_refused(backend) -> None:
    for strategy in ("delta", "tail"):
        assert backend.why_not(PROBLEM._replace(dropout=True, ranks=(256,)), strategy) is None
    # Dropout forbids the forward of onepass alone.
    assert backend.why_not(PROBLEM._replace(dropout=True, backward=True), "onepass") is None
    assert backend.why_not(PROBLEM._replace(ranks=(64,)), "onepass") is None


@pytest.mark.skipif(
    CHOSEN is not None or torch.cuda.is_available(), reason="Triton can run kernels here"
)
def test_without_a_gpu_the_backend_says_so() -> None:
    assert "no NVIDIA or AMD GPU" in str(TritonBackend().why_not_here())
    assert TritonBackend().why_not(PROBLEM, "delta") is not None


def test_float32_follows_torch_by_either_name_of_its_setting() -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert target.float32_precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert target.float32_precision() == "ieee"
        if hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "tf32"
            assert target.float32_precision() == "tf32"
            matmul.fp32_precision = "ieee"
            assert target.float32_precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_splits_fill_the_processors_and_no_more() -> None:
    assert configs.split_count(tiles=64, steps=64, processors=132, least_steps=4) == 4
    assert configs.split_count(tiles=1, steps=64, processors=132, least_steps=4) == 16
    assert configs.split_count(tiles=300, steps=64, processors=132, least_steps=4) == 1
    assert configs.split_count(tiles=0, steps=0, processors=132, least_steps=4) == 1
    few = configs.gemm_config(90, 16, torch.bfloat16, "ieee")
    assert configs.gemm_splits(16, 4096, 4096, few, 132) > 1
    assert configs.gemm_splits(17, 4096, 4096, few, 132) == 1


def test_one_pass_for_dya_and_db_only_where_it_saves_bytes() -> None:
    for rank in (8, 16, 32):
        assert configs.both_in_one_pass(4096, rank, torch.bfloat16)
    assert not configs.both_in_one_pass(4096, 64, torch.bfloat16)
    assert not configs.both_in_one_pass(4096, 16, torch.float32)
    assert not configs.both_in_one_pass(40, 16, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"arch": 120}, True),
        ({"arch": 80}, False),
        ({"arch": 0}, False),
        ({"strides": (2048, 2)}, False),
        ({"strides": (1028, 1)}, False),
        ({"strides": (0, 1)}, False),
        ({"strides": (1032, 1)}, True),
        ({"address": 8}, False),
        ({"shape": (0, 1024)}, False),
    ],
)
def test_descriptors_need_alignment(change: dict, expected: bool) -> None:
    given = {"arch": 90, "shape": (64, 1024), "strides": (1024, 1), "address": 4096, "itemsize": 2}
    assert configs.can_describe(**{**given, **change}) is expected


DEFAULT, FAST, BROKEN = (Config(64, 64, 32, 4, s) for s in (2, 3, 4))


def tuned(ran: list[Config]) -> Config:
    def run(config: Config) -> None:
        ran.append(config)
        if config == BROKEN:
            raise RuntimeError("out of resource: shared memory")

    def measure(timed) -> float:
        timed()
        return 1.0 if ran[-1] == FAST else 2.0

    return tune.best(("gemm", 90, "x"), [DEFAULT, FAST, BROKEN], DEFAULT, run, measure)


def test_tuning_measures_once_and_remembers_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "cache.json"
    monkeypatch.setenv("ALORA_TRITON_CACHE", str(path))
    ran: list[Config] = []
    assert tuned(ran) == FAST
    assert ran == [DEFAULT, FAST, BROKEN]
    tune._remembered.cache_clear()  # as another process would read it
    assert tuned(ran) == FAST
    assert len(ran) == 3
    assert [p.name for p in path.parent.iterdir()] == ["cache.json"]  # no temporary file is left
    assert list(json.loads(path.read_text()).values()) == [
        {"block_m": 64, "block_n": 64, "block_k": 32, "warps": 4, "stages": 3}
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"block_m": 3}}'])
def test_a_damaged_cache_is_replaced(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    monkeypatch.setenv("ALORA_TRITON_CACHE", str(path))
    tune._remembered.cache_clear()
    assert tuned([]) == FAST
    assert len(json.loads(path.read_text())) == 1


def test_a_failed_write_leaves_the_old_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.json"
    monkeypatch.setenv("ALORA_TRITON_CACHE", str(path))
    tune._remembered.cache_clear()
    tune._write(path, {"old": DEFAULT})
    monkeypatch.setattr(tune.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tune._write(path, {"new": FAST})
    assert list(json.loads(path.read_text())) == ["old"]
    assert len(list(tmp_path.iterdir())) == 1
