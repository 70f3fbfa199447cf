"""The kernels' parameters by name: Python and C++ say the same of every field."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import alora_kernels
from alora_kernels.backends.cuda import extension as door
from alora_kernels.backends.cuda.params import FLOAT, INT32, POINTER, STRUCTS, Struct, exported

from .ptx_sender import CSRC

PROGRAM = r"""
#include <cstdio>
#include "fields.h"
int main() {
  for (const auto& s : alora::layouts()) {
    printf("%s %zu\n", s.name.c_str(), s.size);
    for (const auto& f : s.fields) printf("- %s %c %zu\n", f.name.c_str(), f.kind, f.offset);
  }
  for (const auto& [name, bit] : alora::flag_bits()) printf("flag %s %u\n", name.c_str(), bit);
  printf("blocks %d\n", alora::kMaxColumnBlocks);
}
"""


def said_by(csrc: Path, folder: Path) -> SimpleNamespace:
    """What an extension built from `csrc` says, by the compiler of this machine."""
    source, program = folder / "fields.cpp", folder / "fields"
    source.write_text(PROGRAM)
    subprocess.run(["c++", "-std=c++17", f"-I{csrc}", str(source), "-o", str(program)], check=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    said = SimpleNamespace(structs={}, flags={}, max_column_blocks=None)
    fields: dict[str, Any] = {}
    for first, *words in [line.split() for line in out.splitlines()]:
        if first == "-":
            fields[words[0]] = (words[1], int(words[2]))
        elif first == "flag":
            said.flags[words[0]] = int(words[1])
        elif first == "blocks":
            said.max_column_blocks = int(words[0])
        else:
            fields = {}
            said.structs[first] = (int(words[0]), fields)
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return said_by(CSRC, tmp_path_factory.mktemp("fields"))


def test_python_and_cpp_agree(said: SimpleNamespace) -> None:
    assert vars(said) == exported()
    assert door.disagreement(said) is None


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("const void* left;            // [M, K]\n  const void* right;",
         "const void* right;            // [M, K]\n  const void* left;", "GemmParams.left"),
        ("int64_t up_r, up_n, out_m;", "int64_t up_n, up_r, out_m;", "structs.FusedSm90Params"),
        ("int32_t m, n, k, r, k_slice;", "int32_t m, n, k, k_slice, r;", "DecodeParams.k"),
        ("kVectorOut = 32,", "kVectorOut = 64,", "flags.kVectorOut is 32 in Python and 64 in C++"),
        ("kMaxColumnBlocks = 16", "kMaxColumnBlocks = 8", "structs.ShrinkParams"),
        ("  int32_t valid;", "  uint32_t valid;", "columns[0].valid is ('i', "),
    ],
)  # fmt: skip
def test_a_struct_that_was_changed_in_cpp_alone_is_named(
    old: str, new: str, field: str, tmp_path: Path
) -> None:
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    for name in ("params.h", "fields.h"):
        shutil.copy(CSRC / name, csrc / name)
    text = (csrc / "params.h").read_text()
    assert text.count(old) == 1, "the change no longer applies"
    (csrc / "params.h").write_text(text.replace(old, new))
    if "kMaxColumnBlocks" in old:
        with pytest.raises(AssertionError):
            test_python_and_cpp_agree(said_by(csrc, tmp_path))
        return
    assert field in str(door.disagreement(said_by(csrc, tmp_path)))


@pytest.mark.parametrize("name", STRUCTS)
def test_two_fields_that_change_places_are_noticed(name: str, said: SimpleNamespace) -> None:
    """Whichever two of one kind: nothing else would tell that they were swapped."""
    size, fields = said.structs[name]
    for a, b in itertools.combinations(fields, 2):
        if fields[a][0] == fields[b][0]:
            swapped = {**fields, a: fields[b], b: fields[a]}
            other = SimpleNamespace(
                **{**vars(said), "structs": {**said.structs, name: (size, swapped)}}
            )
            told = str(door.disagreement(other))
            assert f"structs.{name}." in told and " in Python and " in told


def test_an_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(**copy.deepcopy(exported()))
    other.structs["GradParams"][1]["wide"] = ("P", 8)
    monkeypatch.setitem(sys.modules, "alora_kernels._cuda", other)  # type: ignore[arg-type]
    monkeypatch.setattr(alora_kernels, "_cuda", other, raising=False)
    with pytest.raises(ImportError, match=r"other sources: .*GradParams.wide .*build it again"):
        door.extension()
    from alora_kernels.backends.cuda.backend import _why_not_here

    assert "GradParams.wide is ('P', 0) in Python and ('P', 8) in C++" in str(
        _why_not_here.__wrapped__()
    )
    older = SimpleNamespace()  # one that says nothing of itself
    monkeypatch.setattr(alora_kernels, "_cuda", older)
    with pytest.raises(ImportError, match=r"structs is .* in Python and None in C\+\+"):
        door.extension()


def test_the_built_extension_agrees() -> None:
    built = pytest.importorskip("alora_kernels._cuda", reason="the extension is not built here")
    assert door.extension() is built
    assert json.loads(json.dumps(built.structs)) == json.loads(json.dumps(exported()["structs"]))


def test_a_struct_is_packed_by_name() -> None:
    pair = Struct("Pair", (INT32, "valid"), (POINTER, "at"))
    made = Struct("Made", (INT32, "a"), (pair, "x y"), (FLOAT, "b"))
    assert made.size == 48 and made.alignment == 8
    data = made.pack({"a": 1, "x.valid": 2, "y.valid": 3, "b": 0.5})
    assert data == struct.pack("=i4xi4xQi4xQf4x", 1, 2, 0, 3, 0, 0.5)
    assert made.pack({"b": 0.5, "y.valid": 3, "x.valid": 2, "a": 1}) == data


@pytest.mark.parametrize(
    ("values", "odd"), [({"a": 1}, "b"), ({"a": 1, "b": 2, "c": 3}, "c"), ({"b": 2, "at": 1}, "a")]
)
def test_a_field_without_a_value_is_refused(values: dict[str, Any], odd: str) -> None:
    with pytest.raises(TypeError, match=f"Small: given without a field, or not given: .*{odd}"):
        Struct("Small", (INT32, "a b"), (POINTER, "at")).pack(values)
