"""Packed batches and score options: whole calls against the oracle, for every kind of pattern."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import spgen as sp
from spgen import reference
from spgen.errors import DataError, PatternError, PlanError, ShapeError
from tests.agreement import assert_agrees
from tests.kinds import KINDS, LENGTH

STREAMING = KINDS["streaming"]
TOLERANCE = 1e-5


def packed(
    rows: list[int], keys: list[int], heads: int = 4, kv_heads: int = 2, dim: int = 16
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """q, k, v and boundaries; the first row and the last two keys belong to nobody, and hold NaN."""
    generator = torch.Generator().manual_seed(sum(rows))
    cu_q = torch.tensor([1, *rows]).cumsum(0)
    cu_k = torch.tensor([0, *keys]).cumsum(0).int()
    q = torch.randn(sum(rows) + 1, heads, dim, generator=generator)
    k, v = (torch.randn(sum(keys) + 2, kv_heads, d, generator=generator) for d in (dim, dim + 4))
    k[-2:] = v[-2:] = math.nan
    return (q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "permuted rows"])
def test_kinds(kind: str) -> None:
    tensors, boundaries = packed([LENGTH, 33, 0, 1, 90], [LENGTH, 40, 7, 0, 60])
    assert_agrees(KINDS[kind], *tensors, tolerance=TOLERANCE, **boundaries)


def test_rows_in_another_order() -> None:
    """An order of rows ends where its sequence ends."""
    tensors, boundaries = packed([20, 9], [20, 30])
    order = torch.stack([torch.randperm(20), torch.cat([torch.randperm(9), torch.full((11,), -1)])])[:, None]
    pattern = sp.causal() & sp.permuted(sp.window(5), q=order)
    assert_agrees(pattern, *tensors, tolerance=TOLERANCE, **boundaries)


@pytest.mark.parametrize("rows", [[1] * 9, [3, 1, 2], [64, 65, 63], [200]])
def test_lengths(rows: list[int]) -> None:
    """Single rows share tiles among the heads of a group; lengths around the size of a tile."""
    tensors, boundaries = packed(rows, [70 + 13 * n for n in range(len(rows))])
    assert_agrees(STREAMING, *tensors, tolerance=TOLERANCE, **boundaries)
    assert_agrees(KINDS["mixture"], *tensors, tolerance=TOLERANCE, **boundaries)


def test_offsets_and_lengths_of_each_sequence() -> None:
    tensors, boundaries = packed([30, 5, 12], [50, 60, 70])
    options = {"q_offset": torch.tensor([3, 40, -4]), "kv_lengths": torch.tensor([20, 99, 0])}
    assert_agrees(STREAMING, *tensors, tolerance=TOLERANCE, **boundaries, **options)
    assert_agrees(STREAMING, *tensors, tolerance=TOLERANCE, **boundaries, q_offset=7)


def test_is_the_padded_batch() -> None:
    rows = [17, 40, 3]
    (q, k, v), boundaries = packed(rows, rows)
    found = sp.attention(STREAMING)(q, k, v, **boundaries)
    for start, length in zip(boundaries["cu_seqlens_q"].tolist(), rows, strict=False):
        own, theirs = slice(start, start + length), slice(start - 1, start - 1 + length)
        alone = sp.attention(STREAMING)(*(x.transpose(0, 1)[None] for x in (q[own], k[theirs], v[theirs])))
        torch.testing.assert_close(found[own], alone[0].transpose(0, 1))


def test_layouts_are_kept() -> None:
    (q, k, v), boundaries = packed([20, 30], [20, 30])
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    out = sp.attention(STREAMING)(q, k, v, **boundaries)
    assert out.stride(0) < out.stride(1)
    torch.testing.assert_close(out, sp.attention(STREAMING)(*(x.contiguous() for x in (q, k, v)), **boundaries))


@pytest.mark.parametrize("kind", ["streaming", "blocks", "vertical and slash", "permuted", "documents"])
def test_plans(kind: str) -> None:
    tensors, boundaries = packed([LENGTH, 31], [LENGTH, 80])
    attend = sp.attention(KINDS[kind])
    plan = attend.plan(*tensors[:2], **boundaries)
    assert torch.equal(attend(*tensors, **boundaries, plan=plan), attend(*tensors, **boundaries))
    other, longer = packed([LENGTH, 15, 16], [LENGTH, 40, 40])
    with pytest.raises(PlanError, match="packed sequences"):
        attend(*other, **longer, plan=plan)


def test_chunks_are_the_whole() -> None:
    """Prefill in chunks over a growing cache: closed forms see positions, not rows."""
    (q, k, v), boundaries = packed([50, 20], [50, 20])
    whole = sp.attention(STREAMING)(q, k, v, **boundaries)
    cu_q = torch.tensor([0, 15, 27])
    chunk = torch.cat([q[21:36], q[51:63]])  # rows 20 ... 34 of the first sequence, 0 ... 11 of the second
    found = sp.attention(STREAMING)(
        chunk, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=boundaries["cu_seqlens_k"], q_offset=torch.tensor([20, 0])
    )
    torch.testing.assert_close(found, torch.cat([whole[21:36], whole[51:63]]))


OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sink_logits": torch.tensor([0.5, -20.0, 30.0, 1.0])},
    "sinks in half": {"sink_logits": torch.tensor([0.5, -2.0, 3.0, 1.0]).bfloat16()},
    "slopes": {"bias": sp.alibi(torch.tensor([0.5, 0.25, 0.125, 2.0]))},
    "everything": {
        "softcap": 3.0,
        "sink_logits": torch.tensor([0.5, -2.0, 3.0, 1.0]),
        "bias": sp.alibi(torch.tensor([0.1, 0.2, 0.3, 0.4])),
    },
}


@pytest.mark.parametrize("kind", ["dense", "streaming", "vertical and slash", "permuted rows", "mixture"])
@pytest.mark.parametrize("name", OPTIONS)
def test_score_options(name: str, kind: str) -> None:
    q, k, v = (torch.randn(2, h, LENGTH, 16) for h in (4, 2, 2))
    assert_agrees(KINDS[kind], 4 * q, k, v, tolerance=TOLERANCE, **OPTIONS[name])
    assert_agrees(STREAMING, 4 * q[:, :, :3], k, v, tolerance=TOLERANCE, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_score_options_of_packed_batches(name: str) -> None:
    tensors, boundaries = packed([40, 1, 70], [40, 90, 30])
    assert_agrees(STREAMING, *tensors, tolerance=TOLERANCE, **boundaries, **OPTIONS[name])


@pytest.mark.parametrize("shape", [(60,), (1, 60), (2, 60), (4, 60), (1, 2, 60), (3, 4, 60), (3, 1, 60)], ids=str)
def test_bias_per_key(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(3, h, 60, 16) for h in (4, 2, 2))
    bias = torch.randn(shape)
    bias[..., 7:9] = -math.inf
    assert_agrees(STREAMING, q, k, v, tolerance=TOLERANCE, bias=bias)
    assert_agrees(
        sp.dense(), q[:, :, :2], k, v, tolerance=TOLERANCE, bias=bias.mT.contiguous().mT if len(shape) > 1 else bias
    )


def test_bias_per_packed_key() -> None:
    tensors, boundaries = packed([40, 1, 70], [40, 90, 30])
    for shape in ((162,), (2, 162), (1, 4, 162)):
        assert_agrees(STREAMING, *tensors, tolerance=TOLERANCE, **boundaries, bias=torch.randn(shape))


def test_slopes_of_each_sequence() -> None:
    tensors, boundaries = packed([40, 1, 70], [40, 90, 30])
    assert_agrees(sp.dense(), *tensors, tolerance=TOLERANCE, **boundaries, bias=sp.alibi(torch.rand(3, 4)))


def test_a_row_without_keys_has_its_sink_alone() -> None:
    q, k, v = (torch.randn(1, h, 8, 16) for h in (4, 2, 2))
    sinks = torch.randn(4)
    out, lse = sp.attention(~sp.dense())(q, k, v, sink_logits=sinks, return_lse=True)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 4, 8))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens_q": None}, ShapeError, "cu_seqlens_q: got None"),
    ({"cu_seqlens_k": torch.tensor([0, 9])}, ShapeError, "2 boundaries"),
    ({"cu_seqlens_k": torch.tensor(9)}, ShapeError, "where each of N"),
    ({"kv_lengths": torch.tensor([3])}, ShapeError, "kv_lengths"),
    ({"bias": torch.zeros(2, 2, 22)}, ShapeError, "bias"),
    ({"check": True}, DataError, "cu_seqlens_q at"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), BAD)
def test_bad_packed_calls(wrong: dict[str, Any], error: type[Exception], match: str) -> None:
    tensors, boundaries = packed([9, 4], [8, 12])
    with pytest.raises(error, match=match):
        sp.attention(STREAMING)(*tensors, **{**boundaries, **wrong})


def test_packed_tensors_need_boundaries() -> None:
    tensors, _ = packed([9], [9])
    with pytest.raises(ShapeError, match="pass cu_seqlens_q and cu_seqlens_k"):
        sp.attention(STREAMING)(*tensors)


def test_values_are_checked_on_request() -> None:
    q, k, v = (torch.randn(20, 2, 16) for _ in range(3))
    good, wrong = torch.tensor([0, 5, 20]), torch.tensor([0, 15, 10, 20])
    sp.attention(STREAMING)(q, k, v, cu_seqlens_q=good, cu_seqlens_k=good, check=True)
    with pytest.raises(DataError, match="at least 15"):
        sp.attention(STREAMING)(q, k, v, cu_seqlens_q=wrong, cu_seqlens_k=wrong, check=True)
    with pytest.raises(DataError, match=r"columns: index \(\$0\)"):
        sp.attention(sp.columns(torch.tensor([3, 18])))(q, k, v, cu_seqlens_q=good, cu_seqlens_k=good, check=True)


@pytest.mark.parametrize("wild", [[-5, 30, 10, 99], [7, 7, 7, 7], [20, 10, 5, 0]])
def test_wrong_boundaries_read_nothing_out_of_bounds(wild: list[int]) -> None:
    q, k, v = (torch.randn(20, heads, 16) for heads in (4, 2, 2))
    cu = torch.tensor(wild)
    out = sp.attention(KINDS["mixture"] | sp.columns([3, 900]))(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert out.isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.inf, math.nan])
def test_a_softcap_is_above_zero(softcap: float) -> None:
    with pytest.raises(PatternError, match="softcap"):
        sp.attention(sp.causal(), softcap=softcap)


@pytest.mark.parametrize("slopes", [3, torch.ones(2, dtype=torch.int64), torch.ones(1, 2, 3)])
def test_slopes_are_floats_of_heads(slopes: Any) -> None:
    with pytest.raises((sp.DtypeError, ShapeError), match="alibi: slopes"):
        sp.alibi(slopes)


def test_compiles_in_one_graph() -> None:
    (q, k, v), boundaries = packed([30, 20], [30, 20])
    attend = sp.attention(STREAMING, softcap=5.0)
    bias = sp.alibi(torch.rand(4))
    compiled = torch.compile(
        lambda q, k, v, c: attend(q, k, v, **c, bias=bias) + 1, fullgraph=True, backend="aot_eager"
    )
    wanted = reference.attention(q, k, v, STREAMING, softcap=5.0, bias=bias, **boundaries) + 1
    torch.testing.assert_close(compiled(q, k, v, boundaries).double(), wanted, atol=1e-5, rtol=1e-5)
