"""The package as a whole: what importing needs, what the command line prints."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import alora_kernels

ROOT = Path(__file__).parents[2]
# Importing must work where these are missing.
OPTIONAL = ("triton", "peft", "transformers", "accelerate", "vllm", "matplotlib", "rich")

WITHOUT = '''
import sys
blocked = set(sys.argv[1].split(","))
class Without:
    """Finds everything but what is blocked, as where it is not installed."""
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in blocked:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
'''
LAYER = """
import torch, alora_kernels
layer = alora_kernels.AloraLinear(8, 8, r=2, lora_alpha=2)
layer(torch.randn(4, 8), alora_kernels.Activation.all(4)).sum().backward()
print("loaded", sorted(blocked & set(sys.modules)))
"""

SESSION = """
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from alora_kernels.inference import Session
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
words = models.WordLevel({str(i): i for i in range(32)}, unk_token="0")
session = Session(model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)))
session.extend([3, 4, 5])
answer = session.generate(max_new_tokens=2, eos_token_id=None)
assert len(answer.token_ids) == 2
print("loaded", sorted(blocked & set(sys.modules)))
"""


def python(*args: str) -> str:
    result = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_and_trains_without_any_optional_package() -> None:
    assert python("-c", WITHOUT + LAYER, ",".join(OPTIONAL)).strip() == "loaded []"


def test_a_session_over_a_plain_model_needs_no_peft() -> None:
    pytest.importorskip("transformers")
    assert python("-c", WITHOUT + SESSION, "peft").strip() == "loaded []"


def test_import_loads_no_heavy_optional_package() -> None:
    loaded = python("-c", "import sys, alora_kernels; print(*sys.modules)").split()
    assert not {"triton.language", "peft", "transformers", "matplotlib"} & set(loaded)


def test_command_line_names_versions_backends_and_reasons() -> None:
    out = python("-m", "alora_kernels")
    assert out.startswith(f"alora_kernels {alora_kernels.__version__}\n")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "yes" in lines["cpu"] and "yes" in lines["reference"]
    triton = lines["triton"]  # the package's version comes first, the backend's line last
    assert "yes" in triton or "no: " in triton


def test_version_is_the_distributions() -> None:
    assert metadata.version("alora_kernels") == alora_kernels.__version__


def test_public_names_exist_and_are_documented() -> None:
    for name in alora_kernels.__all__:
        assert getattr(alora_kernels, name).__doc__, name


def test_typed() -> None:
    assert (ROOT / "alora_kernels" / "py.typed").exists()
