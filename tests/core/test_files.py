"""What is written is there whole, or nothing has changed; what is said once is said once."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

from alora_kernels import once
from alora_kernels.files import whole_folder, write_whole


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "figures.json"
    write_whole(path, b"one")
    assert path.read_bytes() == b"one"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["figures.json"]


def test_a_folder_appears_whole(tmp_path):
    folder = tmp_path / "new" / "model"
    with pytest.raises(RuntimeError), whole_folder(folder) as building:
        (building / "weights").write_bytes(b"half")
        raise RuntimeError
    assert not folder.exists() and not os.listdir(folder.parent)
    folder.mkdir()
    with whole_folder(folder) as building:
        (building / "weights").write_bytes(b"whole")
        assert not any(folder.iterdir())
    assert (folder / "weights").read_bytes() == b"whole"
    assert os.listdir(folder.parent) == ["model"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_bytes(b"")
    with pytest.raises(OSError), whole_folder(tmp_path / "model") as building:
        (building / "weights").write_bytes(b"")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["mine"]


def test_said_once(caplog):
    once.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            once.warn_once(f"number {number}", "kind", "model a")
        once.warn_once("number 9", "kind", "model b")
    assert [str(w.message) for w in caught] == ["number 0", "number 9"]
    assert caught[0].filename == __file__
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            once.log_once(logging.getLogger("alora_kernels"), "said")
    assert [r.message for r in caplog.records] == ["said"]
    once.forget()
    assert once.first_time("log", "said")
