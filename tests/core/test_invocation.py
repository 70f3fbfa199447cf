"""The last occurrence of an invocation, in a list and in a tensor."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from alora_kernels import find_invocation_starts
from alora_kernels.invocation import last_occurrence

few = st.integers(0, 2)


@given(st.lists(few, max_size=40), st.lists(few, min_size=1, max_size=4), st.integers(0, 45))
def test_the_last_occurrence(ids, tokens, begin):
    places = [i for i in range(len(ids)) if ids[i : i + len(tokens)] == tokens]
    later = [i for i in places if i >= begin]
    assert last_occurrence(ids, tokens) == (places[-1] if places else None)
    assert last_occurrence(ids, tokens, begin) == (later[-1] if later else None)
    if ids:
        starts = find_invocation_starts(torch.tensor([ids]), tokens)
        assert starts.tolist() == [places[-1] if places else -1]
