"""The oracle against the definitions, spelled out pair by pair in plain Python; attention against torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import spgen as sp
from spgen.errors import PatternError, ShapeError, UnsupportedError
from spgen.patterns import Pattern
from spgen.reference import attention

Holds = Callable[[int, int, int, int, int], bool]  # (b, h, r, i, j)


def check(
    pattern: Pattern, holds: Holds, q_len: int, kv_len: int, heads: int = 1, kv_heads: int = 1, batch: int = 1
) -> None:
    mask = pattern.mask(q_len, kv_len, q_heads=heads, kv_heads=kv_heads, batch=batch)
    assert mask.shape == (batch, heads, q_len, kv_len)
    assert mask.dtype == torch.bool
    for b, h, r, j in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        expected = holds(b, h, r, r + kv_len - q_len, j)
        assert bool(mask[b, h, r, j]) == expected, f"b={b} h={h} r={r} j={j} should be {expected}"


def random(*shape: int, high: int, low: int = -2, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def flips(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize(("q_len", "kv_len"), [(7, 7), (3, 10), (10, 6), (1, 5)])
def test_closed_forms(q_len: int, kv_len: int) -> None:
    for pattern, holds in [
        (sp.dense(), lambda b, h, r, i, j: True),
        (sp.causal(), lambda b, h, r, i, j: j <= i),
        (sp.sink(2), lambda b, h, r, i, j: j < 2),
        (sp.sink(0), lambda b, h, r, i, j: False),
        (sp.window(3), lambda b, h, r, i, j: i - 3 < j <= i),
        (sp.window(2, right=2), lambda b, h, r, i, j: i - 2 < j <= i + 2),
        (sp.window(0), lambda b, h, r, i, j: False),
        (sp.stripe(4), lambda b, h, r, i, j: j % 4 == 0),
        (sp.stripe(4, 2, offset=-3), lambda b, h, r, i, j: (j + 3) % 4 < 2),
        (sp.stripe(3, cols=2), lambda b, h, r, i, j: (j // 2) % 3 == 0),
        (sp.stripe(3, cols=2, relative=True), lambda b, h, r, i, j: (i // 2 - j // 2) % 3 == 0),
        (sp.where(lambda i, j: (i - j) % 3 == i // 2), lambda b, h, r, i, j: (i - j) % 3 == i // 2),
        (sp.where(lambda i, j: True), lambda b, h, r, i, j: True),
        (sp.where(lambda i, j: j != j), lambda b, h, r, i, j: False),
    ]:  # fmt: skip
        check(pattern, holds, q_len, kv_len)


def test_heads_and_sequences_of_closed_forms() -> None:
    check(
        sp.stripe(4, offset=1, shift_per_head=2), lambda b, h, r, i, j: (j - 1 - 2 * h) % 4 < 1, 4, 9, heads=3, batch=2
    )
    check(sp.where(lambda b, h, i, j: j < b + 2 * h), lambda b, h, r, i, j: j < b + 2 * h, 4, 9, heads=3, batch=2)


@pytest.mark.parametrize(("batch", "heads"), [(None, None), *((b, h) for b in (None, 1, 3) for h in (1, 2, 4))])
def test_data_serve_their_heads_and_sequences(batch: int | None, heads: int | None) -> None:
    """Four query heads over two key heads: data of two heads serve groups of two."""
    shape = tuple(n for n in (batch, heads) if n is not None)
    group = {None: 4, 1: 4, 2: 2, 4: 1}[heads]

    def of(tensor: Tensor, own: int, b: int, h: int) -> Tensor:
        full = tensor.reshape((1,) * (2 + own - tensor.dim()) + tuple(tensor.shape))
        return full[b % full.shape[0], h // group]

    sizes = {"q_len": 5, "kv_len": 8, "heads": 4, "kv_heads": 2, "batch": 3}
    index = random(*shape, 4, high=10)
    check(sp.columns(index), lambda b, h, r, i, j: j in of(index, 1, b, h), **sizes)
    check(sp.diagonals(index), lambda b, h, r, i, j: i - j in of(index, 1, b, h), **sizes)
    mask = flips(*shape, 3, 3)
    check(sp.block(2, 3, mask=mask), lambda b, h, r, i, j: bool(of(mask, 2, b, h)[r // 2, j // 3]), **sizes)
    order = torch.rand(*shape, 8, generator=torch.Generator().manual_seed(3)).argsort(-1)
    check(sp.permuted(sp.causal(), k=order), lambda b, h, r, i, j: of(order, 1, b, h).tolist().index(j) <= i, **sizes)


def test_blocks_and_lists() -> None:
    q_len, kv_len = 7, 10
    mask = flips(3, 3).to(torch.uint8)
    check(sp.block(3, 4, mask=mask), lambda b, h, r, i, j: bool(mask[r // 3, j // 4]), q_len, kv_len)
    lists = random(3, 4, high=5)
    check(sp.block(3, 4, indices=lists), lambda b, h, r, i, j: j // 4 in lists[r // 3], q_len, kv_len)
    check(sp.top_k(lists, 3, 4), lambda b, h, r, i, j: j // 4 in lists[r // 3], q_len, kv_len)
    rows = random(7, 4, high=12)
    check(sp.top_k(rows), lambda b, h, r, i, j: j in rows[r], q_len, kv_len)
    indptr, indices = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 1, -1, 0, 7, 2, 2])
    check(
        sp.block(3, 4, indptr=indptr, indices=indices),
        lambda b, h, r, i, j: j // 4 in indices[indptr[r // 3] : indptr[r // 3 + 1]],
        q_len,
        kv_len,
    )
    elements = flips(7, 10)
    check(sp.n_of_m(2, 4, mask=elements), lambda b, h, r, i, j: bool(elements[r, j]), q_len, kv_len)


def test_csr_with_batch_and_heads() -> None:
    indptr = torch.tensor([[0, 1, 3], [0, 0, 2]])
    indices = torch.tensor([[[0, 1, 2], [2, 0, 1]], [[1, 1, 1], [0, 2, 2]]])
    check(
        sp.block(2, indptr=indptr, indices=indices),
        lambda b, h, r, i, j: j // 2 in indices[b, h, indptr[h, r // 2] : indptr[h, r // 2 + 1]],
        4,
        6,
        heads=2,
        kv_heads=2,
        batch=2,
    )


def test_verticals_and_slashes() -> None:
    columns, offsets = torch.tensor([3, -1, 99, 3]), torch.tensor([0, 4, -2, 50])
    check(sp.vertical_slash(columns, offsets), lambda b, h, r, i, j: j == 3 or i - j in (0, 4, -2), 6, 9)
    check(sp.columns([]), lambda b, h, r, i, j: False, 6, 9)
    check(sp.diagonals([]), lambda b, h, r, i, j: False, 6, 9)
    check(sp.diagonals([-1]), lambda b, h, r, i, j: j == i + 1, 6, 9)


def test_documents() -> None:
    documents = [range(2, 5), range(5, 5), range(5, 9)]

    def together(b: int, h: int, r: int, i: int, j: int) -> bool:
        return any(i in document and j in document for document in documents)

    check(sp.documents([2, 5, 5, 9]), together, 11, 11)
    check(sp.documents([2, 5, 5, 9]), together, 4, 11)
    check(sp.documents([4]), lambda b, h, r, i, j: False, 6, 6)


def test_permuted_sees_ranks() -> None:
    """`order` lists originals by rank; closed forms see the rank's position, data the rank."""
    q, k = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 2, 0, 1, 5, 3])
    rank_q, rank_k = q.argsort().tolist(), k.argsort().tolist()
    check(sp.permuted(sp.causal(), q=q), lambda b, h, r, i, j: j <= rank_q[r] + 2, 4, 6)
    check(sp.permuted(sp.causal(), k=k), lambda b, h, r, i, j: rank_k[j] <= i, 4, 6)
    check(sp.permuted(sp.window(2), q=q, k=k), lambda b, h, r, i, j: 0 <= rank_q[r] + 2 - rank_k[j] < 2, 4, 6)
    mask = flips(2, 3)
    check(
        sp.causal() & sp.permuted(sp.block(2, mask=mask), q=q, k=k),
        lambda b, h, r, i, j: j <= i and bool(mask[rank_q[r] // 2, rank_k[j] // 2]),
        4,
        6,
    )


def test_orders_that_are_none_lose_what_they_leave_out() -> None:
    check(sp.permuted(sp.dense(), k=torch.tensor([2, 0, 9, -1])), lambda b, h, r, i, j: j in (0, 2), 3, 4)
    check(sp.permuted(sp.dense(), q=torch.tensor([2, 0, 0])), lambda b, h, r, i, j: r != 1, 3, 4)


def test_per_head() -> None:
    parts = [sp.sink(n) for n in range(4)]
    check(sp.per_head(parts), lambda b, h, r, i, j: j < h, 3, 5, heads=4, kv_heads=2)
    check(sp.per_head(parts[:2]), lambda b, h, r, i, j: j < h // 2, 3, 5, heads=4, kv_heads=2)
    check(
        sp.permuted(sp.per_head(parts[:2]), k=[4, 3, 2, 1, 0]),
        lambda b, h, r, i, j: 4 - j < h // 2,
        3,
        5,
        heads=4,
        kv_heads=2,
    )


def test_cover() -> None:
    check(sp.cover(sp.causal(), 4, 3), lambda b, h, r, i, j: j // 3 * 3 <= i // 4 * 4 + 3, 9, 9)
    # rows 2 and 3 of the last tile lie outside the call: the closed form is looked at there, data are not
    check(sp.cover(sp.causal(), 4, 1), lambda b, h, r, i, j: j <= i // 4 * 4 + 3, 2, 10)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 3] = True
    pairs = sp.n_of_m(10, 10, mask=mask)
    check(sp.cover(pairs, 4, 2), lambda b, h, r, i, j: j // 2 == 1, 2, 10)
    check(sp.cover(~pairs, 4, 1), lambda b, h, r, i, j: True, 2, 10)
    check(sp.cover(~(pairs | ~sp.columns([3])), 4, 1), lambda b, h, r, i, j: j == 3, 2, 10)
    check(sp.cover(~(pairs | ~sp.columns([3])), 1, 1), lambda b, h, r, i, j: j == 3 and r == 1, 2, 10)
    # keys end with the sequence
    mask = sp.cover(sp.window(1), 4, 4).mask(6, 8, batch=2, q_offset=0, kv_lengths=[8, 5])
    assert mask[0, 0, 0].tolist() == [True] * 4 + [False] * 4
    assert mask[:, 0, 5, 4:].tolist() == [[True] * 4, [True, False, False, False]]


def test_positions_and_lengths() -> None:
    lengths = torch.tensor([5, 3, 0])
    mask = sp.causal().mask(2, 6, batch=3, kv_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        for r in range(2):
            assert mask[b, 0, r].tolist() == [j <= r + length - 2 and j < length for j in range(6)]
    mask = (~sp.dense() | sp.window(2)).mask(3, 8, batch=2, q_offset=torch.tensor([4, 1], dtype=torch.int32))
    for b, offset in enumerate((4, 1)):
        for r in range(3):
            assert mask[b, 0, r].tolist() == [r + offset - 2 < j <= r + offset for j in range(8)]
    assert torch.equal(sp.causal().mask(4, q_offset=0), sp.causal().mask(4))


def test_nothing_is_a_mask_too() -> None:
    assert sp.causal().mask(0, 4).shape == (1, 1, 0, 4)
    assert sp.cover(sp.causal(), 4, 4).mask(4, 0).shape == (1, 1, 4, 0)
    assert sp.columns([1, 2]).mask(3, 0).shape == (1, 1, 3, 0)


def test_mask_refuses_what_has_none() -> None:
    with pytest.raises(UnsupportedError, match="remedy"):
        (sp.causal() & sp.top_k(4, scores=sp.pooled())).mask(8)
    with pytest.raises(ShapeError, match="R = 2"):
        sp.block(4, mask=flips(3, 2)).mask(8)
    with pytest.raises(PatternError, match="per_head"):
        sp.per_head([sp.causal()] * 3).mask(8, q_heads=4)
    with pytest.raises(ShapeError, match="kv_heads"):
        sp.causal().mask(8, q_heads=4, kv_heads=3)
    with pytest.raises(ShapeError, match="kv_lengths"):
        sp.causal().mask(8, batch=2, kv_lengths=[1, 2, 3])


def tensors(
    batch: int, q_heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int = 8, value_dim: int = 5
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, q_heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_agrees_with_torch(scale: float | None) -> None:
    q, k, v = tensors(2, 4, 2, 6, 9)
    pattern = sp.causal() & (sp.sink(1) | sp.window(3))
    out, lse = attention(q, k, v, pattern, scale=scale, return_lse=True)
    mask = pattern.mask(6, 9, q_heads=4, kv_heads=2, batch=2)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=scale))
    scores = q @ k.repeat_interleave(2, 1).mT * (scale or 1 / math.sqrt(8))
    torch.testing.assert_close(lse, scores.masked_fill(~mask, -math.inf).logsumexp(-1))
    torch.testing.assert_close(attention(q, k, v, mask, scale=scale), out)


def test_attention_computes_in_float64_whatever_it_gets() -> None:
    q, k, v = tensors(1, 2, 2, 4, 4)
    halves = [x.half() for x in (q, k, v)]
    out = attention(*halves, sp.causal())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, attention(*(x.double() for x in halves), sp.causal()))
    assert attention(*halves, sp.causal(), dtype=torch.float32).dtype == torch.float32


def test_empty_rows_give_zero_and_minus_infinity() -> None:
    q, k, v = tensors(1, 1, 1, 6, 4)
    out, lse = attention(q, k, v, sp.causal(), return_lse=True)
    assert bool((out[..., :2, :] == 0).all())
    assert bool((lse[..., :2] == -math.inf).all())
    assert bool(out.isfinite().all())
    out, lse = attention(q, k[:, :, :0], v[:, :, :0], sp.dense(), return_lse=True)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_keys_outside_the_pattern_never_contribute(poison: float) -> None:
    q, k, v = tensors(1, 2, 1, 5, 8)
    clean = attention(q, k, v, sp.window(2), kv_lengths=torch.tensor([6]))
    for x in (k, v):
        x[:, :, 6:] = poison
    torch.testing.assert_close(attention(q, k, v, sp.window(2), kv_lengths=torch.tensor([6])), clean)


def test_nan_in_a_row_or_a_used_key_stays_where_it_belongs() -> None:
    q, k, v = tensors(1, 1, 1, 5, 5)
    q[0, 0, 2] = math.nan
    bad = attention(q, k, v, sp.causal()).isnan().all(-1)[0, 0]
    assert bad.tolist() == [False, False, True, False, False]
    q, k, v = tensors(1, 1, 1, 5, 5)
    v[0, 0, 2] = math.nan
    bad = attention(q, k, v, sp.window(2)).isnan().all(-1)[0, 0]
    assert bad.tolist() == [False, False, True, True, False]
