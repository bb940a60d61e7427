"""Dense masks become patterns that hold the same pairs: closed forms where they are such, else blocks, else pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spgen as sp
from spgen.errors import DataError, DtypeError, ShapeError
from spgen.patterns import Pattern
from spgen.reference import attention as oracle
from tests.fuzz.data import Call as Sizes
from tests.strategies import closed_forms

CLOSED = [
    sp.dense(),
    ~sp.dense(),
    sp.causal(),
    sp.sink(9),
    sp.causal() & sp.window(12),
    sp.causal() & (sp.sink(3) | sp.window(12)),
    sp.causal() | sp.sink(17),
    sp.window(5, 4),
    sp.window(7, 3) | sp.sink(2),
    sp.where(lambda i, j: j <= i + 6),
    sp.where(lambda i, j: j <= i - 6),
    sp.where(lambda i, j: (j <= i - 3) & (i - 9 < j)),
]


def held(pattern: Pattern, mask: Tensor) -> Tensor:
    lead = (1, 1, *mask.shape[:-2])[-2:]
    return pattern.mask(*mask.shape[-2:], q_heads=lead[1], batch=lead[0])


@pytest.mark.parametrize("pattern", CLOSED, ids=repr)
@pytest.mark.parametrize("lengths", [(40, 40), (25, 40), (40, 25)])
def test_closed_forms_are_found(pattern: Pattern, lengths: tuple[int, int]) -> None:
    mask = pattern.mask(*lengths)
    found = sp.from_mask(mask[0, 0])
    assert torch.equal(held(found, mask), mask)
    assert not found.data


@pytest.mark.parametrize("pattern", CLOSED[:-3], ids=repr)
def test_they_print_as_what_they_are(pattern: Pattern) -> None:
    assert sp.from_mask(pattern.mask(40)) == pattern


def test_documents_are_found() -> None:
    boundaries = [0, 5, 6, 23, 40]
    for pattern in (sp.documents(boundaries), sp.causal() & sp.documents(boundaries)):
        found = sp.from_mask(pattern.mask(40))
        assert found == pattern
        assert found.data[0].tolist() == boundaries


def test_heads_have_their_own_closed_forms() -> None:
    mixed = sp.per_head([sp.causal(), sp.causal() & sp.window(4), sp.causal(), sp.sink(3)])
    assert sp.from_mask(mixed.mask(30, q_heads=4)) == mixed


def test_equal_heads_and_sequences_are_one() -> None:
    mask = sp.causal().mask(20).expand(3, 4, 20, 20)
    assert sp.from_mask(mask) == sp.causal()
    blocks = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    wide = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3).expand(3, 4, -1, -1)
    assert sp.from_mask(wide).data[0].shape == (1, 1, 3, 3)


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (128, 64), (20, 13), (300, 1)])
@pytest.mark.parametrize("cut", [0, 7])
def test_blocks_are_found_at_their_own_size(size: tuple[int, int], cut: int) -> None:
    rows, cols = size
    blocks = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = blocks.repeat_interleave(rows, 2).repeat_interleave(cols, 3)
    mask = mask[:, :, : mask.shape[2] - cut, : mask.shape[3] - min(cut, cols - 1)]
    found = sp.from_mask(mask)
    assert torch.equal(held(found, mask), mask)
    assert found.node["rows"] == rows
    assert found.node["cols"] == cols
    assert torch.equal(found.data[0], blocks)


def test_whole_blocks_are_taken_from_what_is_finer() -> None:
    mask = sp.causal().mask(300)[0, 0] & (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.99)
    mask |= sp.block(64, mask=torch.eye(5, dtype=torch.bool)).mask(300)[0, 0]
    found = sp.from_mask(mask)
    assert repr(found).startswith(("block(64", "block(32", "block(128"))
    assert torch.equal(held(found, mask)[0, 0], mask)
    assert int(found.data[1].sum()) < int(mask.sum()) / 2


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 200), st.integers(1, 200), st.sampled_from([0.02, 0.5, 0.98]))
def test_any_mask(seed: int, rows: int, cols: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [(), (2,), (2, 3), (2, 1)][seed % 4]
    mask = torch.rand((*shape, rows, cols), generator=generator) < density
    mask[..., : rows // 2, : cols // 2] = bool(seed & 16)
    found = sp.from_mask(mask)
    lead = (1, 1, *shape)[-2:]
    assert torch.equal(held(found, mask), mask.expand(*lead, rows, cols))


@settings(max_examples=60)
@given(st.data())
def test_the_mask_of_any_closed_form(data: st.DataObject) -> None:
    call = data.draw(st.sampled_from([Sizes(17, 17), Sizes(9, 21), Sizes(21, 9, 2, 2)]))
    pattern = data.draw(closed_forms(call, 3))
    mask = pattern.mask(call.q_len, call.kv_len, q_heads=call.q_heads)
    assert torch.equal(sp.from_mask(mask).mask(call.q_len, call.kv_len, q_heads=call.q_heads), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lowest", ["-inf", "finfo"])
def test_additive_masks(dtype: torch.dtype, lowest: str) -> None:
    hidden = float(lowest) if lowest == "-inf" else torch.finfo(dtype).min
    mask = torch.zeros(30, 30, dtype=dtype).masked_fill(~sp.causal().mask(30)[0, 0], hidden)
    assert sp.from_mask(mask) == sp.causal()


def test_numbers_of_a_mask() -> None:
    assert sp.from_mask(sp.causal().mask(9).to(torch.uint8)) == sp.causal()


def test_kernels_agree() -> None:
    pytest.importorskip("tvm_ffi")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 150, 32), torch.randn(2, 2, 150, 32), torch.randn(2, 2, 150, 32)
    mask = torch.rand(2, 4, 150, 150) < 0.3
    mask[..., :80, :70] = True
    found = sp.from_mask(mask)
    assert "|" in repr(found)
    torch.testing.assert_close(sp.attention(found)(q, k, v).double(), oracle(q, k, v, mask), atol=1e-5, rtol=1e-4)


SQUARE = torch.ones(4, 4, dtype=torch.bool)
MISTAKES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("list", lambda: sp.from_mask([[1]]), DtypeError, "mask: got list"),  # type: ignore[arg-type]
    ("int", lambda: sp.from_mask(SQUARE.int()), DtypeError, r"int32\n.*\n.*mask != 0"),
    ("complex", lambda: sp.from_mask(SQUARE.cfloat()), DtypeError, "complex64"),
    ("rank", lambda: sp.from_mask(SQUARE[0]), ShapeError, r"got \[4\]"),
    ("empty", lambda: sp.from_mask(SQUARE[:0]), ShapeError, r"got \[0, 4\]"),
    ("bias", lambda: sp.from_mask(torch.eye(4) - 1), DataError, r"mask at \(0, 0, 0, 1\): got -1.0\n.*0 or -inf"),
    ("NaN", lambda: sp.from_mask(torch.full((2, 2), float("nan"))), DataError, "got nan"),
    ("sparse", lambda: sp.from_mask(SQUARE.to_sparse()), DtypeError, "from_sparse"),
]


@pytest.mark.parametrize(("mistake", "error", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_explained(mistake: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mistake()
