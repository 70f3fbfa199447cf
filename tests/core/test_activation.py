"""Which rows are active: every constructor against a three-line search in Python."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_kernels import Activation, activate, current_activation, find_invocation_starts


def search(row: list[int], wanted: list[int]) -> int:
    """The last occurrence, −1 when there is none: the definition."""
    n = len(wanted)
    found = [i for i in range(len(row) - n + 1) if row[i : i + n] == wanted]
    return found[-1] if found else -1


def assert_rows(activation: Activation, rows: list[int], total: int) -> None:
    """All fields agree with the list of active rows."""
    assert activation.num_rows == total
    assert activation.active_count.tolist() == [len(rows)]
    assert activation.active_rows[: len(rows)].tolist() == rows
    assert set(activation.active_rows[len(rows) :].tolist()) <= {-1}
    assert activation.mask.nonzero().flatten().tolist() == rows
    assert activation.row_adapter.dtype == activation.active_rows.dtype == torch.int32
    if activation.num_active is not None:
        assert activation.num_active == len(rows)
    assert activation.max_active >= len(rows)
    if activation.segments is not None:
        assert [r for lo, hi in activation.segments for r in range(lo, hi)] == rows
        stops = [hi for _, hi in activation.segments]
        starts = [lo for lo, _ in activation.segments]
        assert all(hi < lo for hi, lo in zip(stops, starts[1:])), "segments touch"


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Few token ids, so that matches are frequent and overlap."""
    length = draw(st.integers(1, 12))
    token = st.integers(0, 2)
    rows = draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=1, max_size=4))
    return rows, draw(st.lists(token, min_size=1, max_size=4))


@given(batches())
@settings(max_examples=300, deadline=None)
def test_from_input_ids_is_the_search(case: tuple[list[list[int]], list[int]]) -> None:
    rows, wanted = case
    ids, length = torch.tensor(rows), len(rows[0])
    starts = [search(row, wanted) for row in rows]
    assert find_invocation_starts(ids, wanted).tolist() == starts
    expected = [b * length + t for b, s in enumerate(starts) if s >= 0 for t in range(s, length)]
    assert_rows(Activation.from_input_ids(ids, wanted), expected, ids.numel())
    if len(rows) == 1:
        assert_rows(Activation.from_input_ids(ids[0], wanted), expected, ids.numel())


@given(batches(), st.data())
@settings(max_examples=150, deadline=None)
def test_padding_neither_matches_nor_activates(
    case: tuple[list[list[int]], list[int]], data: st.DataObject
) -> None:
    rows, wanted = case
    length = len(rows[0])
    pads = [data.draw(st.integers(0, length)) for _ in rows]
    left = data.draw(st.booleans())
    mask = torch.tensor(
        [[int(t >= p) if left else int(t < length - p) for t in range(length)] for p in pads]
    )
    expected = []
    for b, (row, p) in enumerate(zip(rows, pads)):
        real = row[p:] if left else row[: length - p]
        start = search(real, wanted)
        first = p if left else 0
        expected += [b * length + first + t for t in range(start, len(real)) if start >= 0]
    activation = Activation.from_input_ids(torch.tensor(rows), wanted, mask)
    assert_rows(activation, expected, len(rows) * length)


@given(
    st.lists(st.one_of(st.none(), st.integers(-2, 9)), min_size=1, max_size=4), st.integers(0, 6)
)
@settings(max_examples=100, deadline=None)
def test_from_offsets_counts_from_the_end(offsets: list[int | None], seq_len: int) -> None:
    expected = [
        b * seq_len + t
        for b, o in enumerate(offsets)
        for t in range(seq_len)
        if o is not None and seq_len - t <= o
    ]
    assert_rows(Activation.from_offsets(offsets, seq_len), expected, len(offsets) * seq_len)


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 8),
)
@settings(max_examples=100, deadline=None)
def test_from_starts_is_absolute(
    starts: list[int | None], seq_len: int, first_position: int
) -> None:
    expected = [
        b * seq_len + t
        for b, s in enumerate(starts)
        for t in range(seq_len)
        if s is not None and first_position + t >= s
    ]
    total = len(starts) * seq_len
    assert_rows(Activation.from_starts(starts, seq_len, first_position), expected, total)
    tensor = torch.tensor([-1 if s is None else s for s in starts])
    assert_rows(Activation.from_starts(tensor, seq_len, first_position), expected, total)


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 7))), min_size=1))
@settings(max_examples=100, deadline=None)
def test_from_packed_starts_within_each_sequence(
    sequences: list[tuple[int, int | None]],
) -> None:
    bounds = [0]
    for length, _ in sequences:
        bounds.append(bounds[-1] + length)
    starts = [s for _, s in sequences]
    expected = [
        lo + t
        for lo, (length, s) in zip(bounds, sequences)
        for t in range(length)
        if s is not None and t >= s
    ]
    assert_rows(Activation.from_packed(bounds, starts), expected, bounds[-1])
    tensors = torch.tensor(bounds), torch.tensor([-1 if s is None else s for s in starts])
    assert_rows(Activation.from_packed(*tensors), expected, bounds[-1])


def test_chunks_add_up_to_the_whole() -> None:
    starts = [3, None, 0, 11]
    whole = Activation.from_starts(starts, 12).mask.view(4, 12)
    chunks = [Activation.from_starts(starts, n, p) for n, p in ((5, 0), (1, 5), (6, 6))]
    joined = torch.cat([c.mask.view(4, -1) for c in chunks], 1)
    assert torch.equal(joined, whole)


def test_all_none_and_empty() -> None:
    assert_rows(Activation.all(7), list(range(7)), 7)
    assert_rows(Activation.none(7), [], 7)
    assert_rows(Activation.all(0), [], 0)
    assert_rows(Activation.from_mask(torch.zeros(0, dtype=torch.bool)), [], 0)


def test_known_on_the_host_exactly_when_the_host_can_know() -> None:
    mask = torch.rand(9) < 0.5
    assert Activation.from_mask(mask).num_active == int(mask.sum())
    assert Activation.from_mask(mask.to("meta")).num_active is None
    moved = Activation.from_mask(mask).to("meta")
    assert moved.num_active == int(mask.sum()) and moved.device.type == "meta"
    unknown = Activation.from_mask(mask.to("meta"))
    assert unknown.planned_active == 9 and unknown.expecting(1 / 3).planned_active == 3


def test_immutable_and_a_pytree() -> None:
    activation = Activation.all(3)
    with pytest.raises(AttributeError):
        activation.num_active = 2  # type: ignore[misc]
    leaves, spec = torch.utils._pytree.tree_flatten(activation)
    assert len(leaves) == 3
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.mask, activation.mask)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Activation.from_input_ids(torch.tensor([1, 2]), []), ValueError, "empty"),
        (lambda: Activation.from_input_ids(torch.rand(1, 2), [1]), TypeError, "float32"),
        (lambda: Activation.from_input_ids(torch.ones(1, 1, 1).long(), [1]), ValueError, "1, 1, 1"),
        (
            lambda: Activation.from_input_ids(torch.tensor([[1, 2]]), [1], torch.ones(3)),
            ValueError,
            "attention_mask",
        ),
        (lambda: Activation.from_packed([1, 3], [0]), ValueError, "begin with 0"),
        (lambda: Activation.from_packed([0, 3, 2], [0, 0]), ValueError, "never fall"),
        (lambda: Activation.from_packed([0, 3], [0, 0]), ValueError, "1 sequences but 2"),
        (lambda: Activation.all(3).expecting(1.5), ValueError, "1.5"),
        (
            lambda: Activation(*(torch.ones(1, dtype=torch.int32) for _ in range(3))),
            NotImplementedError,
            "adapter 1",
        ),
    ],
)
def test_bad_input_is_refused(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()


def test_ambient_activation_nests_and_survives_errors() -> None:
    outer, inner = Activation.all(1), Activation.none(1)
    with activate(outer):
        with pytest.raises(KeyError), activate(inner):
            assert current_activation() is inner
            raise KeyError
        assert current_activation() is outer
    assert current_activation() is None


def test_ambient_activation_is_per_thread() -> None:
    seen: dict[str, Activation | None] = {}
    barrier = threading.Barrier(2)

    def work(name: str, activation: Activation) -> None:
        with activate(activation):
            barrier.wait()
            seen[name] = current_activation()
            barrier.wait()

    mine = {"a": Activation.all(1), "b": Activation.none(2)}
    threads = [threading.Thread(target=work, args=item) for item in mine.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == mine


def test_ambient_activation_is_per_task() -> None:
    async def work(activation: Activation) -> bool:
        with activate(activation):
            for _ in range(3):
                await asyncio.sleep(0)
                if current_activation() is not activation:
                    return False
        return True

    async def main() -> list[bool]:
        return await asyncio.gather(*(work(Activation.all(i)) for i in range(1, 4)))

    assert asyncio.run(main()) == [True, True, True]


def test_a_tree_of_other_leaves() -> None:
    """Libraries map activations to trees of anything, as torch.utils.checkpoint does."""
    mapped = torch.utils._pytree.tree_map(lambda t: None, Activation.all(3))
    assert (mapped.row_adapter, mapped.active_rows, mapped.active_count) == (None, None, None)
