"""Builds the package: alora_kernels._cpu where a C++ compiler works, alora_kernels._cuda where
nvcc is found.

ALORA_BUILD_CUDA      unset: build it when a usable nvcc is found, else install without it
                      1: a missing or unusable nvcc is an error; 0: never build it
TORCH_CUDA_ARCH_LIST  what to build for, as PyTorch reads it ("8.0 9.0a 12.0+PTX")

No GPU is asked for and nothing is downloaded. The build needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_NVCC = (12, 0)
OLDEST_ARCH = 80
DEFAULT_ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")
CUDA = "alora_kernels._cuda"
REPORT = "_cuda_build.json"


class BuildError(RuntimeError):
    """Says what was asked for, why it cannot be had, and what to do."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that answers."""

    nvcc: str
    version: tuple[int, int]
    archs: frozenset[str]  # as `nvcc --list-gpu-code` and `--list-gpu-arch` name them


@dataclass(frozen=True)
class Decision:
    """Whether and for what to build; `message` is the one line that the user sees."""

    build: bool
    message: str
    archs: tuple[str, ...] = ()


def decide(env: Mapping[str, str], toolkit: Toolkit | None) -> Decision:
    """What to build. Depends on its arguments alone: no GPU, no file, no network is looked at."""
    wish = env.get("ALORA_BUILD_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise BuildError(f"ALORA_BUILD_CUDA is {wish!r}: leave it unset, or set it to 0 or 1")
    if wish == "0":
        return Decision(False, "CUDA kernels: not built (ALORA_BUILD_CUDA=0)")

    def without(reason: str, remedy: str) -> Decision:
        if wish == "1":
            raise BuildError(f"ALORA_BUILD_CUDA=1, but {reason}: {remedy}")
        return Decision(False, f"CUDA kernels: not built, {reason} ({remedy})")

    if toolkit is None:
        return without("no nvcc was found", "set CUDA_HOME, or put nvcc on PATH")
    have, need = (".".join(map(str, v)) for v in (toolkit.version, OLDEST_NVCC))
    if toolkit.version < OLDEST_NVCC:
        return without(f"{toolkit.nvcc} is CUDA {have}", f"CUDA {need} or newer is needed")
    wanted = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wanted:
        archs = parse_arch_list(wanted)
        unknown = [a for a in archs if a not in toolkit.archs]
        if unknown:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={wanted!r}: nvcc {have} does not know "
                f"{', '.join(unknown)}; it knows {', '.join(sorted(toolkit.archs))}"
            )
    else:
        archs = tuple(a for a in DEFAULT_ARCHS if a in toolkit.archs)
    if not archs:
        return without(
            f"TORCH_CUDA_ARCH_LIST={wanted!r} names no architecture from sm_{OLDEST_ARCH} on",
            "add 8.0 or newer",
        )
    text = f"CUDA kernels: building with nvcc {have} for {', '.join(archs)}"
    return Decision(True, text, archs)


def parse_arch_list(text: str) -> tuple[str, ...]:
    """PyTorch's list as nvcc's names; what is older than sm_80 is left out.

    9.0 means sm_90a: the kernels of Hopper need it, and every Hopper GPU runs it.
    """
    archs: list[str] = []
    for word in re.split(r"[\s;,]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not match:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: {word!r} is not a compute capability such as "
                "8.0, 9.0a or 12.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        if 10 * int(major) + int(minor) < OLDEST_ARCH:
            continue
        number = f"{major}{minor}"
        archs.append(f"sm_{number}{'a' if number == '90' else suffix}")
        if ptx:
            archs.append(f"compute_{number}{suffix}")
    return tuple(dict.fromkeys(archs))


def candidates(env: Mapping[str, str], path: Iterable[str]) -> list[str]:
    """Where nvcc may be, first choice first: CUDA_HOME, PATH, pip's package."""
    found = [
        os.path.join(env[home], "bin", "nvcc")
        for home in ("CUDA_HOME", "CUDA_PATH")
        if env.get(home)
    ]
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    if on_path:
        found.append(on_path)
    for folder in path:
        for pattern in ("nvidia/cu*/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc"):
            found += map(str, sorted(Path(folder or ".").glob(pattern), reverse=True))
    return found


def find_toolkit(env: Mapping[str, str], path: Iterable[str]) -> Toolkit | None:
    """The first nvcc that runs."""
    for nvcc in candidates(env, path):
        try:
            version = _output([nvcc, "--version"])
            listed = _output([nvcc, "--list-gpu-arch"]) + _output([nvcc, "--list-gpu-code"])
        except (OSError, subprocess.CalledProcessError):
            continue
        match = re.search(r"release (\d+)\.(\d+)", version)
        if match:
            number = int(match.group(1)), int(match.group(2))
            archs = frozenset(re.findall(r"(?:compute|sm)_\w+", listed))
            # The lists leave out the variants with a suffix, which came with CUDA 12.0.
            extra = {f"{a}a" for a in archs if int(a.split("_")[1]) >= 90}
            return Toolkit(nvcc, number, archs | extra)
    return None


def toolkit_root(dryrun: str) -> Path:
    """The toolkit's folder from what `nvcc --dryrun` prints: nvcc may be a wrapper script."""
    match = re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)
    if not match:
        raise BuildError(f"`nvcc --dryrun` did not say where its toolkit is: {dryrun[:500]!r}")
    return Path(match.group(1).strip()).resolve()


def gencode(archs: Iterable[str]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for arch in archs:
        kind, _, name = arch.partition("_")
        flags += ["-gencode", f"arch=compute_{name},code={kind}_{name}"]
    return flags


def parse_ptxas(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """Figures of each kernel and arch from what `-Xptxas -v` prints."""
    report: dict[str, dict[str, dict[str, int]]] = {}
    entry: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry = report.setdefault(match.group(1), {}).setdefault(match.group(2), {})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            entry["stack"], entry["spills"] = int(match.group(1)), int(match.group(2))
        elif match := re.search(r"Used (\d+) registers", line):
            entry["registers"] = int(match.group(1))
            smem = re.search(r"(\d+) bytes smem", line)
            entry["static_shared"] = int(smem.group(1)) if smem else 0
    return report


def strict(env: Mapping[str, str]) -> bool:
    """Whether warnings are errors: for who works on the kernels. A user's compiler may be newer."""
    return env.get("ALORA_BUILD_STRICT") == "1"


def check_ptxas(text: str, env: Mapping[str, str]) -> None:
    """Say where ptxas could not let wgmma run ahead (C7510): such a kernel is right, but slow."""
    lines = [line for line in text.splitlines() if "C7510" in line]
    if not lines:
        return
    if strict(env):
        raise BuildError("ptxas serialises wgmma:\n" + "\n".join(lines))
    print("alora_kernels: ptxas serialises wgmma, so these kernels will be slow; another nvcc may")
    print("not:", *lines, sep="\n  ")


def ninja_file(toolkit: Toolkit, archs: tuple[str, ...], target: Path) -> str:
    """The build: one object for each source, in parallel."""
    import pybind11

    root = toolkit_root(_output([toolkit.nvcc, "--dryrun", "-c", str(CSRC / "grad.cu")]))
    includes = [sysconfig.get_paths()["include"], pybind11.get_include(), str(root / "include")]
    host = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    device = ["-std=c++17", "-O3", "-Xptxas", "-v"]
    if strict(os.environ):
        host += ["-Werror"]
        device += ["-Werror", "all-warnings"]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    words = {
        "nvcc": toolkit.nvcc,
        "cxx": os.environ.get("CXX", "c++"),
        "host": " ".join(host + [f"-isystem {_quoted(i)}" for i in includes]),
        "device": " ".join(device),
    }
    lines = [f"{name} = {value}" for name, value in words.items()]
    lines += [
        "rule device",
        "  command = $nvcc $device $gencode -MD -MF $out.d -c $in -o $out > $out.ptxas 2>&1"
        " || (cat $out.ptxas; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule host",
        "  command = $cxx $host -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart static -o $out $in",
    ]
    objects = []
    for source in sorted(CSRC.iterdir()):
        if source.suffix not in (".cu", ".cpp"):
            continue
        own = [a for a in archs if "sm90" not in source.stem or a == "sm_90a"]
        if source.suffix == ".cu" and not own:
            continue
        rule = "device" if source.suffix == ".cu" else "host"
        lines += [f"build {source.name}.o: {rule} {_quoted(source)}"]
        lines += [f"  gencode = {' '.join(gencode(own))}"]
        objects.append(f"{source.name}.o")
    lines += [f"build {_quoted(target)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def build_extension(toolkit: Toolkit, archs: tuple[str, ...], folder: Path, target: Path) -> dict:
    """Compiles and links `target`; returns the report that is kept beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(toolkit, archs, target.resolve()))
    try:
        import ninja

        program = os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        program = "ninja"
    subprocess.run([program, "-C", str(folder)], check=True)
    texts = [p.read_text() for p in sorted(folder.glob("*.ptxas"))]
    check_ptxas("\n".join(texts), os.environ)
    return {
        "nvcc": ".".join(map(str, toolkit.version)),
        "archs": list(archs),
        "kernels": parse_ptxas("\n".join(texts)),
    }


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout


def _quoted(path: object) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def main() -> None:
    import pybind11
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    toolkit = (
        find_toolkit(os.environ, sys.path) if os.environ.get("ALORA_BUILD_CUDA") != "0" else None
    )
    decision = decide(os.environ, toolkit)
    print(decision.message, file=sys.stderr)

    class Build(build_ext):
        """Builds the CUDA extension by ninja and keeps the compiler's report beside it."""

        def build_extension(self, ext: Extension) -> None:
            if ext.name != CUDA:
                super().build_extension(ext)
                return
            assert toolkit is not None
            target = Path(self.get_ext_fullpath(ext.name))
            folder = Path(self.build_temp) / "cuda"
            report = build_extension(toolkit, decision.archs, folder, target)
            (target.parent / REPORT).write_text(json.dumps(report, indent=1))

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            built = Path(self.build_lib) / "alora_kernels" / REPORT
            if built.exists():
                shutil.copy(built, ROOT / "alora_kernels" / REPORT)

    extensions = [
        Extension(
            "alora_kernels._cpu",
            ["csrc/cpu/philox.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
            language="c++",
            optional=True,  # without a compiler torch draws the drop masks
        )
    ]
    if decision.build:
        extensions.append(Extension(CUDA, sources=[]))
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
