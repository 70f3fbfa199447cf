"""The parts of the plugin that need no vLLM: finding, mapping, reading a folder, the touches."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alora_kernels.vllm import adapter, invocation, patch
from alora_kernels.vllm.mapping import mapped, starts_of_prefills
from alora_kernels.vllm.patch import Touch


@given(st.data())
def test_every_token_is_mapped_by_its_position(data):
    """Whatever the chunks: a token runs its request's adapter from the start on, else none."""
    count = data.draw(st.integers(1, 6))
    numbers = st.lists(st.integers(0, 30), min_size=count, max_size=count)
    lora, computed = data.draw(numbers), np.array(data.draw(numbers))
    scheduled = np.array(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    starts = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 40)))
    want = [
        lora[row] if row not in starts or computed[row] + i >= starts[row] else 0
        for row in range(count)
        for i in range(scheduled[row])
    ]
    tokens = tuple(np.array(lora).repeat(scheduled))
    assert list(mapped(tokens, starts, computed, scheduled)) == want


def test_only_prefills_with_an_invocation_have_a_start():
    extra = {invocation.KEY: [7, "abc"]}
    requests = {
        name: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=given))
        for name, given in {"a": extra, "plain": None, "decoding": extra, "base": None}.items()
    }
    batch = SimpleNamespace(
        num_reqs=4,
        req_ids=list(requests),
        num_computed_tokens_cpu=np.array([3, 3, 10, 3, 99]),
        num_prompt_tokens=np.array([10, 10, 10, 10, 0]),
        request_lora_mapping=np.array([5, 6, 5, 0, 9]),
    )
    assert starts_of_prefills(requests, batch) == {0: 7}


def test_shared_parameters_are_not_written():
    shared = {"mine": 1}
    params = SimpleNamespace(extra_args=shared)
    invocation.put(params, invocation.Invocation(3, "x"))
    assert shared == {"mine": 1}
    assert params.extra_args["mine"] == 1
    assert invocation.of(params) == (3, "x")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"alora_invocation_tokens": []}, "at least one token id"),
        ({"alora_invocation_tokens": [1, "2"]}, "at least one token id"),
        ({"alora_invocation_tokens": [True]}, "at least one token id"),
        ({"alora_invocation_tokens": 5}, "at least one token id"),
        ({"alora_invocation_tokens": [-1]}, "at least one token id"),
        ({"invocation_string": "<go>"}, "older format"),
    ],
)
def test_invocations_that_would_run_as_plain_lora_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        adapter.invocation_tokens(config)


def test_plain_lora_has_no_invocation():
    assert adapter.invocation_tokens({"r": 8, "alora_invocation_tokens": None}) is None
    assert adapter.invocation_tokens({"r": 8}) is None


def write(folder, tokens, weights=b"1"):
    (folder / adapter.CONFIG).write_text(json.dumps({"alora_invocation_tokens": tokens}))
    (folder / adapter.WEIGHTS[0]).write_bytes(weights)
    os.utime(folder / adapter.CONFIG, ns=(len(str(tokens)), len(str(tokens))))
    os.utime(folder / adapter.WEIGHTS[0], ns=(1, 1))


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Asks for one adapter's files under changing requests."""
    utils = ModuleType("vllm.lora.utils")
    utils.get_adapter_absolute_path = lambda path: path
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.utils", utils)
    adapters = adapter.Adapters()

    def ask(inplace=False):
        return adapters.of(
            SimpleNamespace(
                lora_int_id=1, lora_name="a", lora_path=str(tmp_path), load_inplace=inplace
            )
        )

    return ask


def test_changed_files_need_a_reload(known, tmp_path):
    write(tmp_path, [1, 2])
    first = known()
    assert first.tokens == (1, 2)
    assert known() is first
    write(tmp_path, [1, 2], b"22")
    with pytest.raises(ValueError, match="have changed"):
        known()
    second = known(inplace=True)
    assert second.tokens == (1, 2) and second.identity != first.identity
    assert known() == second


def test_plain_lora_that_becomes_an_alora_needs_a_reload(known, tmp_path):
    write(tmp_path, None)
    assert known().tokens is None
    write(tmp_path, None, b"22")
    assert known().tokens is None  # vLLM's own rules hold for a plain LoRA
    write(tmp_path, [4])
    with pytest.raises(ValueError, match="have changed"):
        known()


def test_files_that_are_gone_are_not_taken_for_a_plain_lora(known, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        known()
    write(tmp_path, [4])
    assert known().tokens == (4,)
    (tmp_path / adapter.CONFIG).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        known()
    write(tmp_path, None)
    assert known(inplace=True).tokens is None
    (tmp_path / adapter.CONFIG).unlink()
    assert known().tokens is None


@pytest.mark.parametrize(
    "name, signature, found",
    [
        ("json.loads", "(s)", "expected (s), found (s, *, cls=None"),
        ("json.nothing", "()", "there is no json.nothing"),
        ("no_such_package.thing", "()", "there is no module of"),
        ("json.JSONEncoder.nothing", "(self)", "there is no json.JSONEncoder.nothing"),
    ],
)
def test_places_that_are_not_as_expected_are_named(name, signature, found):
    (line,) = patch.mismatches([Touch(name, signature, "")])
    assert found in line


class Example:
    """Something to touch."""

    @classmethod
    def made(cls, number=1):
        return cls, number

    def plain(self, *, word: str = "a") -> str:
        return word


def test_wrapping_twice_wraps_once_and_comes_off():
    prefix = f"{__name__}.Example."
    made = Touch(prefix + "made", "(cls, number=1)", "")
    plain = Touch(prefix + "plain", "(self, *, word='a')", "")
    assert patch.mismatches([made, plain]) == []
    for _ in range(2):
        patch.wrap(made, lambda function: lambda cls, number=1: (*function(cls, number), "ours"))
        patch.wrap(plain, lambda function: lambda self, *, word="a": function(self, word=word) * 2)
    assert Example.made(3) == (Example, 3, "ours")
    assert Example().plain(word="b") == "bb"
    assert patch.mismatches([made, plain]) == []  # what was there before is what is compared
    patch.unwrap(made)
    patch.unwrap(plain)
    assert Example.made(3) == (Example, 3)
    assert Example().plain() == "a"
