"""Lowered patterns hold exactly the oracle's pairs, each once, whatever the tile size: no backend is involved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spgen as sp
from spgen.compile import _query_head_matters
from spgen.errors import UnsupportedError
from spgen.patterns import Pattern
from tests.lowering import lowered_pairs
from tests.strategies import patterns

TILES = st.sampled_from([(8, 8), (16, 8), (8, 16), (16, 16)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, dict[str, object]]:
    """A pattern with a call's sizes and options."""
    group, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    q_len, kv_len = draw(st.integers(1, 40)), draw(st.integers(1, 48))
    batch = draw(st.sampled_from([1, 2]))
    pattern = draw(patterns(q_len=q_len, kv_len=kv_len, q_heads=group * kv_heads, kv_heads=kv_heads, batch=batch))
    call: dict[str, object] = {
        "q_len": q_len, "kv_len": kv_len, "q_heads": group * kv_heads, "kv_heads": kv_heads, "batch": batch,
    }  # fmt: skip
    offset = draw(st.sampled_from(["default", "scalar", "tensor"]))
    if offset != "default":
        offsets = draw(st.lists(st.integers(-5, 50), min_size=batch, max_size=batch))
        call["q_offset"] = offsets[0] if offset == "scalar" else torch.tensor(offsets)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch))
        call["kv_lengths"] = torch.tensor(lengths)
    return pattern, call


@given(cases(), TILES, st.booleans())
def test_lowered_pairs_are_the_oracles(
    case: tuple[Pattern, dict[str, object]], tile: tuple[int, int], pack: bool
) -> None:
    pattern, call = case
    q_heads, kv_heads = call["q_heads"], call["kv_heads"]
    packed = pack and q_heads != kv_heads and not _query_head_matters(repr(pattern), q_heads, kv_heads)  # type: ignore[arg-type]
    found = lowered_pairs(pattern, block_m=tile[0], block_n=tile[1], packed=packed, **call)  # type: ignore[arg-type]
    wanted = pattern.mask(**call)  # type: ignore[arg-type]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("order", ["q", "k"])
def test_one_axis_has_one_order(order: str) -> None:
    twice = sp.permuted(sp.permuted(sp.causal(), **{order: torch.arange(8)}), **{order: torch.arange(8)})
    with pytest.raises(UnsupportedError, match="permutation of a permutation"):
        lowered_pairs(twice, 8, 8)
