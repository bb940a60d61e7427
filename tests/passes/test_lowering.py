"""Lowered patterns hold exactly the oracle's pairs, each once, whatever the tile size: no backend is involved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spgen as sp
from spgen.compile import _query_head_matters
from spgen.errors import UnsupportedError
from spgen.ir.kernel import parts
from spgen.patterns import Pattern
from tests.lowering import Lengths, lowered_builder, lowered_pairs, wanted_pairs
from tests.strategies import patterns

TILES = st.sampled_from([(8, 8), (16, 8), (8, 16), (16, 16)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, Lengths]:
    """A pattern with a call's sizes, options and tiles."""
    group, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    heads = {"q_heads": group * kv_heads, "kv_heads": kv_heads}
    batch = draw(st.sampled_from([1, 2]))
    q_len, kv_len = draw(st.integers(1, 40)), draw(st.integers(1, 48))
    pattern = draw(patterns(q_len=q_len, kv_len=kv_len, batch=batch, **heads))
    call = Lengths(q_len, kv_len, **heads, batch=batch, **_options(draw, batch, kv_len))
    return pattern, replace(call, pack=_may_pack(draw, pattern, call))


def _options(draw: st.DrawFn, batch: int, kv_len: int) -> dict[str, Any]:
    """Offsets, lengths and tiles."""
    block_m, block_n = draw(TILES)
    options: dict[str, Any] = {"block_m": block_m, "block_n": block_n}
    offset = draw(st.sampled_from(["default", "scalar", "tensor"]))
    if offset != "default":
        offsets = draw(st.lists(st.integers(-5, 50), min_size=batch, max_size=batch))
        options["q_offset"] = offsets[0] if offset == "scalar" else torch.tensor(offsets)
    if draw(st.booleans()):
        options["kv_lengths"] = torch.tensor(draw(st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch)))
    return options


def _may_pack(draw: st.DrawFn, pattern: Pattern, call: Lengths) -> bool:
    matters = _query_head_matters(repr(pattern), call.q_heads, call.kv_heads)
    return draw(st.booleans()) and call.q_heads != call.kv_heads and not matters


@given(cases(), st.sampled_from([4, 16]))
def test_where_tiles_begin_at_multiples_the_same_pairs_are_wanted(case: tuple[Pattern, Lengths], align: int) -> None:
    pattern, call = case
    assert torch.equal(lowered_pairs(pattern, replace(call, align=align)), wanted_pairs(pattern, call))


@given(cases())
def test_lowered_pairs_are_the_oracles(case: tuple[Pattern, Lengths]) -> None:
    pattern, call = case
    assert torch.equal(lowered_pairs(pattern, call), wanted_pairs(pattern, call))


@st.composite
def packed_cases(draw: st.DrawFn) -> tuple[Pattern, Lengths]:
    """A pattern over a packed batch, with rows and keys that belong to no sequence."""
    group, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    heads = {"q_heads": group * kv_heads, "kv_heads": kv_heads}
    rows = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    keys = [draw(st.integers(0, 30)) for _ in rows]
    rows[0], keys[-1] = rows[0] + 1, keys[-1] + 1  # some sequence has a row, some a key
    cu = [torch.tensor([0, *sizes]).cumsum(0) + draw(st.integers(0, 9)) for sizes in (rows, keys)]
    q_len, kv_len, batch = max(rows), max(keys), len(rows)
    pattern = draw(patterns(q_len=q_len, kv_len=kv_len, batch=batch, **heads, rows=tuple(rows)))
    options = _options(draw, batch, kv_len)
    call = Lengths(q_len, kv_len, **heads, batch=batch, **options, cu_q=cu[0], cu_k=cu[1])
    return pattern, replace(call, pack=_may_pack(draw, pattern, call))


@given(packed_cases())
def test_lowered_pairs_of_packed_batches_are_the_oracles(case: tuple[Pattern, Lengths]) -> None:
    pattern, call = case
    assert torch.equal(lowered_pairs(pattern, call), wanted_pairs(pattern, call))


@pytest.mark.parametrize("limits", [sp.causal(), sp.window(9, 2), sp.causal() - sp.window(4), ~sp.causal()], ids=str)
def test_half_lines_say_which_diagonals_count(limits: Pattern) -> None:
    pattern = limits & sp.diagonals(torch.tensor([-30, -3, -1, 0, 2, 3, 4, 8, 9, 11, 40]))
    call = Lengths(40, 48, block_m=16, block_n=8)
    assert torch.equal(lowered_pairs(pattern, call), wanted_pairs(pattern, call))
    walked = parts(lowered_builder(pattern, call)[0].kernel, "segment")
    assert walked
    assert all("j < row" not in str(op["mask"]) for op in walked)  # the offsets' table says it


@pytest.mark.parametrize("order", ["q", "k"])
def test_one_axis_has_one_order(order: str) -> None:
    twice = sp.permuted(sp.permuted(sp.causal(), **{order: torch.arange(8)}), **{order: torch.arange(8)})
    with pytest.raises(UnsupportedError, match="permutation of a permutation"):
        lowered_pairs(twice, Lengths(8, 8))
