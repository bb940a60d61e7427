"""Float8 attention and its quantisation against the oracle, on a Hopper GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import spgen as sp
from spgen import reference

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a Hopper GPU")]

WEIGHTS = 2.0**-4  # what rounding a weight to e4m3 changes at most, relative to it
NORM = 0.03  # and what that does to an output of many keys, relative to its norm; a single key has no error


def inputs(
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int = 128, value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[torch.Tensor]:  # fmt: skip
    torch.manual_seed(rows + keys)
    shapes = ((heads, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim))
    return [torch.randn(batch, *shape, device="cuda", dtype=dtype) for shape in shapes]


def check(pattern: sp.Pattern, quantized: tuple[sp.Float8, sp.Float8, sp.Float8], **options: Any) -> torch.Tensor:
    """Against attention over the values that float8 stands for: what is left is the rounding of weights."""
    given = {name: options.pop(name) for name in ("scale", "softcap") if name in options}
    out, lse = sp.attention(pattern, **given)(*quantized, return_lse=True, **options)
    q, k, v = (one.dequantize() for one in quantized)
    wanted, wanted_lse = reference.attention(q, k, v, pattern, return_lse=True, **given, **options)
    empty = wanted_lse.isneginf()
    assert out.dtype == torch.bfloat16
    assert (out[empty] == 0).all()
    assert torch.equal(lse.isneginf(), empty)
    torch.testing.assert_close(lse.double()[~empty], wanted_lse[~empty], atol=2e-3, rtol=2e-3)
    largest = v.abs().amax((2, 3)).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None, None]
    assert ((out.double() - wanted).abs() <= WEIGHTS * largest).all()
    assert (out.double() - wanted).norm() <= NORM * wanted.norm()
    return out


PATTERNS: dict[str, Callable[[], sp.Pattern]] = {
    "dense": sp.dense,
    "causal": sp.causal,
    "window and sink": lambda: sp.causal() & (sp.sink(7) | sp.window(100)),
    "wide window": lambda: sp.causal() & (sp.sink(20) | sp.window(300)),
    "both sides": lambda: sp.window(150, 37),
    "blocks": lambda: sp.causal() & sp.block(128, mask=torch.rand(4, 8, 8, device="cuda") < 0.4),
    "wide blocks": lambda: sp.block(256, mask=torch.rand(2, 4, 4, device="cuda") < 0.4),
    "blocks of 64": lambda: sp.causal() & sp.block(64, mask=torch.rand(4, 16, 16, device="cuda") < 0.4),
    "without some keys": lambda: sp.causal() - sp.where(lambda i, j: j % 5 == 0),
    "per head": lambda: sp.per_head([sp.causal(), sp.causal() & sp.window(64)] * 2),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("lengths", [(1000, 1000), (77, 530), (129, 1)])
def test_patterns(name: str, lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    if "blocks" in name and lengths != (1000, 1000):
        pytest.skip("the data are for 1000 keys")
    check(PATTERNS[name](), sp.quantize(*inputs(2, 4, 2, *lengths)))


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 48), (128, 64), (96, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_sizes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(sp.causal(), sp.quantize(*inputs(1, 6, 2, 200, 333, *dims, dtype=dtype)))


def test_few_rows() -> None:
    for rows in (1, 5, 64):
        check(sp.causal(), sp.quantize(*inputs(2, 8, 2, rows, 700)))


def test_options() -> None:
    quantized = sp.quantize(*inputs(2, 4, 2, 200, 333))
    check(sp.causal(), quantized, softcap=5.0)
    check(sp.causal(), quantized, scale=-0.3)
    check(sp.causal(), quantized, scale=0.0)
    check(sp.causal(), quantized, q_offset=40)
    check(sp.causal(), quantized, q_offset=torch.tensor([0, 133], device="cuda"))
    check(sp.causal(), quantized, sink_logits=torch.randn(4, device="cuda"))


def test_long_sums_are_as_exact_as_short_ones() -> None:
    """Sums of all steps are float32, though the tensor cores add up fewer bits."""
    q, k, v = inputs(1, 1, 1, 128, 32768)
    quantized = sp.quantize(q, k, v + 1)  # all of one sign: what is lost would add up
    check(sp.dense(), quantized)


def test_what_lies_beyond_a_length_is_never_multiplied() -> None:
    q, k, v = inputs(5, 4, 2, 700, 700)
    lengths = torch.tensor([700, 0, 117, 128, 513], device="cuda")
    clean = [k.clone(), v.clone()]
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
        clean[0][b, :, length:] = clean[1][b, :, length:] = 0
    quantized = sp.quantize(q, k, v, kv_lengths=lengths)
    for pattern in (sp.causal() & (sp.sink(7) | sp.window(300)), sp.dense()):
        out = check(pattern, quantized, kv_lengths=lengths)
        assert torch.equal(out, check(pattern, sp.quantize(q, *clean), kv_lengths=lengths))


def test_the_same_bits() -> None:
    """What copies bring is there before it is multiplied."""
    q, k, v = inputs(4, 8, 2, 1000, 1000)
    pattern = sp.causal() & sp.block(128, mask=torch.rand(8, 8, 8, device="cuda") < 0.5)
    attend = sp.attention(pattern)
    quantized = sp.quantize(q, k, v)
    plan = attend.plan(*quantized[:2])
    first = attend(*quantized)
    for _ in range(200):
        torch.empty_like(first).fill_(torch.nan)
        assert torch.equal(attend(*quantized, plan=plan), first)
    again = sp.quantize(q, k, v)
    for one, other in zip(quantized, again, strict=True):
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
        assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantization(dtype: torch.dtype, transposed: bool) -> None:
    """Exactly what torch's own conversion gives."""
    tensors = inputs(2, 4, 2, 200, 333, 80, 48, dtype=dtype)
    tensors[0][0, 1, 7] = 0
    if transposed:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for index, (x, one) in enumerate(zip(tensors, sp.quantize(*tensors), strict=True)):
        peak = x.float().abs().amax(3 if index == 0 else (2, 3))
        torch.testing.assert_close(one.scales, torch.where(peak > 0, peak / 448, 1.0), rtol=1e-6, atol=0)
        scales = one.scales.reshape(*one.scales.shape, *(1,) * (4 - one.scales.dim()))
        wanted = (x.float() * (1 / scales)).to(torch.float8_e4m3fn).float() * scales
        differing = one.dequantize() != wanted
        assert differing.float().mean() < 1e-4  # the reciprocal's last bit
        torch.testing.assert_close(one.dequantize(), wanted, rtol=0.13, atol=1e-6)


def test_what_is_refused() -> None:
    q8, k8, v8 = sp.quantize(*inputs(1, 4, 2, 300, 300))
    index = torch.randint(0, 300, (1, 4, 20), device="cuda", dtype=torch.int32)
    for pattern, reason in (
        (sp.causal() & sp.columns(index), "16 keys"),
        (sp.causal() & sp.diagonals(index), "16 keys"),
        (sp.causal() & sp.block(128, 32, mask=torch.ones(3, 10, device="cuda", dtype=torch.bool)), "16 keys"),
    ):
        with pytest.raises(sp.UnsupportedError, match=reason):
            sp.attention(pattern)(q8, k8, v8)
    with pytest.raises(sp.UnsupportedError, match="a bias"):
        sp.attention(sp.causal())(q8, k8, v8, bias=torch.zeros(300, device="cuda"))


def test_compiled_graphs() -> None:
    attend = sp.attention(sp.causal())

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(*sp.quantize(q, k, v))

    tensors = inputs(1, 4, 2, 200, 333)
    assert torch.equal(torch.compile(call, fullgraph=True)(*tensors), call(*tensors))


def test_graph_replay() -> None:
    tensors = inputs(1, 4, 2, 500, 500)
    attend = sp.attention(sp.causal())
    wanted = attend(*sp.quantize(*tensors))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*sp.quantize(*tensors))
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)
