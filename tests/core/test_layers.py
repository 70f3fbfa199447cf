"""Imports go down: a layer knows those below it, and nothing above. Imports for types count."""

from __future__ import annotations

import ast
from pathlib import Path

import alora_kernels

ROOT = Path(alora_kernels.__file__).parent

# From the bottom to the top. A name is a module or a whole folder of the package.
LAYERS = (
    ("invocation", "reference", "files", "once", "_cuda", "_cpu"),
    ("activation",),
    ("contract",),
    ("cost",),
    ("backends",),
    ("tuning",),
    ("dispatch",),
    ("run",),
    ("autograd", "checks"),
    ("scalings", "ops"),
    ("functional",),
    ("nn", "gguf"),
    ("peft", "vllm"),
    ("inference", "training", "warming"),
    ("__init__", "__main__"),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """The rooms of the package that a file imports, also inside of functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
            parts = (*base, *(node.module.split(".") if node.module else ()))
        elif node.module and node.module.split(".")[0] == "alora_kernels":
            parts = tuple(node.module.split(".")[1:])
        else:
            continue
        found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_every_room_is_in_a_layer():
    here = {p.stem if p.is_file() else p.name for p in ROOT.iterdir()}
    rooms = {r for r in here if (ROOT / f"{r}.py").exists() or (ROOT / r / "__init__.py").exists()}
    assert rooms - set(HEIGHT) == set()


def test_imports_go_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        room = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        wrong += [
            f"{relative} imports {other}"
            for other in imports(path)
            if other != room and HEIGHT[other] >= HEIGHT[room]
        ]
    # The package hands over accelerate and restore when they are asked for.
    assert sorted(wrong) == []
