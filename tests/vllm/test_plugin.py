"""What the plugin does to vLLM, and what it leaves alone. No model runs here, but for one test."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alora_kernels.vllm import admission, invocation, mapping_v2, patch
from alora_kernels.vllm import plugin as plugin_module

from . import engines, tiny

pytestmark = pytest.mark.vllm
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "alora_invocation_tokens": [5]}


@pytest.fixture
def untouched(registered):
    """vLLM without the plugin, which comes back afterwards."""
    places = [*plugin_module.touched(), *mapping_v2.TOUCHED]
    for place in places:
        patch.unwrap(place)
    yield places
    for place in places:
        patch.unwrap(place)


def marked(places):
    """Which of them are not vLLM's own."""
    return [p.name for p in places if hasattr(patch.function_of(patch.find(p.name)[2]), patch.MARK)]


def refused(config):
    """The reason for which vLLM refuses a configuration."""
    from vllm.lora.peft_helper import PEFTHelper

    with pytest.raises(ValueError) as caught:
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(SimpleNamespace(max_lora_rank=16))
    return str(caught.value)


def test_every_place_is_as_expected(plugin):
    assert patch.mismatches([*plugin_module.touched(), *mapping_v2.TOUCHED]) == []


def test_registered_twice_is_registered_once(untouched):
    plugin_module.register()
    first = marked(untouched)
    assert first
    inner = {name: patch.function_of(patch.find(name)[2]) for name in first}
    plugin_module.register()
    assert {name: patch.function_of(patch.find(name)[2]) for name in first} == inner


def test_other_signature_leaves_vllm_alone(untouched, monkeypatch, caplog):
    from vllm.v1.request import Request

    def update_block_hashes(self, something_new):
        raise AssertionError

    monkeypatch.setattr(Request, "update_block_hashes", update_block_hashes)
    plugin_module.register()
    names = {name for name in marked(untouched) if not name.endswith("PEFTHelper.from_dict")}
    assert names == set()
    assert "found (self, something_new)" in caplog.text
    assert ">=0.32,<0.33" in refused(CONFIG)
    assert "something_new" in refused(CONFIG)
    accepted = CONFIG | {"alora_invocation_tokens": None}
    from vllm.lora.peft_helper import PEFTHelper

    PEFTHelper.from_dict(accepted).validate_legal(SimpleNamespace(max_lora_rank=16))


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "dev"])
def test_other_version_leaves_vllm_alone(untouched, monkeypatch, version):
    monkeypatch.setattr("vllm.version.__version__", version)
    plugin_module.register()
    names = {name for name in marked(untouched) if not name.endswith("PEFTHelper.from_dict")}
    assert names == set()
    assert f"vLLM >=0.32,<0.33; it did not touch this one: this is vLLM {version}" in refused(
        CONFIG
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.0.dev3"])
def test_supported_versions(monkeypatch, version, plugin):
    monkeypatch.setattr("vllm.version.__version__", version)
    wanted = ["this is vLLM " + version] if "dev" in version else []
    assert plugin_module.version_problems() == wanted


def test_configurations(plugin):
    from vllm.lora.peft_helper import PEFTHelper

    PEFTHelper.from_dict(CONFIG).validate_legal(SimpleNamespace(max_lora_rank=16))
    assert "at least one token id" in refused(CONFIG | {"alora_invocation_tokens": []})
    assert "older format" in refused(
        CONFIG | {"alora_invocation_tokens": None, "invocation_string": "<go>"}
    )
    assert "DoRA" in refused(CONFIG | {"use_dora": True})
    assert "max_lora_rank" in refused(CONFIG | {"r": 64})


def good_config(**changes):
    """A vLLM configuration that admits aLoRA, but for the changes."""
    parts = {
        "model_config": SimpleNamespace(is_encoder_decoder=False),
        "kv_transfer_config": None,
        "kv_events_config": None,
        "lora_config": SimpleNamespace(enable_tower_connector_lora=False),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, data_parallel_size=1),
        "use_v2_model_runner": False,
    }
    return SimpleNamespace(**parts | changes)


def request_for(lora, ids, **changes):
    """As the input processor makes it."""
    parts = {
        "lora_request": lora,
        "sampling_params": SimpleNamespace(extra_args=None),
        "prompt_token_ids": ids,
        "prompt_is_token_ids": None,
        "resumable": False,
    }
    return SimpleNamespace(**parts | changes)


@pytest.mark.parametrize(
    "config, request_, word",
    [
        ({"kv_transfer_config": object()}, {}, "KV connectors"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, {}, "KV cache events"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, {}, "encoder-decoder"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, {}, "tower"),
        ({"parallel_config": SimpleNamespace(decode_context_parallel_size=2)}, {}, "context par"),
        (
            {
                "parallel_config": SimpleNamespace(
                    decode_context_parallel_size=1, data_parallel_size=2
                )
            },
            {},
            "data parallelism",
        ),
        ({"use_v2_model_runner": True}, {}, "V2 model runner"),
        ({}, {"sampling_params": None}, "pooling"),
        ({}, {"prompt_token_ids": None}, "prompt_embeds without token ids"),
        ({}, {"resumable": True}, "streaming input"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, request_, word, llama, monkeypatch):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    monkeypatch.setattr(mapping_v2, "PROBLEMS", ["it is another"])
    lora = LoRARequest("first", 1, str(llama.adapters["first"]))
    request = request_for(lora, [1, *tiny.INVOCATION], **request_)
    with pytest.raises(VLLMValidationError, match=word):
        admission.admit(good_config(**config), request)
    plain = LoRARequest("plain", 2, str(llama.adapters["plain"]))
    admission.admit(good_config(**config), request_for(plain, [1, 2], **request_))


def test_start_is_kept_with_the_request_alone(llama):
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("first", 1, str(llama.adapters["first"]))
    before = repr(lora)
    request = request_for(lora, [9, *tiny.INVOCATION, 9, *tiny.INVOCATION, 9])
    admission.admit(good_config(), request)
    assert invocation.of(request.sampling_params).start == 5
    assert repr(lora) == before
    # Generated tokens that follow the prompt of a beam are not searched.
    beam = request_for(lora, [9, *tiny.INVOCATION, 9, *tiny.INVOCATION, 9])
    admission.admit(good_config(), beam, 7)
    assert invocation.of(beam.sampling_params).start == 1


def test_embeddings_between_tokens_are_no_invocation(llama):
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("first", 1, str(llama.adapters["first"]))
    ids = [*tiny.INVOCATION, 9, *tiny.INVOCATION]
    mask = [True] * 5 + [False, True]
    request = request_for(lora, ids, prompt_is_token_ids=mask)
    admission.admit(good_config(), request)
    assert invocation.of(request.sampling_params).start == 0


def test_nobody_else_may_write_the_start(llama):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    for name in ("first", "plain"):
        lora = LoRARequest(name, 5, str(llama.adapters[name]))
        forged = SimpleNamespace(extra_args={invocation.KEY: [0, "x"]})
        with pytest.raises(VLLMValidationError, match="may not have"):
            admission.admit(
                good_config(), request_for(lora, [*tiny.INVOCATION], sampling_params=forged)
            )


def keys_of(lora, start, salt=None, embeds=None, features=None, identity="id"):
    """The extra keys of each block of 4 of a request of 16 tokens, by vLLM's own hasher."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    def hashing(value):
        seen.append(value[2])
        return repr(value).encode()

    seen: list = []
    init_none_hash(hashing)
    seen.clear()
    params = SamplingParams(max_tokens=4)
    if start is not None:
        invocation.put(params, invocation.Invocation(start, identity))
    request = Request(
        "r",
        list(range(16)),
        params,
        None,
        lora_request=lora,
        cache_salt=salt,
        prompt_embeds=embeds,
        mm_features=features,
        block_hasher=get_request_block_hasher(4, hashing),
    )
    request.append_output_token_ids([7] * 4)
    assert len(request.block_hashes) == len(seen) == 5
    return seen, request.block_hashes


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 8, 15])
def test_blocks_before_the_start_lose_the_adapters_key_alone(plugin, start):
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    lora = LoRARequest("name", 1, "/path")
    image = MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier="picture",
        mm_position=PlaceholderRange(offset=2, length=9),
        mm_hash="picture",
    )
    others = {"salt": "grain", "embeds": torch.randn(16, 3), "features": [image]}
    base, base_hashes = keys_of(None, None, **others)
    ours, hashes = keys_of(lora, start, **others)
    shared = start // 4
    assert ours[:shared] == base[:shared]
    assert hashes[:shared] == base_hashes[:shared]
    for mine, theirs in zip(ours[shared:], base[shared:]):
        (kind, name, path), *rest = mine
        assert (kind, name) == ("lora", "name") and path.startswith("/path\n")
        assert tuple(rest) == (theirs or ())
    plain, plain_hashes = keys_of(lora, None, **others)
    assert all(keys[0] == ("lora", "name", "/path") for keys in plain)
    assert not set(plain_hashes) & set(hashes) and not set(plain_hashes) & set(base_hashes)
    _, reloaded = keys_of(lora, start, **others, identity="other")
    assert set(reloaded) & set(hashes) == set(base_hashes[:shared])


def test_v2_runner_by_recorded_inputs(plugin):
    """vLLM's own LoraState, and the wrappers that a GPU would have: two requests in chunks."""
    from vllm.v1.worker.gpu.lora_utils import LoraState

    add = mapping_v2._adding(lambda self, output: [self.record(n) for n in output])
    inputs = mapping_v2._mapping(LoraState.make_lora_inputs)
    remove = mapping_v2._removing(LoraState.remove_request)
    state = LoraState(4)
    positions = np.zeros(4, dtype=np.int32)
    order = {"a": 2, "plain": 0, "base": 3}
    runner = SimpleNamespace(
        lora_state=state, req_states=SimpleNamespace(num_computed_tokens_np=positions)
    )
    new = [
        SimpleNamespace(
            req_id=name,
            lora_request=SimpleNamespace(lora_int_id=number) if number else None,
            sampling_params=SimpleNamespace(extra_args=extra),
        )
        for name, number, extra in (
            ("a", 5, {invocation.KEY: [6, "x"]}),
            ("plain", 6, None),
            ("base", 0, None),
        )
    ]
    for one in new:
        if one.lora_request is not None:
            one.lora_request = _Hashed(one.lora_request.lora_int_id)
        state.add_request(one.req_id, order[one.req_id], one.lora_request)
    add(
        SimpleNamespace(**vars(runner), record=lambda n: None),
        _Output(new),
    )
    ids = ["base", "a", "plain"]
    index = np.array([order[i] for i in ids])
    got = []
    for scheduled, computed in (([2, 4, 3], 0), ([1, 4, 1], 4), ([1, 1, 1], 8)):
        positions[order["a"]] = computed
        prompt, tokens, loras = inputs(state, ids, index, np.array(scheduled))
        assert prompt == (0, 5, 6) and {lora.lora_int_id for lora in loras} == {5, 6}
        got.append([int(t) for t in tokens])
    assert got == [[0, 0, 0, 0, 0, 0, 6, 6, 6], [0, 0, 0, 5, 5, 6], [0, 5, 6]]
    remove(state, "a")
    assert state.alora_starts == {} and "a" not in state.lora_requests


class _Hashed:
    def __init__(self, number):
        self.lora_int_id = number


class _Output(list):
    @property
    def scheduled_new_reqs(self):
        return self


def test_base_request_makes_no_call_more_in_the_hot_path(llama, words):
    """Counted: what of the plugin runs for a base request, beside what it stands in for."""
    stands_in = {"update_block_hashes", "set_active_loras"}
    ops = ("/wrappers.py", "/lora_cpu.py")  # the CPU's LoRA op, in the place of vLLM's class
    ours: Counter = Counter()
    theirs: Counter = Counter()

    def count(frame, event, _):
        if event == "call":
            code = frame.f_code
            if "alora_kernels/vllm/" in code.co_filename:
                ours[code.co_name, code.co_filename.endswith(ops)] += 1
            elif code.co_name in stands_in and "/vllm/" in code.co_filename:
                theirs[code.co_name] += 1

    with engines.offline(llama) as engine:
        engine.one("first", [*words(40), *tiny.INVOCATION])  # a LoRA is there, and not used
        added = []
        for new in (3, 30):
            ours.clear()
            sys.setprofile(count)
            try:
                engine.ask([None], [words(50)], new=new)
            finally:
                sys.setprofile(None)
            hot = {n: c for (n, op), c in ours.items() if not op}
            assert stands_in <= set(hot)
            added.append({n: c for n, c in hot.items() if n not in stands_in})
    # At admission, once; the same for three tokens and for thirty.
    assert added[0] == added[1]
    assert set(added[0].values()) == {1} and "process_inputs" in added[0]
    assert set(added[0]) <= {"process_inputs", "_validate_lora"}
    assert not theirs  # what stands in calls nothing of what it stands in for
