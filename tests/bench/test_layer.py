"""bench/layer: what is timed was checked, and what is printed follows from what was timed."""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import run
from bench.common import clocks, report
from bench.common.flags import UsageError
from bench.common.statistics import Timing
from bench.layer import cases, check, command, cpu_targets, measure, selection, variants

DOOR = Path(run.__file__)


def tiny_case(dtype: torch.dtype = torch.float32, **changes) -> cases.Case:
    case = cases.Case(
        model="tiny",
        layer="linear",
        in_features=40,
        out_features=56,
        rank=8,
        rows=cases.rows_from_offset(2, 9, 4),
        dtype=dtype,
        adapter_dtype=torch.float32,
        backward=True,
    )
    return case.but(**changes)


def fresh_seed() -> int:
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    return seed


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the command at a tiny size."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = (
        "--shape 48x40,24x64 --batch 2 --seq-len 32 --active 0.25 --rank 8 --seconds 0.2 "
        "--threads 1 --csv out.csv --plot out.png"
    )
    done = subprocess.run(
        [sys.executable, str(DOOR), *arguments.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    return SimpleNamespace(stdout=done.stdout, rows=rows, plot=folder / "out.png")


def test_csv_has_every_variant_of_every_case(finished):
    seen = {(r["layer"], r["direction"], r["dtype"], r["variant"]) for r in finished.rows}
    assert len(seen) == len(finished.rows)
    assert seen == {
        (layer, direction, dtype, variant)
        for layer in ("48x40", "24x64")
        for direction in ("fwd", "fwd+bwd")
        for dtype in ("fp32", "bf16")
        for variant in ("base linear", "alora cpu/delta", "PEFT", "by hand")
    }
    assert {(r["active_rows"], r["batch"], r["seq_len"]) for r in finished.rows} == {
        ("16", "2", "32")
    }


def test_ratios_and_rates_follow_from_the_times(finished):
    median = {
        (r["layer"], r["direction"], r["dtype"], r["variant"]): float(r["median_us"])
        for r in finished.rows
    }
    for r in finished.rows:
        cell = (r["layer"], r["direction"], r["dtype"])
        mine = median[(*cell, r["variant"])]
        assert mine >= float(r["min_us"]) > 0
        assert int(r["rounds"]) >= clocks.MIN_ROUNDS
        assert float(r["over_base"]) == pytest.approx(mine / median[(*cell, "base linear")])
        assert float(r["peft_over"]) == pytest.approx(median[(*cell, "PEFT")] / mine)
        assert float(r["tokens_per_s"]) == pytest.approx(64 / (mine * 1e-6))


def test_output_begins_with_the_machine_and_ends_with_the_geometric_mean(finished):
    lines = finished.stdout.strip().splitlines()
    assert "threads | Python" in lines[0] and f"torch {torch.__version__}" in lines[0]
    assert "commit " in lines[0] and "seed " in lines[0]
    last_table = finished.stdout[finished.stdout.rindex("Geometric mean") :]
    values = [
        float(r["over_base"])
        for r in finished.rows
        if (r["direction"], r["dtype"], r["variant"]) == ("fwd+bwd", "bf16", "PEFT")
    ]
    rows = [line for line in last_table.splitlines() if line.startswith("│")]
    peft_row = [line for line in rows if " PEFT " in line][-1]
    assert f"{statistics.geometric_mean(values):.3f}" in peft_row
    assert "graph" not in finished.stdout and "CUDA" not in finished.stdout


def test_plot_shows_a_bar_of_each_variant(finished):
    from matplotlib import colors, image

    pixels = image.imread(finished.plot)[..., :3]
    for colour in report.COLOURS[:3]:  # one for each of the three variants beside the base
        near = abs(pixels - colors.to_rgb(colour)).max(-1) < 0.01
        assert near.sum() > 500, colour
    absent = abs(pixels - colors.to_rgb(report.COLOURS[3])).max(-1) < 0.01
    assert not absent.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--active 1.5", "'text' or a fraction between 0 and 1, got '1.5'"),
        ("--model GPT-2", "unknown name 'GPT-2'; the names are Gemma-3-270M"),
        ("--dtype int8", "unknown name 'int8'"),
        ("--backend rocm", "invalid choice: 'rocm'"),
        ("--rank 0", "expected a whole number above 0, got '0'"),
        ("--shape 12by4", "expected KxN[,KxN...]"),
        ("--shape 8x8 --model Mistral-7B", "exclude each other"),
        ("--strategy tail --backend cpu", "has the strategy 'delta' alone"),
        ("--batch 99", "8 conversations for the adapter"),
        ("--seq-len 50", "use 512 or more"),
        ("--csv no/such/folder/out.csv", "does not exist"),
        ("--device meta", "expected cpu or cuda"),
        ("--mode nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_flags_are_refused_with_the_reason(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_can_run_is_asked_for_the_device_and_its_architecture(monkeypatch):
    asked = []

    def choose(problem, backend, strategy):
        asked.append((problem.device, problem.arch, problem.backward))
        raise RuntimeError(f"{backend}/{strategy} is not for this machine")

    monkeypatch.setattr(selection, "choose", choose)
    monkeypatch.setattr(selection, "arch_of", lambda device: {"cuda": 90}[device.type])
    options = command.parser().parse_args(["--backend", "triton", "--strategy", "tail"])
    options.device = torch.device("cuda", 0)
    with pytest.raises(UsageError, match="triton/tail is not for this machine"):
        selection.variants_of(options, [tiny_case()])
    assert asked == [("cuda", 90, True)]


# ---------------------------------------------------------------------- the check


class Spoiled(variants.Package):
    """The package with one value of one result changed."""

    name = "spoiled"

    def __init__(self, which: str, by: float) -> None:
        super().__init__("cpu", "delta")
        object.__setattr__(self, "which", which)
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "calls", [])

    def build(self, case, tensors):
        step = super().build(case, tensors)

        def run_it():
            self.calls.append(case)
            out = {name: t.detach().clone() for name, t in step().items()}
            out[self.which].view(-1)[3] += self.by
            return out

        return run_it


ALL = [
    variants.BaseLinear(),
    variants.Package("cpu", "delta"),
    variants.PeftLayer(),
    variants.ByHand(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"prefix_grad": False}, {"dropout_p": 0.3}, {"scaling": 2.5}]
)
def test_right_variants_pass_the_check(dtype, changes):
    case = tiny_case(dtype, **changes)
    # Neither PEFT nor the lines by hand can leave the prefix's gradient out.
    able = ALL[:2] if "prefix_grad" in changes else ALL
    tensors = cases.make_tensors(case, fresh_seed())
    wrong = check.check_all(able, [case.but(backward=False, dropout_p=0.0), case], tensors)
    assert wrong == {}


@pytest.mark.parametrize("which", ["y", "x", "lora_a", "lora_b"])
@pytest.mark.parametrize("by", [1e-3, math.nan])
def test_a_wrong_result_is_refused_and_never_timed(which, by, monkeypatch):
    spoiled = Spoiled(which, by)
    timed = []

    def interleave(steps, clock, seconds):
        timed.append(set(steps))
        return {name: Timing(1.0, 0.0, 1.0, 5, (1.0,) * 5) for name in steps}, {}

    monkeypatch.setattr(measure, "interleave", interleave)
    measured = measure.measure_all(
        [tiny_case()],
        [*ALL, spoiled],
        [clocks.CpuClock()],
        directions=(True,),
        seconds=1.0,
        seed=fresh_seed(),
        progress=report.make_progress(),
    )
    assert len(spoiled.calls) == 1  # by the check
    assert timed == [{v.name for v in ALL}]
    assert {r.variant for r in measured.results} == timed[0]
    what = "y is wrong" if which == "y" else f"the gradient of {which} is wrong"
    (wrong,) = measured.left_out
    assert "spoiled" in wrong and what in wrong
    assert measured.notes == []
    # Each variant over the base, and PEFT over this package and the lines by hand.
    assert list(measured.spreads.values()) == [0.0] * 5


def test_a_missing_adapter_is_refused():
    class Forgetful(variants.BaseLinear):
        name = "forgetful"
        adapted = True

    case = tiny_case(torch.bfloat16, backward=False)
    tensors = cases.make_tensors(case, fresh_seed())
    forgetful = Forgetful()
    forgetful.build = lambda case, tensors: lambda: {"y": tensors.x @ tensors.weight.T}
    with pytest.raises(check.WrongResult, match="y is wrong"):
        check.Checker(case, tensors).check(forgetful, case)


def test_main_returns_1_and_names_the_variant_when_a_result_is_wrong(monkeypatch, capsys):
    spoiled = Spoiled("lora_a", 1.0)
    monkeypatch.setattr(command, "variants_of", lambda options, cases: [*ALL[:2], spoiled])
    arguments = "--shape 16x24 --active 0.5 --seq-len 16 --pass fwd+bwd --dtype fp32 --seconds 0.01"
    assert run.main(arguments.split()) == 1
    assert "left out: spoiled" in capsys.readouterr().out


# ---------------------------------------------------------------------- cases


def test_conversations_are_different_and_each_ends_in_its_invocation():
    chats = cases.load_chats()
    assert len(chats) >= 24
    assert len({m["content"] for c in chats for m in c["messages"]}) == sum(
        len(c["messages"]) for c in chats
    )
    for chat in chats:
        text = cases.text_of(chat)
        assert cases.text_of(chat, with_answer=False).endswith(chat["invocation"])
        assert text.count(chat["invocation"]) == 1
        assert 200 <= len(cases.tokens_of(text)) <= 4000
        assert chat["messages"][-1]["role"] in ("user", "assistant")


@pytest.mark.parametrize("adapter", cases.ADAPTERS)
def test_active_rows_of_text_begin_at_the_invocation(adapter):
    rows = cases.rows_from_text(8, 600, adapter=adapter)
    expected = []
    for chat in cases.load_chats(adapter):
        answer = len((chat["answer"] + "<|end|>\n").encode())
        expected.append(len(chat["invocation"].encode()) + answer)
    assert sorted(rows.offsets) == sorted(expected)
    assert rows.activation.num_active == rows.num_active == sum(expected)
    mask = rows.activation.mask.view(8, 600)
    for row, offset in zip(mask, rows.offsets):
        assert not row[: 600 - offset].any() and row[600 - offset :].all()


def test_flops_and_bytes_of_a_case():
    case = tiny_case(torch.bfloat16)  # M=18, K=40, N=56, R=8, 8 active rows
    base, low_rank = 2 * 18 * 40 * 56, 2 * 8 * 8 * (40 + 56)
    assert case.flops(adapted=False) == 2 * base
    assert case.flops(adapted=True) == 2 * base + 3 * low_rank
    assert case.but(backward=False).flops(adapted=True) == base + low_rank
    assert case.but(prefix_grad=False).flops(adapted=True) == (base + base * 8 // 18 + 3 * low_rank)
    operands = 2 * (18 * 40 + 40 * 56 + 18 * 56)
    adapter = 4 * 8 * (40 + 56)
    assert case.but(backward=False).bytes(adapted=True) == operands + adapter
    assert case.bytes(adapted=True) == 2 * operands + 3 * adapter + 2 * 8 * 40


# ---------------------------------------------------------------------- the CPU targets


def test_cpu_targets_measure_each_line_against_its_bounds(monkeypatch, capsys):
    monkeypatch.setattr(cpu_targets, "FEATURES", 64)
    monkeypatch.setattr(cpu_targets, "RANK", 8)
    easy = {"fp32": 1e9}
    lines = (
        cpu_targets.Target(2, 16, 5, easy, {"fp32": 0.0}, dropout_p=0.1, threads=(1,)),
        cpu_targets.Target(1, 1, 1, easy, {"fp32": 1e9}, backward=False, threads=(1, 2)),
        cpu_targets.Target(2, 16, 5, {"bf16": 0.0}, {"bf16": 0.0}, prefix_grad=False, threads=(1,)),
    )
    monkeypatch.setattr(cpu_targets, "TARGETS", lines)
    assert run.main(["--mode", "cpu-targets", "--seconds", "0.05"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == [
        "2×16, 5, dropout 0.1",
        "1×1, 1, forward",
        "1×1, 1, forward",
        "2×16, 5, no prefix grad",
    ]
    assert [row.split("│")[3].strip() for row in rows] == ["1", "1", "2", "1"]
    # The decoding lines miss a speed-up of 1e9, the last one a time of zero.
    assert [row.split("│")[-2].strip() for row in rows][1:] == ["no", "no", "no"]


def test_the_targets_cover_the_stated_lines():
    lines = [
        (c.rows.batch, c.rows.seq_len, t.active, c.dtype_name, threads)
        for t in cpu_targets.TARGETS
        for threads, c in t.cases()
    ]
    assert len(lines) == len(cpu_targets.TARGETS) * 2 - 1 + 2  # dropout: fp32; decoding: 1, 2
    assert {line[4] for line in lines if line[:2] == (1, 1)} == {1, 2}


def test_allowed_memory_is_xa_dya_and_the_gradients():
    case = tiny_case(torch.bfloat16)  # 8 active rows, R=8, fp32 adapters
    assert cpu_targets.allowed_memory(case) == 2 * 8 * 8 * 2 + 8 * (40 + 56) * 4
