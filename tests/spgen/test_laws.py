"""The algebra of patterns, on their masks: what holds of sets holds of patterns, for all data."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import spgen as sp
from spgen.patterns import Pattern
from tests.fuzz.data import Call
from tests.strategies import calls, mask_of, orders, patterns_of

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw: st.DrawFn, count: int, **flags: int) -> tuple[Call, tuple[Pattern, ...]]:
    call = draw(calls())
    return call, tuple(draw(patterns_of(call, max_leaves=2, **flags)) for _ in range(count))


def same(call: Call, *patterns: Pattern) -> bool:
    masks = [mask_of(p, call) for p in patterns]
    return all(torch.equal(masks[0], mask) for mask in masks)


@FEW
@given(cases(3))
def test_unions_and_intersections(case: tuple[Call, tuple[Pattern, ...]]) -> None:
    call, (p, q, r) = case
    a, b, c = (mask_of(x, call) for x in (p, q, r))
    assert torch.equal(mask_of(p | q, call), a | b)
    assert torch.equal(mask_of(p & q, call), a & b)
    assert torch.equal(mask_of(p - q, call), a & ~b)
    assert torch.equal(mask_of(~p, call), ~a)
    assert torch.equal(mask_of((p | q) & r, call), (a | b) & c)
    assert same(call, p | (q | r), (p | q) | r)
    assert same(call, p & (q & r), (p & q) & r)
    assert same(call, p | q, q | p)
    assert same(call, p & q, q & p)
    assert same(call, p & (q | r), (p & q) | (p & r))


@FEW
@given(cases(2))
def test_absorption_and_de_morgan(case: tuple[Call, tuple[Pattern, ...]]) -> None:
    call, (p, q) = case
    assert same(call, p, p | (p & q), p & (p | q), p | p, p & p, ~~p)
    assert same(call, ~(p | q), ~p & ~q)
    assert same(call, ~(p & q), ~p | ~q)
    assert same(call, p - q, p & ~q, ~(~p | q))


@FEW
@given(cases(2, covered=False), st.integers(1, 6), st.integers(1, 6))
def test_cover(case: tuple[Call, tuple[Pattern, ...]], rows: int, cols: int) -> None:
    call, (p, q) = case
    covered = sp.cover(p, rows, cols)
    assert not bool((mask_of(p, call) & ~mask_of(covered, call)).any())
    assert same(call, covered, sp.cover(covered, rows, cols))
    assert same(call, sp.cover(p | q, rows, cols), covered | sp.cover(q, rows, cols))
    assert same(call, p, sp.cover(p, 1, 1))
    assert whole_tiles(mask_of(covered, call), call, rows, cols)


def whole_tiles(mask: Tensor, call: Call, rows: int, cols: int) -> bool:
    """Whether rows and keys of one tile agree."""
    i = torch.arange(call.q_len) + call.kv_len - call.q_len
    j = torch.arange(call.kv_len)
    neighbours = (i[:, None] // rows == i // rows).float()
    beside = (j[:, None] // cols == j // cols).float()
    counts = neighbours @ mask.float() @ beside
    sizes = neighbours.sum(1)[:, None] * beside.sum(1)
    return bool(((counts == 0) | (counts == sizes)).all())


@FEW
@given(cases(1))
def test_identity_permutation(case: tuple[Call, tuple[Pattern, ...]]) -> None:
    call, (p,) = case
    rows, keys = torch.arange(call.q_len), torch.arange(call.kv_len)
    assert same(call, p, sp.permuted(p, q=rows), sp.permuted(p, k=keys), sp.permuted(p, q=rows, k=keys))


@FEW
@given(st.data())
def test_permutations_compose_and_distribute(data: st.DataObject) -> None:
    call = data.draw(calls())
    p, q = (data.draw(patterns_of(call, max_leaves=2, covered=False)) for _ in range(2))
    order = data.draw(orders(call, call.kv_len))
    inverse = order.argsort(-1)
    assert same(call, p, sp.permuted(sp.permuted(p, k=order), k=inverse))
    assert same(call, sp.permuted(p & ~q, k=order), sp.permuted(p, k=order) & ~sp.permuted(q, k=order))
    rows = data.draw(orders(call, call.q_len))
    assert same(call, sp.permuted(p, q=rows, k=order), sp.permuted(sp.permuted(p, k=order), q=rows))


@FEW
@given(cases(1))
def test_a_mixture_of_one_kind_is_that_kind(case: tuple[Call, tuple[Pattern, ...]]) -> None:
    call, (p,) = case
    assert same(call, p, sp.per_head([p] * call.q_heads), sp.per_head([p] * call.kv_heads))


@FEW
@given(st.data(), st.integers(0, 12))
def test_chunks_of_rows_equal_the_whole(data: st.DataObject, cut: int) -> None:
    call = data.draw(calls())
    p = data.draw(patterns_of(call, data=False))
    cut = min(cut, call.q_len)
    first = call.kv_len - call.q_len
    sizes = {"q_heads": call.q_heads, "kv_heads": call.kv_heads, "batch": call.batch}
    chunks = [
        p.mask(rows, call.kv_len, q_offset=first + start, **sizes)
        for start, rows in ((0, cut), (cut, call.q_len - cut))
    ]
    assert torch.equal(torch.cat(chunks, 2), mask_of(p, call))


@FEW
@given(cases(1))
def test_repr_reads_back(case: tuple[Call, tuple[Pattern, ...]]) -> None:
    call, (p,) = case
    back = sp.pattern(repr(p), *p.data)
    assert back == p
    assert hash(back) == hash(p)
    assert back.node is p.node
    assert same(call, p, back)
