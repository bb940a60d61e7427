"""A million tokens: tensors of more than 2**31 elements, checked on sampled rows against the oracle's definition."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import spgen as sp

pytestmark = pytest.mark.gpu

LENGTH, HEADS, HEAD_DIM = 2**20, 32, 128
ROWS = (0, 1, 63, 64, 5000, LENGTH // 2 - 1, LENGTH // 2, LENGTH - 129, LENGTH - 1)
SAMPLED_HEADS = (0, 15, 16, 31)  # 2**31 elements lie before head 16
_FREE = 48 << 30  # bytes that the largest of these needs


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    free, _ = torch.cuda.mem_get_info()
    if free < _FREE:
        pytest.skip(f"needs {_FREE >> 30} GiB of free GPU memory, there are {free >> 30}")
    yield
    torch.cuda.empty_cache()


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)


def assert_row(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, out: Tensor, lse: Tensor) -> None:
    """One row q [D] over the rows `keys` of k and v [N, D]: output within rounding to bfloat16, log-sum-exp in fp32."""
    assert len(keys)
    scores = k[keys].double() @ q.double() / math.sqrt(len(q))
    values = v[keys].double()
    weights = scores.softmax(0)
    wanted, magnitude = weights @ values, weights @ values.abs()
    assert ((out.double() - wanted).abs() <= 2.0**-8 * (magnitude + 1.01 * wanted.abs()) + 1e-4 * magnitude).all()
    torch.testing.assert_close(lse.double(), scores.logsumexp(0), atol=2e-5, rtol=1e-6)


def assert_rows(pattern: sp.Pattern, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Runs `pattern`, which only positions decide, and compares sampled rows."""
    out, lse = sp.attention(pattern)(q, k, v, return_lse=True)
    assert out.isfinite().all()
    group = q.shape[1] // k.shape[1]
    for row in ROWS:
        masks = pattern.mask(1, LENGTH, q_heads=q.shape[1], kv_heads=k.shape[1], q_offset=row, device="cuda")
        for h in SAMPLED_HEADS:
            keys = masks[0, h, 0].nonzero()[:, 0]
            assert_row(q[0, h, row], k[0, h // group], v[0, h // group], keys, out[0, h, row], lse[0, h, row])


def test_mixtures() -> None:
    q, k, v = drawn(1, HEADS, LENGTH, HEAD_DIM), drawn(1, 8, LENGTH, HEAD_DIM), drawn(1, 8, LENGTH, HEAD_DIM)
    kinds = [sp.sink(64) | sp.window(1024), sp.window(300), sp.sink(4) | sp.window(64), sp.stripe(4096, 8, cols=16)]
    mixture = sp.per_head([sp.causal() & (kinds[h % 4] | sp.sink(1)) for h in range(HEADS)])
    assert_rows(mixture, q, k, v)


def test_columns_and_diagonals() -> None:
    q, k, v = (drawn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(3))
    generator = torch.Generator("cuda").manual_seed(0)
    columns, offsets = (torch.randint(LENGTH, (HEADS, n), device="cuda", generator=generator) for n in (700, 3))
    columns[:, 0], offsets[:, 0] = 0, 0
    columns[:, 1] = LENGTH - 1
    assert_rows(sp.causal() & sp.vertical_slash(columns, offsets), q, k, v)


def test_block_lists() -> None:
    q, k, v = (drawn(1, HEADS, LENGTH, HEAD_DIM) for _ in range(3))
    tiles = LENGTH // 128
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = torch.randint(tiles, (HEADS, tiles, 4), device="cuda", generator=generator)
    blocks[:, :, 0] = torch.arange(tiles, device="cuda")
    out, lse = sp.attention(sp.causal() & sp.block(128, indices=blocks))(q, k, v, return_lse=True)
    assert out.isfinite().all()
    for row in ROWS:
        for h in SAMPLED_HEADS:
            starts = 128 * blocks[h, row // 128].unique()
            keys = (starts[:, None] + torch.arange(128, device="cuda")).flatten()
            assert_row(q[0, h, row], k[0, h], v[0, h], keys[keys <= row], out[0, h, row], lse[0, h, row])


def test_packed_batches() -> None:
    """Sequences of all lengths, token by token: the last tokens lie behind 2**32 elements."""
    q, k, v = (drawn(LENGTH, HEADS, HEAD_DIM) for _ in range(3))
    ends = torch.tensor([0, 1, 1000, 1000, 300_000, 300_077, 900_000, LENGTH - 40, LENGTH], device="cuda")
    pattern = sp.causal() & (sp.sink(16) | sp.window(512))
    out, lse = sp.attention(pattern)(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, return_lse=True)
    assert out.isfinite().all()
    for token in (0, 1, 999, 1000, 299_999, 300_076, 524_287, 524_288, 899_999, LENGTH - 41, LENGTH - 40, LENGTH - 1):
        start = int(ends[int((ends <= token).sum()) - 1])
        i = token - start
        j = torch.arange(i + 1, device="cuda")
        keys = start + j[(j < 16) | (j > i - 512)]
        for h in SAMPLED_HEADS:
            assert_row(q[token, h], k[:, h], v[:, h], keys, out[token, h], lse[h, token])
