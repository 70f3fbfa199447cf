"""Tests marked `vllm` need an engine: `python tests/vllm/environment.py pytest -m vllm`."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if item.path.is_relative_to(here)]
    if importlib.util.find_spec("vllm") is None:
        reason = "no vLLM here: python tests/vllm/environment.py pytest -m vllm tests/vllm"
        for item in ours:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def plugin() -> None:
    """vLLM finds the plugin: else every test would fail for another reason than it says."""
    names = [e.value for e in entry_points(group="vllm.general_plugins")]
    assert "alora_kernels.vllm.plugin:register" in names, (
        f"vLLM would not find the plugin among {names}: install the package again; a stale "
        "alora_kernels.egg-info in the checkout hides it"
    )


@pytest.fixture
def registered(plugin) -> Iterator[None]:
    """The plugin is in place, and again afterwards: vLLM asks for it once in a process."""
    from alora_kernels.vllm.plugin import register

    register()
    yield
    register()


@pytest.fixture(scope="session", params=["llama", "qwen3", "mistral"])
def model(request, plugin, tmp_path_factory):
    """A tiny model with its adapters, one of each family."""
    from . import tiny

    return tiny.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(plugin, tmp_path_factory):
    """The tiny Llama alone."""
    from . import tiny

    return tiny.make("llama", tmp_path_factory.mktemp("llama-alone"))


@pytest.fixture(scope="module")
def engine(model):
    """An engine for each family: blocks of 32 tokens, 64 to a step, so prefills are chunked."""
    from . import engines

    with engines.offline(model) as offline:
        yield offline


@pytest.fixture
def words():
    """A source of random tokens that are no invocation's; prints its seed."""
    seed = random.SystemRandom().randrange(2**32)  # an engine seeds the module
    print(f"seed {seed}")
    source = random.Random(seed)
    return lambda count: [source.randrange(64, 100) for _ in range(count)]
