"""Run the tests of PEFT models, training and inference on other versions; see docs/peft.md.

    python tests/matrix.py                       every environment, one after the other
    python tests/matrix.py floor newest          some
    python tests/matrix.py --list                what each one pins
    python tests/matrix.py floor -- tests/peft -x    other pytest arguments

Each environment is a virtual environment of its own that pins the packages of its row and borrows
all others (torch, pytest, this package) from the one that runs this script. They are kept under
--folder, and made again when their pins change. The last thing printed is the table.
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

# That of the newest hub does not import with an older one.
DATASETS = ("datasets>=4.4,<5", "httpx", "httpcore", "h11", "anyio")
# What a user may have. The floors are those of pyproject.toml (test_matrix.py holds them equal).
# "latest" is what pip finds. A row brings the packages that its versions insist on.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "floor": (
        "peft==0.19.0",
        "transformers==4.57.1",
        "trl==1.16.0",
        "huggingface_hub>=0.34,<1",
        "tokenizers>=0.22,<=0.23",
        *DATASETS,
    ),
    "newest 4.x": (
        "peft==0.21.2",
        "transformers==4.57.6",
        "trl==1.16.0",
        "huggingface_hub>=0.34,<1",
        "tokenizers>=0.22,<=0.23",
        *DATASETS,
    ),
    "first 5.x": (
        "peft==0.20.0",
        "transformers==5.0.0",
        "trl==1.16.0",
        "huggingface_hub>=1.3,<2",
        "tokenizers>=0.22,<=0.23",
        *DATASETS,
    ),
    "newest": ("peft", "transformers", "trl"),
}
SHOWN = ("peft", "transformers", "trl")
TESTS = ("tests/peft", "tests/training", "tests/inference", "tests/examples", "tests/bench")
ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("passed", "failed", "errors", "error", "skipped", "xfailed")


def make(folder: Path, pins: tuple[str, ...]) -> Path:
    """The Python of an environment with `pins` in front of this interpreter's packages."""
    python = folder / "bin" / "python"
    stamp = folder / "pins.txt"
    wanted = "\n".join(pins)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    run = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Without dependencies: what is not pinned is borrowed.
    subprocess.run([*run, "--no-deps", "--upgrade", *pins], check=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    borrowed = [p for p in {*site.getsitepackages(), sysconfig.get_path("purelib")} if p != own]
    # A line that begins with "import" is run: addsitedir also reads the .pth files found there,
    # by which an editable install is found. What it adds comes after the pins.
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(borrowed)]
    (Path(own) / "zz_borrowed.pth").write_text("\n".join(lines) + "\n")
    stamp.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """What the environment really imports."""
    code = "import importlib.metadata as m, sys\nfor n in sys.argv[1:]: print(n, m.version(n))"
    out = subprocess.run(
        [str(python), "-c", code, *SHOWN], check=True, capture_output=True, text=True
    ).stdout
    return dict(line.split() for line in out.splitlines())


def run(python: Path, arguments: list[str], log: Path) -> tuple[dict[str, int], float, int]:
    """pytest's counts, seconds and exit code; its output goes to `log`."""
    began = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONNOUSERSITE": "1"},
        ).returncode
    return counts(log.read_text()), time.monotonic() - began, code


def counts(output: str) -> dict[str, int]:
    """The numbers of pytest's closing line."""
    for line in reversed(output.splitlines()):
        found = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})\b", line)
        if found:
            return {what: int(number) for number, what in found}
    return {}


def table(rows: list[tuple[str, dict[str, str], dict[str, int], float]]) -> str:
    """Markdown, as in docs/peft.md."""
    lines = ["| peft | transformers | trl | passed | failed | skipped |", "|---" * 6 + "|"]
    for _, found, got, _ in rows:
        failed = got.get("failed", 0) + got.get("errors", 0) + got.get("error", 0)
        cells = [found[n] for n in SHOWN]
        cells += [str(n) for n in (got.get("passed", 0), failed, got.get("skipped", 0))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    at = given.index("--") if "--" in given else len(given)
    p = argparse.ArgumentParser(
        prog="tests/matrix.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("environments", nargs="*", help="default: all")
    p.add_argument("--folder", type=Path, default=ROOT / ".venv" / "matrix")
    p.add_argument("--list", action="store_true", help="print the pins and stop")
    o = p.parse_args(given[:at])
    unknown = sorted(set(o.environments) - set(ENVIRONMENTS))
    if unknown:
        p.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(ENVIRONMENTS)}")
    if o.list:
        for name, pins in ENVIRONMENTS.items():
            print(f"{name:<12}{' '.join(pins)}")
        return 0
    rows, worst = [], 0
    for name in o.environments or list(ENVIRONMENTS):
        folder = o.folder.resolve() / name.replace(" ", "-")
        folder.parent.mkdir(parents=True, exist_ok=True)
        python = make(folder, ENVIRONMENTS[name])
        found = versions(python)
        log = folder / "tests.log"
        print(name, found, "→", log, flush=True)
        got, seconds, code = run(python, given[at + 1 :] or list(TESTS), log)
        print(f"  {got}, exit code {code}, {seconds:.0f} s", flush=True)
        rows.append((name, found, got, seconds))
        worst = max(worst, code)
    print(table(rows))
    return worst


if __name__ == "__main__":
    sys.exit(main())
