"""The files of a folder import each other in no circle: for types and inside functions neither."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import alora_kernels

ROOT = Path(alora_kernels.__file__).parent
FOLDERS = ("backends", "dispatch", "inference", "peft", "training", "vllm")

Graph = dict[str, set[str]]


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of a package by its name; the package itself and its folders by theirs."""
    found = {}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports by itself."""
    is_package = path.name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return found & set(modules)


def graph_of(root: Path, folder: str) -> Graph:
    """The imports among the files of one folder of the package."""
    modules = modules_of(root)
    lead = f"{root.name}.{folder}"
    files = {n: p for n, p in modules.items() if n == lead or n.startswith(f"{lead}.")}
    return {name: imports_of(name, path, modules) & set(files) for name, path in files.items()}


def circles(graph: Graph) -> list[str]:
    """A circle for each file that reaches itself, the shortest for that file."""
    found = []
    for start in sorted(graph):
        ways = [[start]]
        seen: set[str] = set()
        while ways:
            way = ways.pop(0)
            if start in graph[way[-1]]:
                found.append(" → ".join(name.split(".", 1)[1] for name in [*way, start]))
                break
            new = sorted(graph[way[-1]] - seen)
            seen.update(new)
            ways += [[*way, name] for name in new]
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_of_a_folder_import_each_other_in_no_circle(folder: str) -> None:
    graph = graph_of(ROOT, folder)
    assert len(graph) > 3 and any(graph.values())
    assert circles(graph) == []


@pytest.mark.parametrize(
    "back",
    [
        "from .upper import Session",
        "from . import upper",
        "from ..room import upper",
        "from package.room.upper import Session",
        "import package.room.upper",
        "def late():\n    from .upper import Session",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .upper import Session",
    ],
)
def test_every_way_to_import_closes_a_circle(tmp_path: Path, back: str) -> None:
    room = tmp_path / "package" / "room"
    room.mkdir(parents=True)
    (room.parent / "__init__.py").write_text("")
    (room / "__init__.py").write_text("from .upper import Session\n")
    (room / "upper.py").write_text("from . import middle\nclass Session: ...\n")
    (room / "middle.py").write_text("from .lower import value\n")
    (room / "lower.py").write_text("value = 1\n")
    assert circles(graph_of(room.parent, "room")) == []
    (room / "lower.py").write_text(f"value = 1\n{back}\n")
    assert "room.lower → room.upper → room.middle → room.lower" in circles(
        graph_of(room.parent, "room")
    )
