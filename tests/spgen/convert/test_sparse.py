"""Sparse tensors become patterns of what they store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spgen as sp
from spgen.errors import DtypeError, ShapeError
from spgen.reference import attention as oracle

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse .* tensor support is in beta state", "ignore:Sparse invariant checks are implicitly disabled"
)


def stored(seed: int, lead: tuple[int, ...], rows: int, cols: int, size: tuple[int, int] = (1, 1)) -> Tensor:
    """A mask [*lead, rows, cols] of blocks, as many in each of `lead`, as torch wants it for compressed batches."""
    tiles = rows // size[0], cols // size[1]
    noise = torch.rand((*lead, tiles[0] * tiles[1]), generator=torch.Generator().manual_seed(seed))
    kept = noise.argsort(-1) < tiles[0] * tiles[1] // 3
    return kept.unflatten(-1, tiles).repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)


def held(pattern: sp.Pattern, lead: tuple[int, ...], rows: int, cols: int) -> Tensor:
    batch, heads = (1, 1, *lead)[-2:]
    return pattern.mask(rows, cols, q_heads=heads, batch=batch).reshape(*lead, rows, cols)


LEADS = [(), (3,), (2, 3), (1, 2)]


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_compressed_rows(lead: tuple[int, ...], index: torch.dtype) -> None:
    mask = stored(0, lead, 12, 20)
    csr = mask.float().to_sparse_csr()
    csr = torch.sparse_csr_tensor(csr.crow_indices().to(index), csr.col_indices().to(index), csr.values(), csr.shape)
    found = sp.from_sparse(csr)
    assert torch.equal(held(found, lead, 12, 20), mask)
    assert found.data[0].data_ptr() == csr.col_indices().data_ptr()


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("size", [(4, 4), (2, 8), (16, 16)])
def test_compressed_blocks(lead: tuple[int, ...], size: tuple[int, int]) -> None:
    mask = stored(1, lead, 48, 64, size)
    found = sp.from_sparse(mask.float().to_sparse_bsr(size))
    assert torch.equal(held(found, lead, 48, 64), mask)
    assert (found.node["rows"], found.node["cols"]) == size


@settings(max_examples=40)
@given(
    st.integers(0, 2**16), st.sampled_from(LEADS), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 0.3, 1])
)
def test_coordinates(seed: int, lead: tuple[int, ...], rows: int, cols: int, density: float) -> None:
    mask = torch.rand((*lead, rows, cols), generator=torch.Generator().manual_seed(seed)) < density
    coo = mask.to_sparse()
    twice = torch.sparse_coo_tensor(
        coo.indices().repeat(1, 2).flip(1), torch.ones(2 * coo.indices().shape[1]), coo.shape
    )
    assert torch.equal(held(sp.from_sparse(twice), lead, rows, cols), mask)


def test_stored_zeros_count() -> None:
    tensor = torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([0.0, 5.0]), (2, 2))
    assert sp.from_sparse(tensor).mask(2)[0, 0].tolist() == [[False, True], [True, False]]


def test_attention_over_blocks() -> None:
    pytest.importorskip("tvm_ffi")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 96, 32) for _ in range(3))
    mask = stored(2, (2, 3), 96, 96, (16, 16))
    out = sp.attention(sp.causal() & sp.from_sparse(mask.float().to_sparse_bsr((16, 16))))(q, k, v)
    wanted = oracle(q, k, v, mask & sp.causal().mask(96))
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-4)


SQUARE = torch.ones(4, 4)
MISTAKES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("list", lambda: sp.from_sparse([[1]]), DtypeError, "tensor: got list"),  # type: ignore[arg-type]
    ("dense", lambda: sp.from_sparse(SQUARE), DtypeError, r"got torch.strided\n.*\n.*from_mask"),
    ("columns", lambda: sp.from_sparse(SQUARE.to_sparse_csc()), DtypeError, r"torch.sparse_csc\n.*\n.*to_sparse_csr"),
    ("rank", lambda: sp.from_sparse(SQUARE[0].to_sparse()), ShapeError, r"got shape \[4\]"),
    ("dense axes", lambda: sp.from_sparse(SQUARE.to_sparse(1)), ShapeError, "1 dense axes"),
]


@pytest.mark.parametrize(("mistake", "error", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_explained(mistake: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mistake()
