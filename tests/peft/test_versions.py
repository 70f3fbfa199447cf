"""What other versions of PEFT do differently; `tests/matrix.py` runs the suite on them."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
import transformers
from peft.tuners.tuners_utils import BaseTuner

from alora_kernels.peft import accelerate, restore, wrappers

from ..matrix import ENVIRONMENTS
from .models import ASK, adapted, base_model, prompt, put, twins

ROOT = Path(__file__).resolve().parents[2]


def test_a_tuner_that_calls_forward_past_the_hooks(monkeypatch):
    """PEFT before 0.21 does not call its model but the model's `forward`."""
    _, stock = twins(layers=1)
    monkeypatch.setattr(BaseTuner, "forward", lambda self, *a, **k: self.model.forward(*a, **k))
    monkeypatch.setattr(wrappers, "SKIPS_HOOKS", True)
    fast = accelerate(copy.deepcopy(stock))
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert "alora_kind" in vars(type(fast.base_model))
    assert type(restore(fast).base_model) is type(stock.base_model)


def test_a_chunked_prefill_that_calls_forward_past_the_hooks():
    """As transformers 4.57 does it."""

    class Chunking(transformers.LlamaForCausalLM):
        def _prefill_chunking(self, ids):
            return self.forward(input_ids=ids).logits

    stock = adapted(base_model()).eval()
    stock.get_base_model().__class__ = Chunking
    fast = accelerate(copy.deepcopy(stock))
    ids = put(prompt(2, 12), 0, 3, ASK)
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(fast.get_base_model()._prefill_chunking(ids), expected)
    before = set(vars(stock.get_base_model()))
    assert set(vars(restore(fast).get_base_model())) == before


def test_the_floors_are_those_that_the_matrix_runs():
    pins = dict(pin.split("==") for pin in ENVIRONMENTS["floor"] if "==" in pin)
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("peft", "transformers", "trl"):
        floor = re.search(rf'"{name}>=([\d.]+)"', project)
        assert floor is not None
        assert floor[1] == pins[name] or floor[1] + ".0" == pins[name], name
