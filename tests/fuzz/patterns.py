"""Random patterns: every constructor, with data that fit a call, combined with each other.

All draws come from a `random.Random`, so they serve hypothesis (`st.randoms()`) and seeded campaigns alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

import spgen as sp
from spgen.patterns import Pattern
from tests.fuzz import data
from tests.fuzz.data import Call

SIZES = (1, 2, 3, 4, 5, 8, 16, 16, 32, 64)
_SMALL = SIZES[:7]

_PREDICATES: tuple[Callable[[int, int], Pattern], ...] = (
    lambda m, n: sp.where(lambda i, j: (i - j) % m < n),
    lambda m, n: sp.where(lambda i, j: (i // m == j // m) | (j % (n + 1) == 0)),
    lambda m, n: sp.where(lambda i, j: abs(i - j) < m * n),
    lambda m, n: sp.where(lambda b, h, i, j: (i + j * m + h + b) % (n + 2) != 0),
    lambda m, n: sp.where(lambda b, h, i, j: sp.select(h % 2 == 0, i, j) >> 1 < m + n),
    lambda m, n: sp.where(lambda i, j: sp.minimum(i, j * 2) - sp.maximum(j, m) <= n),
    lambda m, n: sp.where(lambda i, j: ((i ^ j) & m) == 0),
)


@dataclass(frozen=True)
class Draw:
    """Draws patterns for calls of one size.

    The flags leave out leaves with data, per-head mixtures, permutations and covers; inside these three stand simple
    patterns (no mixture of mixtures). All of them are combined, with about `max_leaves` parts.
    """

    rng: Random
    call: Call
    data: bool = True
    mixed: bool = True
    permuted: bool = True
    covered: bool = True
    max_leaves: int = 4

    def pattern(self) -> Pattern:
        """Any pattern."""
        kinds: list[Callable[[], Pattern]] = [self.leaf, self.leaf, self.leaf]
        if self.mixed:
            kinds.append(self._mixture)
        if self.permuted and self.data:
            kinds.append(self._permuted)
        if self.covered:
            kinds.append(self._cover)
        return self.algebra(lambda: self.rng.choice(kinds)(), self.max_leaves)

    def algebra(self, leaf: Callable[[], Pattern], max_leaves: int) -> Pattern:
        """Unions, intersections, differences and complements of leaves."""
        leaves = self.rng.randint(1, max_leaves)
        if leaves == 1:
            found = leaf()
            return ~found if self.rng.randint(0, 9) == 9 else found
        left = self.rng.randint(1, leaves - 1)
        p, q = self.algebra(leaf, left), self.algebra(leaf, leaves - left)
        kind = self.rng.choice(["and", "or", "and", "or", "minus", "not"])
        if kind == "not":
            return ~(p & q)
        return p & q if kind == "and" else p | q if kind == "or" else p - q

    def leaf(self) -> Pattern:
        """A constructor without operands."""
        return self._with_data() if self.data and self.rng.randint(0, 1) else self.closed_form()

    def closed_form(self) -> Pattern:
        """A leaf without data."""
        rng, reach = self.rng, max(self.call.q_len, self.call.kv_len) + 4
        kind = rng.choice(["causal", "sink", "window", "dense", "stripe", "predicate", "window", "causal"])
        if kind == "sink":
            return sp.sink(rng.randint(0, reach))
        if kind == "window":
            return sp.window(rng.randint(0, reach), rng.randint(0, reach) if rng.randint(0, 1) else 0)
        if kind == "stripe":
            cols, relative = rng.choice(SIZES), bool(rng.randint(0, 1))
            return sp.stripe(
                rng.randint(1, 9), rng.randint(1, 4), rng.randint(-5, 9), cols, relative, rng.randint(-2, 3)
            )
        if kind == "predicate":
            return rng.choice(_PREDICATES)(rng.randint(1, 7), rng.randint(1, 7))
        return sp.causal() if kind == "causal" else sp.dense()

    def _with_data(self) -> Pattern:
        rng, call = self.rng, self.call
        kind = rng.choice(["columns", "diagonals", "block", "block", "vertical_slash", "documents", "n_of_m"])
        if kind == "block":
            return self._block()
        if kind == "documents":
            return sp.documents(data.boundaries(rng, call, data.integer_dtype(rng)))
        if kind == "n_of_m":
            shape = (*data.leading(rng, call), call.q_len, call.kv_len)
            return sp.n_of_m(4, 4, mask=data.random_mask(rng, shape, self._mask_dtype()))
        if kind == "columns":
            return sp.columns(self._list(-2))
        if kind == "diagonals":
            return sp.diagonals(self._list(-4))
        return sp.vertical_slash(self._list(-2), self._list(-4))

    def _list(self, low: int) -> torch.Tensor:
        rng, call = self.rng, self.call
        return data.random_list(rng, data.leading(rng, call), call.kv_len, low, data.integer_dtype(rng))

    def _mask_dtype(self) -> torch.dtype:
        return self.rng.choice([torch.bool, torch.uint8])

    def _block(self) -> Pattern:
        rng, call = self.rng, self.call
        form = rng.choice(["mask", "lists", "csr", "top_k", "top_k"])
        tokens = form == "top_k" and rng.randint(0, 1)  # each row has its own list, of single keys
        rows, cols = (1, 1) if tokens else (rng.choice(SIZES), rng.choice(SIZES))
        tiles = -(-call.q_len // rows), -(-call.kv_len // cols)
        shape = data.leading(rng, call)
        if form == "mask":
            return sp.block(rows, cols, mask=data.random_mask(rng, (*shape, *tiles), self._mask_dtype()))
        dtype = data.integer_dtype(rng)
        if form == "csr":
            indptr = data.row_pointers(rng, shape, tiles[0], dtype)
            return sp.block(rows, cols, indptr=indptr, indices=data.csr_indices(rng, shape, tiles, dtype))
        lists = data.random_list(rng, (*shape, tiles[0]), tiles[1], -2, dtype)
        return sp.block(rows, cols, indices=lists) if form == "lists" else sp.top_k(lists, rows, cols)

    def simple(self) -> Pattern:
        """What may stand inside a mixture, a permutation or a cover."""
        return self.algebra(self.leaf, 3)

    def _mixture(self) -> Pattern:
        heads = self.rng.choice(sorted({self.call.q_heads, self.call.kv_heads}))
        kinds = [self.simple() for _ in range(self.rng.randint(1, 3))]
        return sp.per_head([kinds[head * len(kinds) // heads] for head in range(heads)])

    def _permuted(self) -> Pattern:
        rng, call = self.rng, self.call
        axes = rng.choice(["k", "q", "both"])
        q = k = None
        if axes != "k":
            heads = rng.choice(sorted({1, call.kv_heads, call.q_heads}))
            shape = data.leading(rng, call) if call.rows is None else (call.batch, heads)
            q = data.order_of_rows(rng, shape, call, data.integer_dtype(rng))
        if axes != "q":
            k = data.random_order(rng, data.leading(rng, call), call.kv_len, data.integer_dtype(rng))
        return sp.permuted(self.simple(), q=q, k=k)

    def _cover(self) -> Pattern:
        return sp.cover(self.simple(), self.rng.choice(_SMALL), self.rng.choice(_SMALL))
