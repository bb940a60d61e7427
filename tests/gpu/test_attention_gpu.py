"""Whole calls on a GPU against the oracle: every kind of pattern, CUDA graphs, determinism, long sequences."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen import reference
from tests.agreement import assert_agrees
from tests.kinds import KINDS, LENGTH

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def tensors(length: int, dtype: torch.dtype, head_dim: int = 64, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (4, 2, 2)
    return [torch.randn(batch, h, length, head_dim, device="cuda", dtype=dtype) for h in heads]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, dtype: torch.dtype) -> None:
    assert_agrees(KINDS[kind].to("cuda"), *tensors(LENGTH, dtype), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [(16, 16), (80, 64), (96, 192), (192, 96), (256, 128), (256, 256), (33, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, _ = tensors(200, dtype, dims[0], batch=1)
    v = torch.randn(1, 2, 200, dims[1], device="cuda", dtype=dtype)
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [(64, 16), (128, 16), (128, 32), (256, 16), (32, 128)])
@pytest.mark.parametrize("kind", ["tokens", "odd blocks", "everything"])
def test_narrow_values_behind_masks(kind: str, dims: tuple[int, int]) -> None:
    q, k, _ = tensors(LENGTH, torch.bfloat16, dims[0], batch=1)
    v = torch.randn(1, 2, LENGTH, dims[1], device="cuda", dtype=torch.bfloat16)
    assert_agrees(KINDS[kind].to("cuda"), q, k, v, tolerance=4e-2)


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("q_len", [1, 5, 300])
def test_groups_of_any_size(group: int, q_len: int) -> None:
    q = torch.randn(1, 2 * group, q_len, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 2, 320, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=4e-2)


def test_strides_need_no_copy() -> None:
    base = torch.randn(1, 300, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (base[:, :, n].transpose(1, 2) for n in range(3))
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=4e-2)
    q, k, v = (torch.randn(1, 2, 64, 300, device="cuda", dtype=torch.bfloat16).mT for _ in range(3))
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=4e-2)
    q, k, v = (torch.randn(1, 2, 300, 67, device="cuda", dtype=torch.bfloat16)[..., 3:] for _ in range(3))
    assert_agrees(KINDS["streaming"], q, k, v, tolerance=4e-2)


def test_a_padded_cache_is_never_read_beyond_its_length() -> None:
    q, k, v = (torch.randn(3, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lengths = torch.tensor([300, 0, 117], device="cuda")
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    for pattern in (KINDS["streaming"], sp.dense()):
        assert_agrees(pattern, q, k, v, tolerance=4e-2, kv_lengths=lengths)


@pytest.mark.parametrize("kind", ["streaming", "blocks", "vertical and slash", "permuted rows", "mixture"])
def test_calls_are_captured(kind: str) -> None:
    """A call plans and attends inside a CUDA graph; new data take effect when it is replayed."""
    q, k, v = tensors(LENGTH, torch.float16)
    attend = sp.attention(KINDS[kind].to("cuda"))
    attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    q.copy_(torch.randn_like(q))
    out.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(out, attend(q, k, v), atol=0, rtol=0)


def test_same_inputs_same_bits() -> None:
    q, k, v = tensors(1500, torch.bfloat16)
    attend = sp.attention(sp.causal() & sp.block(128, mask=torch.rand(4, 12, 12, device="cuda") < 0.5))
    first = attend(q, k, v)
    assert all(torch.equal(attend(q, k, v), first) for _ in range(50))


def test_addresses_beyond_two_gigabytes() -> None:
    """The last head of a tensor of more than 2**31 elements."""
    heads, length, head_dim = 72, 2**18, 128
    q = torch.randn(1, heads, 256, head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(1, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    k[:, -1], v[:, -1] = torch.randn_like(k[:, -1]), torch.randn_like(v[:, -1])
    pattern = sp.causal() & (sp.sink(64) | sp.window(512))
    out = sp.attention(pattern)(q, k, v)[:, -1:]
    wanted = reference.attention(q[:, -1:], k[:, -1:], v[:, -1:], pattern, dtype=torch.float32)
    torch.testing.assert_close(out.float(), wanted, atol=4e-2, rtol=4e-2)


def test_compiled_with_inductor() -> None:
    q, k, v = tensors(LENGTH, torch.bfloat16)
    attend = sp.attention(KINDS["streaming"])
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q * 2, k, v) + 1, atol=2e-2, rtol=2e-2)


def test_autocast_is_that_of_scaled_dot_product_attention() -> None:
    q, k, v = tensors(LENGTH, torch.float32)
    with torch.autocast("cuda", dtype=torch.float16):
        out = sp.attention(KINDS["streaming"])(q, k, v)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), sp.attention(KINDS["streaming"])(q, k, v), atol=5e-3, rtol=5e-3)
