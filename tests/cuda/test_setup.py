"""What setup.py decides: one test for each row of its table, no nvcc needed."""

from __future__ import annotations

import importlib.util
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("alora_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["alora_setup"] = module
    spec.loader.exec_module(module)
    return module


setup = _load()
ALL = frozenset(
    f"{kind}_{n}" for kind in ("sm", "compute") for n in ("80", "86", "90", "90a", "100", "120")
)
NEW = setup.Toolkit("/opt/cuda/bin/nvcc", (13, 0), ALL)
MIDDLE = setup.Toolkit(
    "/opt/cuda/bin/nvcc", (12, 4), frozenset(a for a in ALL if "0a" in a or "80" in a)
)
OLD = setup.Toolkit("/opt/cuda/bin/nvcc", (11, 8), ALL)


@pytest.mark.parametrize(
    "env, toolkit, archs",
    [
        ({}, NEW, ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")),
        ({"ALORA_BUILD_CUDA": "1"}, NEW, ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")),
        ({}, MIDDLE, ("sm_80", "sm_90a", "compute_80")),  # as far as nvcc knows them
        ({"TORCH_CUDA_ARCH_LIST": "8.6"}, NEW, ("sm_86",)),
        ({"TORCH_CUDA_ARCH_LIST": "7.5;8.0 9.0,12.0+PTX"}, NEW,
         ("sm_80", "sm_90a", "sm_120", "compute_120")),
        # No GPU is visible, or another one than is built for: neither is looked at.
        ({"CUDA_VISIBLE_DEVICES": ""}, NEW, ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")),
    ],
)  # fmt: skip
def test_builds(env: dict[str, str], toolkit: object, archs: tuple[str, ...]) -> None:
    decision = setup.decide(env, toolkit)
    assert decision.build and decision.archs == archs
    assert all(a in decision.message for a in archs)


@pytest.mark.parametrize(
    "env, toolkit, reason",
    [
        ({}, None, "no nvcc was found (set CUDA_HOME"),
        ({}, OLD, "is CUDA 11.8 (CUDA 12.0 or newer is needed)"),
        ({"ALORA_BUILD_CUDA": "0"}, NEW, "ALORA_BUILD_CUDA=0"),
        ({"ALORA_BUILD_CUDA": "0"}, None, "ALORA_BUILD_CUDA=0"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0 7.5"}, NEW, "names no architecture from sm_80 on"),
    ],
)
def test_installs_pure_python_with_one_line(
    env: dict[str, str], toolkit: object, reason: str
) -> None:
    decision = setup.decide(env, toolkit)
    assert not decision.build and not decision.archs
    assert reason in decision.message and "\n" not in decision.message


@pytest.mark.parametrize(
    "env, toolkit, reason",
    [
        ({"ALORA_BUILD_CUDA": "1"}, None, "no nvcc was found: set CUDA_HOME"),
        ({"ALORA_BUILD_CUDA": "1"}, OLD, "CUDA 12.0 or newer is needed"),
        ({"ALORA_BUILD_CUDA": "yes"}, NEW, "'yes': leave it unset, or set it to 0 or 1"),
        ({"ALORA_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5"}, NEW, "add 8.0 or newer"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, NEW, "'Hopper' is not a compute capability"),
        ({"TORCH_CUDA_ARCH_LIST": "13.0"}, NEW, "does not know sm_130; it knows compute_100"),
    ],
)
def test_refuses_and_says_what_to_do(env: dict[str, str], toolkit: object, reason: str) -> None:
    with pytest.raises(setup.BuildError, match=r"ARCH_LIST|BUILD_CUDA") as caught:
        setup.decide(env, toolkit)
    assert reason in str(caught.value)


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


FAKE = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.0" ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  --list-gpu-code) echo sm_80; echo sm_90 ;;
esac
"""


def test_finds_nvcc_in_order(tmp_path: Path) -> None:
    home = _script(tmp_path / "home" / "bin" / "nvcc", FAKE.format(version="12.1"))
    path = _script(tmp_path / "path" / "nvcc", FAKE.format(version="12.2"))
    pip = _script(
        tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", FAKE.format(version="13.1")
    )
    env = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}
    site = [str(tmp_path / "site")]
    assert setup.candidates(env, site) == [str(home), str(path), str(pip)]
    assert setup.find_toolkit(env, site).version == (12, 1)
    home.unlink()  # a stale CUDA_HOME does not hide what lies elsewhere
    assert setup.find_toolkit(env, site).version == (12, 2)
    path.unlink()
    found = setup.find_toolkit(env, site)
    assert found.version == (13, 1) and {"sm_80", "sm_90a", "compute_80"} <= found.archs
    pip.unlink()
    assert setup.find_toolkit(env, site) is None


def test_the_root_comes_from_nvcc_itself(tmp_path: Path) -> None:
    real = tmp_path / "cuda-13"
    (real / "bin").mkdir(parents=True)
    text = f"#$ _SPACE_= \n#$ TOP={real}/bin/..\n#$ gcc -E\n"
    assert setup.toolkit_root(text) == real
    with pytest.raises(setup.BuildError, match="did not say where its toolkit is"):
        setup.toolkit_root("sh: nvcc: not found")


def test_gencode_flags() -> None:
    assert setup.gencode(["sm_90a", "compute_80"]) == [
        "-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=compute_80",
    ]  # fmt: skip


def test_reads_what_ptxas_prints() -> None:
    text = """ptxas info    : Compiling entry function 'some_kernel' for 'sm_80'
ptxas info    : Function properties for some_kernel
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 176 registers, used 1 barriers, 12288 bytes smem, 560 bytes cmem[0]
ptxas info    : Compiling entry function 'some_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers
"""
    assert setup.parse_ptxas(text) == {
        "some_kernel": {
            "sm_80": {"stack": 16, "spills": 8, "registers": 176, "static_shared": 12288},
            "sm_90a": {"stack": 0, "spills": 0, "registers": 90, "static_shared": 0},
        }
    }


def test_warnings_are_errors_only_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "toolkit_root", lambda text: Path("/opt/cuda"))
    monkeypatch.setattr(setup, "_output", lambda command: "")
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: "/include"))
    for value, expected in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("ALORA_BUILD_STRICT", raising=False)
        if value is not None:
            monkeypatch.setenv("ALORA_BUILD_STRICT", value)
        text = setup.ninja_file(NEW, ("sm_80", "sm_90a"), Path("_cuda.so"))
        flags = [line for line in text.splitlines() if line.startswith(("host", "device"))]
        assert len(flags) == 2
        assert all(("-Werror" in line) == expected for line in flags)


def test_serialised_wgmma_fails_a_strict_build(capsys: pytest.CaptureFixture[str]) -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
    setup.check_ptxas("ptxas info    : Used 90 registers", {"ALORA_BUILD_STRICT": "1"})
    assert not capsys.readouterr().out
    setup.check_ptxas(line, {})
    assert line in capsys.readouterr().out
    with pytest.raises(setup.BuildError, match="C7510"):
        setup.check_ptxas(line, {"ALORA_BUILD_STRICT": "1"})
