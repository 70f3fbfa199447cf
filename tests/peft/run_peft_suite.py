"""Run PEFT's own tests with every model accelerated; optional, see docs/peft.md.

    python tests/peft/run_peft_suite.py path/to/peft-x.y.z [pytest arguments]

The folder is PEFT's unpacked source distribution of the version that is installed. Models that hold
no LoRA layer, or an adapter that `accelerate` refuses, run as PEFT made them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from alora_kernels.peft import accelerate

# These expect an error where an accelerated model gives the right result.
MENDED = (
    "tests/test_lora_variants.py::TestActivatedLora::test_num_beams_error",
    "tests/test_lora_variants.py::TestActivatedLora::"
    "test_gradient_checkpointing_double_forward_raises",
)


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


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    folder = Path(sys.argv[1]).resolve()
    (folder / "tests" / "__init__.py").touch()  # the distribution leaves it out
    accelerated = Accelerated()
    wrapped = accelerated.wrap(peft.get_peft_model)
    for module in list(sys.modules.values()):  # before any test module imports the name
        if getattr(module, "__name__", "").startswith("peft") and hasattr(module, "get_peft_model"):
            module.get_peft_model = wrapped
    load = peft.PeftModel.from_pretrained.__func__
    peft.PeftModel.from_pretrained = classmethod(accelerated.wrap(load))
    code = pytest.main(
        ["--rootdir", str(folder), "-o", "addopts=", "-p", "no:cacheprovider", *arguments(folder)]
    )
    print(f"{accelerated.count} models ran accelerated")
    for reason, times in accelerated.refused.items():
        print(f"  {times} × not: {reason}")
    return int(code)


def arguments(folder: Path) -> list[str]:
    given = sys.argv[2:]
    files = [str(folder / "tests" / a) for a in given if a.endswith(".py")]
    skipped = [part for test in MENDED for part in ("--deselect", test)]
    given = [*given, *skipped]
    return [*(files or [str(folder / "tests")]), *(a for a in given if not a.endswith(".py"))]


if __name__ == "__main__":
    sys.exit(main())
