"""Every architecture of the installed transformers against the definition of an activated LoRA.

    python tests/peft/sweep.py                         # all of them
    python tests/peft/sweep.py llama mamba2 --only forward,generate
    python tests/peft/sweep.py --csv sweep.csv --markdown docs/peft.md

Small models from config, so nothing is fetched. Each architecture runs in a process of its own,
under a time limit: a crash or a hang is a line of the table. Exits with 1 if anything is WRONG or
fails with an error that does not name the reason.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from tests.peft.sweeping.checks import CHECKS
from tests.peft.sweeping.models import Architecture, NotMade, architectures
from tests.peft.sweeping.subject import Subject
from tests.peft.sweeping.verdict import Verdict, failure

COLOURS = {"equal": "green", "refused": "cyan", "WRONG": "bold red", "error": "red"}
MARKS = ("<!-- sweep -->", "<!-- /sweep -->")
Row = dict[str, Verdict]  # the verdict of each check, or of "made"


def run_one(arch: Architecture, checks: Sequence[str], seed: int = 0) -> Iterator[tuple[str, Any]]:
    """The verdicts of one architecture, check by check."""
    try:
        subject = Subject(arch, seed)
    except NotMade as error:
        yield "made", Verdict("not made", str(error))
        return
    except Exception as error:
        yield "made", Verdict("not made", failure(error).detail)
        return
    left_out = [f"{path}: {why}" for path, why in subject.strays.items()]
    if subject.without:
        left_out.append(subject.without)
    yield "made", Verdict("made", "; ".join(left_out))
    for check in checks:
        if subject.stock is None and check != "others":
            yield check, Verdict("none", "no linear layer reads the tokens' rows")
            continue
        try:
            yield check, CHECKS[check](subject)
        except Exception as error:  # the definition itself, or the base model from scratch
            yield check, Verdict("base fails", failure(error).detail)


def _child(pipe: Connection, arch: Architecture, checks: Sequence[str], seed: int) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for found in run_one(arch, checks, seed):
        pipe.send(found)
    pipe.close()


class Running:
    """One architecture in a process of its own."""

    def __init__(self, context: Any, arch: Architecture, args: argparse.Namespace) -> None:
        self.arch, self.checks, self.verdicts = arch, args.only, {}
        self.pipe, theirs = context.Pipe(duplex=False)
        task = (theirs, arch, args.only, args.seed)
        self.process = context.Process(target=_child, args=task, daemon=True)
        self.process.start()
        theirs.close()
        self.limit = args.limit
        self.began = time.monotonic()

    def finished(self) -> bool:
        """Take what has come; whether that is all."""
        try:
            while self.pipe.poll(0.02):
                name, verdict = self.pipe.recv()
                self.verdicts[name] = verdict
        except EOFError:
            self.process.join()
            return self._ended(f"the process ended with {self.process.exitcode}")
        if time.monotonic() - self.began > self.limit:
            self.process.kill()
            self.process.join()
            return self._ended(f"no answer within {self.limit:.0f} s")
        return False

    def _ended(self, why: str) -> bool:
        if "made" not in self.verdicts:
            self.verdicts["made"] = Verdict("not made", why)
        elif self.verdicts["made"].kind == "made":
            for check in self.checks:
                if check not in self.verdicts:
                    self.verdicts[check] = Verdict("error", why)
                    why = "not reached"
        return True


def sweep(wanted: Sequence[Architecture], args: argparse.Namespace) -> dict[str, Row]:
    """The verdicts of all architectures, with a progress bar."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.peft.sweeping.checks"])
    rows: dict[str, Row] = {}
    waiting, running = list(wanted), []
    columns = ("{task.description:28}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(wanted))
        while waiting or running:
            while waiting and len(running) < args.jobs:
                running.append(Running(context, waiting.pop(0), args))
                progress.update(task, description=running[-1].arch.name)
            for one in [r for r in running if r.finished()]:
                running.remove(one)
                rows[one.arch.name] = one.verdicts
                progress.advance(task)
    return {arch.name: rows[arch.name] for arch in wanted}


# ---------------------------------------------------------------------- what is printed


def print_table(rows: dict[str, Row], checks: Sequence[str]) -> None:
    table = Table(title="Against the definition", title_justify="left")
    for name in ("architecture", *checks):
        table.add_column(name)
    for name, row in rows.items():
        if row["made"].kind != "made":
            table.add_row(name, "not made", *[""] * (len(checks) - 1))
            continue
        kinds = [row[check].kind for check in checks]
        table.add_row(name, *[f"[{COLOURS.get(k, 'yellow')}]{k}" for k in kinds])
    Console(width=max(100, 28 + 12 * len(checks))).print(table)
    for name, row in rows.items():
        for check, verdict in row.items():
            if verdict.bad or verdict.kind == "not made":
                print(f"{name}, {check}: {verdict.kind}: {verdict.detail}")


def write_csv(path: Path, rows: dict[str, Row]) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("architecture", "check", "verdict", "detail"))
        for name, row in rows.items():
            for check, verdict in row.items():
                lines.writerow((name, check, verdict.kind, verdict.detail))


def markdown(rows: dict[str, Row], checks: Sequence[str]) -> str:
    """The table of docs/peft.md: one line for all architectures with the same verdicts."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        if row["made"].kind == "made":
            groups.setdefault(tuple(row[c].kind for c in checks), []).append(name)
    packages = ("transformers", "peft", "torch")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    made = sum(len(names) for names in groups.values())
    lines = [
        f"{made} of {len(rows)} architectures, {datetime.date.today()}, {versions}.",
        "",
        f"| {' | '.join((*checks, 'architectures'))} |",
        "|---" * (len(checks) + 1) + "|",
    ]
    for kinds, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {' | '.join(kinds)} | {len(names)}: {', '.join(names)} |")
    missing: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["made"].kind != "made":
            missing.setdefault(_short(row["made"].detail), []).append(name)
    if missing:
        lines += ["", "Not made:", ""]
        lines += [f"- {', '.join(names)}: {reason}" for reason, names in missing.items()]
    return "\n".join(lines)


def _short(reason: str) -> str:
    """A reason in one line of a table."""
    line = " ".join(reason.split()).replace("|", "/")
    return line if len(line) <= 160 else line[:157] + "..."


def write_markdown(path: Path, table: str) -> None:
    """Put the table where the last one stands."""
    text = path.read_text()
    if any(text.count(mark) != 1 for mark in MARKS):
        raise SystemExit(f"{path} does not hold {MARKS[0]} and {MARKS[1]} once each")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="architectures (model_type); all by default")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(CHECKS),
        help=f"checks, by comma, of: {', '.join(CHECKS)}",
    )
    parser.add_argument("--family", help="causal, multimodal or audio; all by default")
    parser.add_argument("--csv", type=Path, help="write every verdict with its detail")
    parser.add_argument(
        "--markdown",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"print the table of docs/peft.md, or write it into FILE between {MARKS[0]} and "
        f"{MARKS[1]}",
    )
    parser.add_argument("--jobs", type=int, default=1, help="architectures at the same time")
    parser.add_argument("--limit", type=float, default=120, help="seconds for an architecture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = sorted({c for c in args.only if c not in CHECKS})
    if unknown:
        parser.error(f"unknown checks {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    every = {arch.name: arch for arch in architectures()}
    unknown = sorted(set(args.names) - set(every))
    if unknown:
        parser.error(f"this transformers has no {', '.join(unknown)}")
    wanted = [every[n] for n in args.names] or list(every.values())
    if args.family:
        wanted = [arch for arch in wanted if arch.family == args.family]
    rows = sweep(wanted, args)
    if args.csv:
        write_csv(args.csv, rows)
    if args.markdown is None:
        print_table(rows, args.only)
    elif args.markdown:
        write_markdown(Path(args.markdown), markdown(rows, args.only))
    else:
        print(markdown(rows, args.only))
    return int(any(verdict.bad for row in rows.values() for verdict in row.values()))


if __name__ == "__main__":
    sys.exit(main())
