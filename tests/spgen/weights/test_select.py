"""What patterns hold of weights, and how it is stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import spgen as sp
from spgen.errors import DataError, PatternError, ShapeError, UnsupportedError
from spgen.reference import mask
from spgen.weights.select import layout_of, resolved, stored


def weight(n: int = 70, k: int = 100) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3))


def test_blocks_with_the_largest_norms() -> None:
    w = torch.ones(4, 6)
    w[2:, 2:4], w[:2, 4:] = -3, 2
    found = resolved(sp.block(2, density=1 / 3), w)
    assert mask(found, 4, 6, q_offset=0)[0, 0].nonzero().tolist() == [
        [0, 4],
        [0, 5],
        [1, 4],
        [1, 5],
        [2, 2],
        [2, 3],
        [3, 2],
        [3, 3],
    ]


def test_ties_go_to_the_lower_index_and_one_block_always_stays() -> None:
    found = resolved(sp.block(2, density=0.01), torch.ones(4, 4))
    assert mask(found, 4, 4, q_offset=0)[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_n_of_m_keeps_the_largest_of_each_group() -> None:
    w = torch.tensor([[1.0, -5, 2, 3, 0, 0, 0, 1, 7, 6]])
    found = resolved(sp.n_of_m(2, 4), w)
    assert mask(found, 1, 10, q_offset=0)[0, 0, 0].nonzero().flatten().tolist() == [1, 3, 4, 7, 8, 9]


def test_wanda_weighs_by_the_inputs() -> None:
    w = torch.tensor([[3.0, 2, 1, 1]])
    inputs = torch.tensor([1.0, 1, 10, 5])
    found = resolved(sp.n_of_m(2, 4, scores=sp.wanda()), w, inputs)
    assert mask(found, 1, 4, q_offset=0)[0, 0, 0].tolist() == [False, False, True, True]


def test_columns_for_every_few_rows() -> None:
    found = resolved(sp.top_k(3, rows=8, cols=4), weight())
    kept = mask(found, 70, 100, q_offset=0)[0, 0]
    assert kept.sum(1).eq(12).all()


def test_among_others() -> None:
    found = resolved(sp.n_of_m(2, 4, among=sp.stripe(2)), weight())
    kept = mask(found, 70, 100, q_offset=0)[0, 0]
    assert kept[:, ::2].all()
    assert not kept[:, 1::2].any()


PATTERNS: list[tuple[Callable[[], sp.Pattern], str]] = [
    (lambda: sp.block(16, density=0.3), "blocks(16, 16)"),
    (lambda: sp.block(16, 8, mask=torch.rand(5, 13) < 0.4), "blocks(16, 8)"),
    (lambda: sp.n_of_m(2, 4), "n_of_m(2, 4)"),
    (lambda: sp.top_k(4, rows=32), "blocks(32, 1)"),
    (lambda: sp.block(32, density=0.3) & sp.n_of_m(2, 4), "n_of_m(2, 4)"),
    (lambda: sp.block(32, density=0.1) | sp.block(16, density=0.1), "blocks(16, 16)"),
    (lambda: sp.cover(sp.window(8, 8), 8, 8), "blocks(8, 8)"),
    (lambda: sp.where(lambda i, j: (i + j) % 7 == 0), "bitmap()"),
    (lambda: sp.window(3, 3) | sp.stripe(16), "bitmap()"),
    (lambda: sp.dense(), "blocks(16, 16)"),
    (lambda: sp.dense() - sp.block(16, density=0.5), "blocks(16, 16)"),
]


@pytest.mark.parametrize(
    ("make", "layout"), PATTERNS, ids=[layout + str(at) for at, (_, layout) in enumerate(PATTERNS)]
)
def test_every_pattern_has_a_storage(make: Callable[[], sp.Pattern], layout: str) -> None:
    torch.manual_seed(0)
    w, pattern = weight(), make()
    found = stored(w, pattern)
    kept = mask(resolved(pattern, w), 70, 100, q_offset=0)[0, 0]
    assert str(found.layout) == layout
    assert torch.equal(found.dense(), w.masked_fill(~kept, 0))


def test_layouts_are_read_from_structure() -> None:
    assert layout_of(sp.causal().node) is None
    assert str(layout_of((sp.block(32, density=0.5) & sp.causal()).node)) == "blocks(32, 32)"


def test_mistakes_are_explained() -> None:
    w = weight()
    with pytest.raises(UnsupportedError, match=r"scores=pooled.*does not rank weights"):
        stored(w, sp.block(16, density=0.1, scores=sp.pooled()))
    with pytest.raises(UnsupportedError, match="no inputs"):
        stored(w, sp.n_of_m(2, 4, scores=sp.wanda()))
    with pytest.raises(UnsupportedError, match="a selection inside cover"):
        stored(w, sp.cover(sp.block(16, density=0.1), 32, 32))
    with pytest.raises(PatternError, match="weights have no heads"):
        stored(w, sp.per_head([sp.dense()]))
    with pytest.raises(ShapeError, match=r"block: mask: got shape \[2, 2\]"):
        stored(w, sp.block(16, mask=torch.ones(2, 2, dtype=torch.bool)))
    with pytest.raises(DataError, match=r"w\[0, 1\]: got .* outside the pattern"):
        stored(w, sp.stripe(2), strict="w")
    with pytest.raises(UnsupportedError, match="a selection by the size of weights"):
        sp.attention(sp.block(16, density=0.1))(*(torch.zeros(1, 1, 16, 16) for _ in range(3)))
