"""Pairs of lists of blocks."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spgen.weights.pairs import NOWHERE, pairs_of


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.floats(0, 1),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([1, 7, 512]),
    st.integers(0, 99),
)
def test_each_block_is_in_one_entry(
    n_lists: int, n_columns: int, density: float, per: int, own: bool, at_once: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n_lists, n_columns, generator=generator) < density
    rows, columns = mask.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0))).int()
    places = torch.randperm(len(rows), generator=generator).int() if own else None
    with mock.patch("spgen.weights.pairs._AT_ONCE", at_once):
        pairs = pairs_of(indptr, columns.int(), places, per)
    assert {tensor.dtype for tensor in pairs} == {torch.int32}
    assert sorted(one for one in pairs.lists.flatten().tolist() if one >= 0) == list(range(n_lists))
    parts = [min(at_once, n_lists - at) for at in range(0, n_lists, at_once)]
    assert (pairs.lists < 0).sum() == sum(part % 2 for part in parts)
    found = {}
    end = 0
    lengths = []
    for (first, second), bounds in zip(pairs.lists.tolist(), pairs.bounds.tolist(), strict=True):
        assert bounds[0] == end
        assert all((after - before) % per == 0 for before, after in pairwise(bounds))
        end = bounds[3]
        for kind, (has_first, has_second) in enumerate(((True, True), (True, False), (False, True))):
            run = slice(bounds[kind], bounds[kind + 1])
            kept = pairs.columns[run] < NOWHERE
            assert kept[: int(kept.sum())].all()
            assert (pairs.places[run][~kept] == NOWHERE).all()
            for column, places_of in zip(
                pairs.columns[run][kept].tolist(), pairs.places[run][kept].tolist(), strict=True
            ):
                for one, has, place in zip((first, second), (has_first, has_second), places_of, strict=True):
                    assert (place < NOWHERE) == has
                    if has:
                        found[one, column] = place
        lengths.append(len({column for (one, column) in found if one in (first, second)}))
    assert end == len(pairs.columns) == len(pairs.places)
    assert lengths == sorted(lengths, reverse=True)
    numbers = range(len(rows)) if places is None else places.tolist()
    assert found == {
        (row, column): place for row, column, place in zip(rows.tolist(), columns.tolist(), numbers, strict=True)
    }


@pytest.mark.parametrize(("size", "least"), [(64, 0.2), (32, 0.16)])
def test_partners_have_columns_in_common(size: int, least: float) -> None:
    """More than twice what adjacent lists have, at a tenth of all blocks."""
    mask = torch.rand(14336 // size, 4096 // size, generator=torch.Generator().manual_seed(0)) < 0.1
    _, columns = mask.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0))).int()
    assert len(pairs_of(indptr, columns.int()).columns) < (1 - least) * len(columns)


def test_equal_lists_share_everything() -> None:
    mask = torch.zeros(8, 6, dtype=torch.bool)
    for row in range(8):
        mask[row, [row // 2, row // 2 + 1]] = True
    rows, columns = mask[torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])].nonzero(as_tuple=True)
    del rows
    pairs = pairs_of(torch.arange(0, 18, 2).int(), columns.int())
    assert sorted(map(sorted, pairs.lists.tolist())) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert len(pairs.columns) == 8
