"""Random patterns for hypothesis: every constructor, with data that fit a call, combined with each other.

    @given(patterns(q_len=40, kv_len=56, q_heads=4, kv_heads=2, batch=2))
    def test_kernel_agrees_with_the_oracle(pattern): ...

Data hold what users' data hold: -1, repeats, any order, indices beyond the end; tensors with and without the batch and
heads axes. Permutations are valid. Examples shrink towards closed forms, and data towards zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

import spgen as sp
from spgen.patterns import Pattern

SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
DTYPES = st.sampled_from([torch.int32, torch.int64])


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


@dataclass(frozen=True)
class Call:
    """The sizes of one call, and strategies of tensors that fit it."""

    q_len: int
    kv_len: int
    q_heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    rows: tuple[int, ...] | None = None  # of each sequence, if they differ

    @property
    def leading(self) -> st.SearchStrategy[tuple[int, ...]]:
        """The axes before a tensor's own: none, heads, or batch and heads."""
        heads = sorted({1, self.kv_heads, self.q_heads})
        forms: list[tuple[int, ...]] = [(), *((h,) for h in heads)]
        forms += [(b, h) for b in sorted({1, self.batch}) for h in heads]
        return st.sampled_from(forms)

    @property
    def generators(self) -> st.SearchStrategy[torch.Generator]:
        return st.integers(0, 2**16).map(lambda seed: torch.Generator().manual_seed(seed))

    @st.composite
    @staticmethod
    def _masks(draw: st.DrawFn, call: Call, rows: int, cols: int) -> Tensor:
        shape = (*draw(call.leading), rows, cols)
        density = draw(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
        mask = torch.rand(shape, generator=draw(call.generators)) < density
        return mask if draw(st.booleans()) else mask.to(torch.uint8)

    def masks(self, rows: int, cols: int) -> st.SearchStrategy[Tensor]:
        """Masks [..., rows, cols]."""
        return Call._masks(self, rows, cols)

    @st.composite
    @staticmethod
    def _lists(draw: st.DrawFn, call: Call, rows: tuple[int, ...], low: int, high: int) -> Tensor:
        count = draw(st.integers(0, 6))
        shape = (*draw(call.leading), *rows, count)
        # a little beyond both ends: what is out of range is ignored
        numbers = torch.randint(low, max(high, low) + 2, shape, generator=draw(call.generators))
        return numbers.to(draw(DTYPES))

    def lists(self, *rows: int, high: int, low: int = -2) -> st.SearchStrategy[Tensor]:
        """Lists [..., *rows, K] of integers from `low` to a little beyond `high`, with repeats, in any order."""
        return Call._lists(self, rows, low, high)

    @st.composite
    @staticmethod
    def _csr(draw: st.DrawFn, call: Call, tiles: int, high: int) -> tuple[Tensor, Tensor]:
        leading = draw(call.leading)
        counts = torch.randint(0, 4, (*leading, tiles), generator=draw(call.generators))
        indptr = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
        entries = int(indptr.max()) + draw(st.integers(0, 2))
        indices = torch.randint(-1, high + 2, (*leading, entries), generator=draw(call.generators))
        dtype = draw(DTYPES)
        return indptr.to(dtype), indices.to(dtype)

    def csr(self, tiles: int, high: int) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
        """(indptr [..., tiles + 1], indices [..., NNZ])."""
        return Call._csr(self, tiles, high)

    @st.composite
    @staticmethod
    def _orders(draw: st.DrawFn, call: Call, length: int) -> Tensor:
        keys = torch.rand((*draw(call.leading), length), generator=draw(call.generators))
        return keys.argsort(-1).to(draw(DTYPES))

    def orders(self, length: int) -> st.SearchStrategy[Tensor]:
        """Permutations [..., length]."""
        return Call._orders(self, length)

    @st.composite
    @staticmethod
    def _orders_of_rows(draw: st.DrawFn, call: Call, rows: tuple[int, ...]) -> Tensor:
        heads = draw(st.sampled_from(sorted({1, call.kv_heads, call.q_heads})))
        keys = torch.rand((call.batch, heads, call.q_len), generator=draw(call.generators))
        behind = torch.arange(call.q_len) >= torch.tensor(rows)[:, None, None]
        return (keys + 2 * behind).argsort(-1).to(draw(DTYPES))

    @property
    def orders_of_rows(self) -> st.SearchStrategy[Tensor]:
        """Permutations of each sequence's rows."""
        return self.orders(self.q_len) if self.rows is None else Call._orders_of_rows(self, self.rows)

    def boundaries(self) -> st.SearchStrategy[Tensor]:
        """cu_seqlens; some documents are empty, some positions belong to none."""
        numbers = st.lists(st.integers(0, self.kv_len), min_size=1, max_size=6).map(sorted)
        return st.builds(lambda values, dtype: torch.tensor(values, dtype=dtype), numbers, DTYPES)


def predicates() -> st.SearchStrategy[Pattern]:
    """Patterns from `where`."""
    small = st.integers(1, 7)
    forms = [
        lambda m, n: sp.where(lambda i, j: (i - j) % m < n),
        lambda m, n: sp.where(lambda i, j: (i // m == j // m) | (j % (n + 1) == 0)),
        lambda m, n: sp.where(lambda i, j: abs(i - j) < m * n),
        lambda m, n: sp.where(lambda b, h, i, j: (i + j * m + h + b) % (n + 2) != 0),
        lambda m, n: sp.where(lambda b, h, i, j: sp.select(h % 2 == 0, i, j) >> 1 < m + n),
        lambda m, n: sp.where(lambda i, j: sp.minimum(i, j * 2) - sp.maximum(j, m) <= n),
        lambda m, n: sp.where(lambda i, j: ((i ^ j) & m) == 0),
    ]
    return st.builds(lambda form, m, n: form(m, n), st.sampled_from(forms), small, small)


def closed_forms(call: Call) -> st.SearchStrategy[Pattern]:
    """Leaves without data."""
    reach = st.integers(0, max(call.q_len, call.kv_len) + 4)
    stripes = st.builds(
        sp.stripe, st.integers(1, 9), st.integers(1, 4), st.integers(-5, 9), SIZES, st.booleans(), st.integers(-2, 3)
    )
    simple = st.one_of(st.just(sp.causal()), reach.map(sp.sink), st.builds(sp.window, reach, reach))
    return st.one_of(simple, st.just(sp.dense()), stripes, predicates())


@st.composite
def _blocks(draw: st.DrawFn, call: Call) -> Pattern:
    rows, cols = draw(SIZES), draw(SIZES)
    row_tiles, col_tiles = _tiles(call.q_len, rows), _tiles(call.kv_len, cols)
    form = draw(st.sampled_from(["mask", "lists", "csr", "top_k"]))
    if form == "mask":
        return sp.block(rows, cols, mask=draw(call.masks(row_tiles, col_tiles)))
    if form == "csr":
        indptr, indices = draw(call.csr(row_tiles, col_tiles))
        return sp.block(rows, cols, indptr=indptr, indices=indices)
    lists = draw(call.lists(row_tiles, high=col_tiles))
    return sp.block(rows, cols, indices=lists) if form == "lists" else sp.top_k(lists, rows, cols)


def with_data(call: Call) -> st.SearchStrategy[Pattern]:
    """Leaves with data."""
    columns = call.lists(high=call.kv_len)
    offsets = call.lists(low=-4, high=call.kv_len)
    return st.one_of(
        columns.map(sp.columns),
        offsets.map(sp.diagonals),
        _blocks(call),
        st.builds(sp.vertical_slash, columns, offsets),
        call.boundaries().map(sp.documents),
        call.masks(call.q_len, call.kv_len).map(lambda mask: sp.n_of_m(4, 4, mask=mask)),
    )


def algebra(leaves: st.SearchStrategy[Pattern], max_leaves: int = 4) -> st.SearchStrategy[Pattern]:
    """Unions, intersections, differences and complements of `leaves`."""

    def extend(parts: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
        both = st.builds(lambda p, q: p & q, parts, parts)
        either = st.builds(lambda p, q: p | q, parts, parts)
        return st.one_of(
            both, either, both, either, st.builds(lambda p, q: p - q, parts, parts), parts.map(lambda p: ~p)
        )

    return st.recursive(leaves, extend, max_leaves=max_leaves)


def mixtures(call: Call, parts: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """per_head over the query heads or the key heads, with heads that share a pattern."""
    count = st.sampled_from(sorted({call.q_heads, call.kv_heads}))
    few = st.lists(parts, min_size=1, max_size=3)

    def spread(heads: int, kinds: list[Pattern]) -> Pattern:
        return sp.per_head([kinds[head * len(kinds) // heads] for head in range(heads)])

    return st.builds(spread, count, few)


@st.composite
def _permuted(draw: st.DrawFn, call: Call, parts: st.SearchStrategy[Pattern]) -> Pattern:
    axes = draw(st.sampled_from(["k", "q", "both"]))
    q = draw(call.orders_of_rows) if axes != "k" else None
    k = draw(call.orders(call.kv_len)) if axes != "q" else None
    return sp.permuted(draw(parts), q=q, k=k)


@cache  # building a strategy costs more than drawing from it
def patterns(
    q_len: int,
    kv_len: int,
    q_heads: int = 1,
    kv_heads: int = 1,
    batch: int = 1,
    *,
    data: bool = True,
    mixed: bool = True,
    permuted: bool = True,
    covered: bool = True,
    max_leaves: int = 4,
    rows: tuple[int, ...] | None = None,
) -> st.SearchStrategy[Pattern]:
    """Bound patterns that fit a call of these sizes.

    The flags leave out leaves with data, per-head mixtures, permutations and covers. Inside these three stand simple
    patterns (no mixture of mixtures); all of them are then combined, with about `max_leaves` parts. `rows` are those of
    each sequence of a packed batch, whose longest has `q_len`.
    """
    call = Call(q_len, kv_len, q_heads, kv_heads, batch, rows)
    leaves = st.one_of(closed_forms(call), with_data(call)) if data else closed_forms(call)
    simple = algebra(leaves, 3)
    parts = [leaves, leaves]
    if mixed:
        parts.append(mixtures(call, simple))
    if permuted and data:
        parts.append(_permuted(call, simple))
    if covered:
        parts.append(st.builds(sp.cover, simple, SIZES, SIZES))
    return algebra(st.one_of(parts), max_leaves)


def calls() -> st.SearchStrategy[Call]:
    """Sizes of small calls: lengths that divide nothing, more rows than keys and fewer, any ratio of heads."""
    return st.sampled_from(
        [
            Call(1, 1), Call(5, 5), Call(12, 12), Call(4, 11), Call(11, 4, 2, 1), Call(1, 13, 4, 2), Call(9, 9, 2, 2),
            Call(8, 16, 3, 1, 2), Call(7, 10, 4, 2, 2), Call(13, 6, 2, 1, 3), Call(16, 16, 6, 3, 1),
        ]
    )  # fmt: skip


def patterns_of(call: Call, **flags: int) -> st.SearchStrategy[Pattern]:
    """`patterns` for a call."""
    return patterns(call.q_len, call.kv_len, call.q_heads, call.kv_heads, call.batch, **flags)


def mask_of(pattern: Pattern, call: Call) -> Tensor:
    """The oracle's mask for a call."""
    return pattern.mask(call.q_len, call.kv_len, q_heads=call.q_heads, kv_heads=call.kv_heads, batch=call.batch)
