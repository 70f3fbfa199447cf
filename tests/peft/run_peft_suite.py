"""Run PEFT's own tests with every model accelerated; optional, see docs/peft.md.

    python tests/peft/run_peft_suite.py path/to/peft-x.y.z [pytest arguments]

The folder is PEFT's unpacked source distribution of the version that is installed. Of tests that
are made for many methods, those of LoRA run. Models that PEFT's tests download are tiny ones made
from config here, so no network is needed; a test that asks for another model fails. Models that
hold no LoRA layer, or an adapter that `accelerate` refuses, run as PEFT made them.
--plain accelerates nothing, for comparison. (In one process: pytest-xdist's workers know nothing of
this script.)
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME = tempfile.TemporaryDirectory(prefix="peft-suite-")
os.environ |= {"HF_HOME": HOME.name, "HF_HUB_OFFLINE": "1"}  # before the hub is imported

import peft  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from alora_kernels.peft import accelerate  # noqa: E402

# Two expect an error where an accelerated model gives the right result; two expect other words of
# an error; one gives an aLoRA inputs_embeds alone, which PEFT runs without the adapter, silently.
MENDED = (
    "TestActivatedLora::test_num_beams_error",
    "TestActivatedLora::test_gradient_checkpointing_double_forward_raises",
    "TestMixedAdapterBatches::test_mixed_adapter_batches_length_mismatch_raises",
    "TestMixedAdapterBatches::test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "TestDecoderModels::test_passing_input_embeds_works",
)
STAND_INS = {
    "GPT2": (
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "hf-internal-testing/tiny-random-gpt2",
    ),
    "GPTJ": ("peft-internal-testing/tiny-random-GPTJForCausalLM",),
    "Gemma3": ("hf-internal-testing/tiny-random-Gemma3ForCausalLM",),
    "Llama": (
        "trl-internal-testing/tiny-random-LlamaForCausalLM",
        "peft-internal-testing/tiny-random-LlamaForCausalLM",
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
    ),
    "Mistral": ("hf-internal-testing/tiny-random-MistralForCausalLM",),
    "OPT": ("peft-internal-testing/tiny-random-OPTForCausalLM", "peft-internal-testing/opt-125m"),
    "Qwen2": ("peft-internal-testing/tiny-dummy-qwen2",),
    "Qwen3": ("trl-internal-testing/tiny-Qwen3ForCausalLM",),
}


def stand_in(kind: str) -> Any:
    """A tiny decoder of this kind."""
    common = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    if kind in ("GPT2", "GPTJ"):
        config_class = getattr(transformers, f"{kind}Config")
        sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
        config = config_class(**sizes, bos_token_id=1, eos_token_id=2)
        names = {"GPT2": "GPT2LMHeadModel", "GPTJ": "GPTJForCausalLM"}
        return getattr(transformers, names[kind])(config)
    if kind == "OPT":
        config = transformers.OPTConfig(**common, ffn_dim=96, word_embed_proj_dim=64)
        return transformers.OPTForCausalLM(config)
    common |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**common)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def fill_hub() -> None:
    """Lay the stand-ins where the hub's client looks for what it has downloaded."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    for kind, names in STAND_INS.items():
        model = stand_in(kind)
        for name in names:
            folder = Path(HOME.name, "hub", "models--" + name.replace("/", "--"))
            commit = "0" * 40
            (folder / "refs").mkdir(parents=True)
            (folder / "refs" / "main").write_text(commit)
            model.save_pretrained(folder / "snapshots" / commit)


class Everything(dict[str, int]):
    """PEFT's tests go to the network for a model that they have not seen yet."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


class Accelerated:
    """Counts the models that ran accelerated, so that a run that tested nothing is seen."""

    def __init__(self) -> None:
        self.count = 0
        self.refused: dict[str, int] = {}

    def wrap(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            model = make(*args, **kwargs)
            try:
                accelerate(model)
                self.count += 1
            except (TypeError, ValueError) as error:
                reason = str(error)[:60]
                self.refused[reason] = self.refused.get(reason, 0) + 1
            return model

        return made

    def everywhere(self) -> None:
        wrapped = self.wrap(peft.get_peft_model)
        for module in list(sys.modules.values()):  # before any test module imports the name
            name = getattr(module, "__name__", "")
            if name.startswith("peft") and hasattr(module, "get_peft_model"):
                module.get_peft_model = wrapped  # type: ignore[attr-defined]
        load = peft.PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]
        peft.PeftModel.from_pretrained = classmethod(self.wrap(load))  # type: ignore[assignment]


class Plugin:
    """What pytest is told."""

    def __init__(self, mended: tuple[str, ...]) -> None:
        self.mended = mended

    def is_mended(self, item: Any, parameters: dict[str, Any]) -> bool:
        if not item.nodeid.split("[")[0].endswith(self.mended or ("?",)):
            return False
        settings = parameters.get("config_kwargs")
        return settings is None or "alora_invocation_tokens" in settings

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the tests of LoRA."""
        kept, other = [], []
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            chosen = parameters.get("config_cls", peft.LoraConfig) is peft.LoraConfig
            (kept if chosen and not self.is_mended(item, parameters) else other).append(item)
        config.hook.pytest_deselected(items=other)
        items[:] = kept
        helpers = sys.modules.get("tests.testing_utils")
        if helpers is not None:
            helpers._HUB_MODEL_ACCESSES = Everything()  # type: ignore[attr-defined]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    folder = Path(sys.argv[1]).resolve()
    given = [a for a in sys.argv[2:] if a != "--plain"]
    (folder / "tests" / "__init__.py").touch()  # the distribution leaves it out
    fill_hub()
    accelerated = Accelerated()
    if "--plain" not in sys.argv:
        accelerated.everywhere()
    files = [str(folder / "tests" / a) for a in given if a.endswith(".py")]
    # Warnings of the installed transformers would be errors in PEFT's own settings.
    own = [part for name in ("addopts", "filterwarnings") for part in ("-o", f"{name}=")]
    arguments = ["--rootdir", str(folder), *own, "-p", "no:cacheprovider"]
    arguments += files or [str(folder / "tests")]
    arguments += [a for a in given if not a.endswith(".py")]
    code = pytest.main(arguments, plugins=[Plugin(() if "--plain" in sys.argv else MENDED)])
    print(f"{accelerated.count} models ran accelerated")
    for reason, times in accelerated.refused.items():
        print(f"  {times} × not: {reason}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
