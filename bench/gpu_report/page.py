"""One page of a report, verdicts first, and its plots. Pure functions of report.json's content."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.gpu_report.commands import TIMED_OUT
from bench.layer.results import BASE, PEFT

Report = dict[str, Any]  # "about", and for each part its status, seconds, detail and data
GOOD, BAD, NOTE = "ok", "**BAD**", "–"


class Verdict(NamedTuple):
    """One line of the first table."""

    what: str
    mark: str
    text: str


def data_of(report: Report, part: str) -> dict[str, Any]:
    """What a part has saved; empty where it has not run."""
    return report["parts"].get(part, {}).get("data", {})


def write(report: Report) -> str:
    """The page."""
    about = data_of(report, "environment")
    lines = [f"# GPU report: {about.get('gpu', 'unknown GPU')}", ""]
    if report["rehearsal"]:
        lines += ["**A rehearsal: sizes and times mean nothing.**", ""]
    packages = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    machine = about.get("nvidia_smi", about.get("cpu", ""))
    made = f"commit {about.get('commit')}; made in {report['seconds']:.0f} s"
    lines += [f"{machine}; Python {about.get('python')}; {packages}; {made}.", ""]
    lines += _table(("", "verdict", ""), [(v.what, v.mark, v.text) for v in verdicts(report)])
    for section in (_layers, _ceilings, _training, _session, _counters, _parts):
        lines += section(report)
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- verdicts


def verdicts(report: Report) -> list[Verdict]:
    """What one wants to know first."""
    found: list[Verdict] = []
    for section in (
        _selftest_verdicts, _test_verdicts, _sanitizer_verdicts, _layer_verdicts,
        _tuning_verdicts, _training_verdicts, _session_verdicts,
    ):  # fmt: skip
        found += section(report)
    for name, part in report["parts"].items():
        if part["status"] in ("failed", "timed out"):
            found.append(
                Verdict(f"part {name}", BAD, f"{part['status']}: {_short(part['detail'])}")
            )
    return found


def _selftest_verdicts(report: Report) -> Iterable[Verdict]:
    for name, found in data_of(report, "self-test").get("backends", {}).items():
        if found["not_tested"]:
            yield Verdict(f"self-test {name}", NOTE, _short(found["not_tested"]))
            continue
        # (2: what was not tested could not be, or the time was over.)
        passed = found["status"] == 0 and found["passed"] == found["cases"] > 0
        unknown = found["status"] in (2, TIMED_OUT)
        text = f"{found['passed']} of {found['cases']} cases passed"
        text += f", {found['kernels']} kernels" if found["kernels"] else ""
        text += "; time over" if found["status"] == TIMED_OUT else ""
        yield Verdict(f"self-test {name}", GOOD if passed else NOTE if unknown else BAD, text)


def _test_verdicts(report: Report) -> Iterable[Verdict]:
    for name, group in data_of(report, "gpu-tests").get("groups", {}).items():
        counts = (
            ", ".join(f"{n} {result}" for result, n in group["counts"].items()) or "no test ran"
        )
        mark = GOOD if group["status"] == 0 else NOTE if group["status"] == 5 else BAD
        if group["status"] == TIMED_OUT:
            mark, counts = (BAD if group["failed"] else NOTE), f"{counts}; time over"
        failed = f": {', '.join(t.rpartition('::')[2] for t in group['failed'][:4])}"
        yield Verdict(f"tests, {name}", mark, counts + (failed if group["failed"] else ""))


def _sanitizer_verdicts(report: Report) -> Iterable[Verdict]:
    for tool, runs in data_of(report, "sanitizers").get("tools", {}).items():
        done = [r for r in runs if r["status"] != TIMED_OUT]
        bad = [r for r in done if r["status"] != 0]
        text = f"{len(done)} of {len(runs)} sets of cases ended in time"
        if bad:
            text = f"{text}; {bad[0]['cases']}: {' '.join(bad[0]['summary']) or 'failed'}"
        yield Verdict(tool, BAD if bad else GOOD if done else NOTE, text)


def _results(report: Report) -> list[dict[str, Any]]:
    parts = [n for n in report["parts"] if n.startswith("layers")]
    return [r for n in parts for r in data_of(report, n).get("results", ())]


def _wrong(report: Report) -> list[str]:
    parts = [n for n in report["parts"] if n.startswith("layers")]
    return [
        w for n in parts for key in ("wrong", "errors") for w in data_of(report, n).get(key, ())
    ]


def _ours(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of × base of each of our variants."""
    times: dict[str, list[float]] = {}
    for r in results:
        if r["variant"].startswith("alora") and r["over_base"] is not None:
            times.setdefault(r["variant"], []).append(r["over_base"])
    return {name: statistics.median(values) for name, values in times.items()}


def _layer_verdicts(report: Report) -> Iterable[Verdict]:
    wrong = _wrong(report)
    if wrong:
        yield Verdict("layers, results", BAD, f"{len(wrong)} wrong or failed: {_short(wrong[0])}")
    results = _results(report)
    for direction in dict.fromkeys(r["direction"] for r in results):
        best, peft = [], []
        for cell in _cells(results, direction):
            ours, theirs = _ours(cell), [r["over_base"] for r in cell if r["variant"] == PEFT]
            if ours:
                best.append(min(ours.values()))
            if ours and theirs and theirs[0] is not None:
                peft.append(theirs[0] / min(ours.values()))
        if best:
            text = f"the best of ours is {statistics.median(best):.2f} × base (median of "
            text += f"{len(best)} cells)"
            text += f", {statistics.median(peft):.2f} × faster than PEFT" if peft else ""
            yield Verdict(f"layers, {direction}", NOTE, text)


def _cells(results: Sequence[dict[str, Any]], direction: str) -> list[list[dict[str, Any]]]:
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in results:
        if r["direction"] == direction:
            key = (r["model"], r["layer"], r["seq_len"], r["active"], r["launch"])
            cells.setdefault(key, []).append(r)
    return list(cells.values())


def _tuning_verdicts(report: Report) -> Iterable[Verdict]:
    data = data_of(report, "tuning")
    lines = data.get("lines", ())
    if data.get("errors"):
        yield Verdict("tuning", BAD, _short(data["errors"][0]))
    if lines:
        right = sum(line["picked"] == line["fastest"] for line in lines)
        worst = max(line["loss"] for line in lines)
        text = f"the cost model picks the fastest in {right} of {len(lines)} cases; the worst pick "
        yield Verdict("dispatch", NOTE, text + f"is {worst:.0%} slower")


LOSS, NORM = 0.02, 0.05  # relative, in 16 bits


def _training_verdicts(report: Report) -> Iterable[Verdict]:
    data = data_of(report, "training")
    for error in data.get("errors", ()):
        yield Verdict("training step", BAD, _short(error))
    variants = data.get("variants", {})
    base = variants.get("PEFT")
    for name, v in variants.items():
        if base is None or v is base:
            continue
        loss, norm = (abs(v[key] / base[key] - 1.0) for key in ("loss", "gradient"))
        text = f"{base['seconds'] / v['seconds']:.2f} × PEFT's speed; loss off by {loss:.1%}, "
        text += f"the gradient's norm by {norm:.1%}"
        yield Verdict(f"training, {name}", GOOD if loss < LOSS and norm < NORM else BAD, text)


def _session_verdicts(report: Report) -> Iterable[Verdict]:
    data = data_of(report, "session")
    for error in data.get("errors", ()):
        yield Verdict("session", BAD, _short(error))
    for row in data.get("rows", ()):
        if row["variant"] == "plain LoRA" or row["variant"] == "plain LoRA, one by one":
            text = f"{row['what']} {row['ratio']:.1f} × sooner than by {row['variant']}"
            yield Verdict(f"session, {row['context']:,} tokens", NOTE, text)


# ---------------------------------------------------------------------- tables


def _layers(report: Report) -> list[str]:
    """The best of ours at each size: medians over all layers of all models."""
    results, rows = _results(report), []
    sizes = dict.fromkeys((r["direction"], r["seq_len"], r["active"]) for r in results)
    for direction, length, active in sorted(sizes):
        size = (direction, length, active)
        mine = [r for r in results if (r["direction"], r["seq_len"], r["active"]) == size]
        launch = "graph" if any(r["launch"] == "graph" for r in mine) else "eager"
        cell = [r for r in mine if r["launch"] == launch]
        ours = _ours(cell)
        if not ours:
            continue
        name = min(ours, key=lambda n: ours[n])
        others = [
            _median(r["over_base"] for r in mine if r["variant"] == v) for v in (PEFT, "by hand")
        ]
        base = _median((r["median_us"] for r in cell if r["variant"] == BASE), 1)
        rows.append((direction, f"{length:,}", active, base, f"{ours[name]:.2f}",
                     name.removeprefix("alora "), *others))  # fmt: skip
    if not rows:
        return []
    head = ("pass", "M", "f", "base µs", "ours × base", "by", "PEFT × base", "by hand × base")
    return [
        "",
        "## Layers: time over the base linear, medians over the layers",
        "",
        *_table(head, rows),
    ]


def _median(values: Iterable[float | None], digits: int = 2) -> str:
    found = [v for v in values if v is not None]
    return f"{statistics.median(found):.{digits}f}" if found else NOTE


def _ceilings(report: Report) -> list[str]:
    data = data_of(report, "ceilings")
    if "copy_tb_per_s" not in data:
        return []
    rows = [
        (f"{g['m']} × {g['n']} × {g['k']}", f"{g['us']:.1f}", f"{g['tflop_per_s']:.0f}",
         f"{g['tb_per_s']:.2f}") for g in data.get("gemm", ())
    ]  # fmt: skip
    text = f"Copy: {data['copy_tb_per_s']:.2f} TB/s. The vendor's GEMM, bfloat16:"
    return ["", "## Ceilings", "", text, "",
            *_table(("M × N × K", "µs", "TFLOP/s", "TB/s"), rows)]  # fmt: skip


def _training(report: Report) -> list[str]:
    data = data_of(report, "training")
    rows = [
        (name, f"{v['seconds'] * 1e3:.1f}",
         NOTE if v["peak_gib"] is None else f"{v['peak_gib']:.1f}", f"{v['loss']:.4f}")
        for name, v in data.get("variants", {}).items()
    ]  # fmt: skip
    if not rows:
        return []
    title = f"## Training step: {data['batch']} × ({data['prompt']} + {data['suffix']}) tokens"
    return ["", title, "", *_table(("", "ms", "peak GiB", "loss"), rows)]


def _session(report: Report) -> list[str]:
    rows = [
        (f"{r['context']:,}", r["what"], r["variant"], f"{r['seconds'] * 1e3:.1f}",
         f"{r['ratio']:.2f}")
        for r in data_of(report, "session").get("rows", ())
    ]  # fmt: skip
    if not rows:
        return []
    head = ("context", "", "by", "ms", "× the first")
    return ["", "## Session: many adapters over one cache", "", *_table(head, rows)]


def _counters(report: Report) -> list[str]:
    kernels = data_of(report, "counters").get("kernels", {})
    if not kernels:
        return []
    names = list(dict.fromkeys(what for own in kernels.values() for what in own))
    rows = [
        (k.removeprefix("masked_lora_"), *(f"{own[n]:.1f}" if n in own else NOTE for n in names))
        for k, own in kernels.items()
    ]
    return ["", "## What the GPU counts", "", *_table(("kernel", *names), rows)]


def _parts(report: Report) -> list[str]:
    rows = [
        (name, part["status"], f"{part['seconds']:.0f} of {part['budget']:.0f}",
         _short(part["detail"])) for name, part in report["parts"].items()
    ]  # fmt: skip
    return ["", "## Parts", "", *_table(("part", "", "seconds", ""), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _short(text: str, most: int = 160) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
