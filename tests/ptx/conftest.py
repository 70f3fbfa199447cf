"""Fresh random inputs for the interpreter's tests, and the report of what kernels moved."""

from __future__ import annotations

import os

import numpy as np
import pytest

from .report import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx-report", nargs="?", const="", default=os.environ.get("ALORA_PTX_REPORT"),
        help="table (and, with a file name, csv) of every kernel that the interpreter launched",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--ptx-report", os.environ.get("ALORA_PTX_REPORT"))
    if path is not None:
        config.stash[REPORT] = Report(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    report = terminalreporter.config.stash.get(REPORT, None)
    if report is not None and report.rows:
        terminalreporter.section("kernels executed from PTX")
        terminalreporter.write_line(report.write())


REPORT = pytest.StashKey[Report]()


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fresh seed; set ALORA_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("ALORA_TEST_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"ALORA_TEST_SEED={seed}")
    return np.random.default_rng(seed)
