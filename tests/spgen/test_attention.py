"""Whole calls on the CPU against the oracle: every kind of pattern, through TVM."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen import reference
from tests.agreement import assert_agrees
from tests.kinds import KINDS, LENGTH

pytest.importorskip("tvm", reason="the CPU backend needs apache-tvm")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, LENGTH, 32), torch.randn(2, 2, LENGTH, 32), torch.randn(2, 2, LENGTH, 40)
    assert_agrees(KINDS[kind], q, k, v, tolerance=1e-5)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("q_len", [1, 5, 70])
def test_groups_of_any_size(group: int, q_len: int) -> None:
    q, k = torch.randn(1, 2 * group, q_len, 16), torch.randn(1, 2, 90, 16)
    assert_agrees(KINDS["streaming"], q, k, torch.randn(1, 2, 90, 16), tolerance=1e-5)


@pytest.mark.parametrize("dims", [(16, 16), (80, 64), (96, 192), (256, 128), (33, 17)])
def test_head_sizes(dims: tuple[int, int]) -> None:
    q, k, v = torch.randn(1, 2, 70, dims[0]), torch.randn(1, 2, 70, dims[0]), torch.randn(1, 2, 70, dims[1])
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=1e-5)


def test_chunks_of_rows_equal_the_whole() -> None:
    q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    attend = sp.attention(KINDS["streaming"])
    whole = attend(q, k, v)
    chunks = [attend(q[:, :, at : at + 32], k, v, q_offset=at) for at in (0, 32, 64)]
    torch.testing.assert_close(torch.cat(chunks, 2), whole, atol=1e-6, rtol=1e-6)


def test_a_padded_cache_is_never_read_beyond_its_length() -> None:
    q, k, v = (torch.randn(3, 2, 40, 16) for _ in range(3))
    lengths = torch.tensor([40, 0, 17])
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    for pattern in (KINDS["streaming"], sp.dense()):
        assert_agrees(pattern, q, k, v, tolerance=1e-5, kv_lengths=lengths)
        assert_agrees(pattern, q, k, v, tolerance=1e-5, kv_lengths=lengths, q_offset=torch.tensor([0, 3, 9]))


def test_strides_need_no_copy() -> None:
    base = torch.randn(1, 90, 3, 4, 32)
    q, k, v = (base[:, :, n].transpose(1, 2) for n in range(3))
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=1e-5)
    q, k, v = (torch.randn(1, 2, 32, 90).mT for _ in range(3))
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=1e-5)


def test_a_nan_stays_in_its_row() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    clean = sp.attention(sp.causal())(q, k, v)
    q[0, 0, 33, 5] = torch.nan
    out = sp.attention(sp.causal())(q, k, v)
    assert out[0, 0, 33].isnan().all()
    others = torch.arange(70) != 33
    torch.testing.assert_close(out[:, :, others], clean[:, :, others])


def test_same_inputs_same_bits() -> None:
    q, k, v = (torch.randn(1, 4, 200, 32) for _ in range(3))
    attend = sp.attention(KINDS["streaming"])
    first = attend(q, k, v)
    assert all(torch.equal(attend(q, k, v), first) for _ in range(20))


def test_the_oracle_is_what_it_is_compared_with() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            sp.attention(sp.causal())(q, k, v).double(), reference.attention(q, k, v, sp.dense())
        )
