"""Random patterns for hypothesis: those of the fuzz campaign (tests/fuzz), made smaller where they fail.

@given(patterns(q_len=40, kv_len=56, q_heads=4, kv_heads=2, batch=2))
def test_kernel_agrees_with_the_oracle(pattern): ...
"""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st
from torch import Tensor

from spgen.patterns import Pattern
from tests.fuzz.data import Call, integer_dtype, leading, random_order
from tests.fuzz.patterns import Draw


def _drawn(call: Call, **flags: int) -> st.SearchStrategy[Pattern]:
    return st.randoms(use_true_random=False).map(lambda rng: Draw(rng, call, **flags).pattern())


@cache  # building a strategy costs more than drawing from it
def patterns(
    q_len: int,
    kv_len: int,
    q_heads: int = 1,
    kv_heads: int = 1,
    batch: int = 1,
    *,
    rows: tuple[int, ...] | None = None,
    **flags: int,
) -> st.SearchStrategy[Pattern]:
    """Bound patterns that fit a call of these sizes; `flags` are those of `Draw`.

    `rows` are those of each sequence of a packed batch, whose longest has `q_len`.
    """
    return _drawn(Call(q_len, kv_len, q_heads, kv_heads, batch, rows), **flags)


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


def closed_forms(call: Call, max_leaves: int = 4) -> st.SearchStrategy[Pattern]:
    """Combinations of leaves without data."""
    return _drawn(call, data=False, mixed=False, covered=False, max_leaves=max_leaves)


def orders(call: Call, length: int) -> st.SearchStrategy[Tensor]:
    """Permutations [..., length]."""
    return st.randoms(use_true_random=False).map(
        lambda rng: random_order(rng, leading(rng, call), length, integer_dtype(rng))
    )


def mask_of(pattern: Pattern, call: Call) -> Tensor:
    """The oracle's mask for a call."""
    return pattern.mask(call.q_len, call.kv_len, q_heads=call.q_heads, kv_heads=call.kv_heads, batch=call.batch)
