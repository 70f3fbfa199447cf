"""bench/run.py: every mode behind one door, and what a script's folder on the path must not do."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import run

BENCH = Path(run.__file__).parent


@pytest.mark.parametrize("mode", sorted(run.MODES))
def test_a_mode_whose_module_is_absent_says_so(mode, capsys, monkeypatch):
    monkeypatch.setitem(run.MODES, mode, "bench.no_such_module")
    with pytest.raises(SystemExit) as stop:
        run.main(["--mode", mode])
    assert stop.value.code == 2
    assert f"--mode {mode}: bench/no_such_module.py is not part" in capsys.readouterr().err


def test_a_mode_gets_its_own_flags(monkeypatch):
    got = []
    stub = SimpleNamespace(main=lambda arguments: got.append(arguments) or 3)
    monkeypatch.setitem(sys.modules, "stub_mode", stub)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: stub)
    monkeypatch.setitem(run.MODES, "train", "stub_mode")
    assert run.main(["--mode", "train", "--steps", "7"]) == 3
    monkeypatch.setitem(run.MODES, "tune", "stub_mode")
    assert run.main(["--shape", "8x8", "--tune"]) == 3
    assert got == [["--steps", "7"], ["--shape", "8x8"]]


def test_tuning_is_no_flag_of_another_mode(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--mode", "serve", "--tune"])
    assert stop.value.code == 2 and "leave --mode serve out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["decode", "train"])
def test_the_old_commands_are_the_modes_of_their_names(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", "--layers", "0"])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"bench/run.py --mode {name}: error: argument --layers: expected a whole" in error


def test_the_rooms_are_not_taken_for_packages_of_their_names(tmp_path):
    """`python bench/run.py` puts bench/ on the path, where bench/vllm would be vLLM."""
    code = (
        "import atexit, importlib.util as u, runpy, sys\n"
        "atexit.register(lambda: print(*(s.origin for s in map(u.find_spec, names) if s)))\n"
        "names = ('vllm', 'models', 'common')\n"
        f"sys.path[0], sys.argv[1:] = {str(BENCH)!r}, ['--mode', 'predict', '--k', '0']\n"
        f"runpy.run_path({str(BENCH / 'run.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "argument --k: expected a whole number above 0" in done.stderr
    assert str(BENCH) not in done.stdout
