"""Plans by kernels on a GPU, against tensor operations: every kind, long lists, CUDA graphs, other devices' streams."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen.ir.node import Op
from spgen.patterns import Pattern
from spgen.tables import Builder
from tests.kinds import KINDS, LENGTH
from tests.lowering import Lengths
from tests.plans import assert_same_tables, packed_lengths, planned

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    lengths = torch.tensor([LENGTH, 70])
    assert_same_tables(
        KINDS[kind], Lengths(LENGTH, LENGTH, 4, 2, 2, kv_lengths=lengths, block_m=64, block_n=32), "cuda"
    )
    assert_same_tables(KINDS[kind], Lengths(LENGTH, LENGTH, 4, 2, q_offset=3, block_m=128, block_n=64), "cuda")
    offsets = torch.tensor([0, -7], dtype=torch.int32)
    assert_same_tables(KINDS[kind], Lengths(LENGTH, LENGTH, 4, 2, 2, q_offset=offsets, block_m=16), "cuda")


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"permuted rows"}))
def test_kinds_of_packed_batches(kind: str) -> None:
    assert_same_tables(KINDS[kind], packed_lengths(block_m=64, block_n=32), "cuda")
    lengths = torch.tensor([9, 0, 4, 200, 30])
    assert_same_tables(KINDS[kind], packed_lengths(kv_lengths=lengths, q_offset=3, block_m=128, block_n=64), "cuda")
    offsets = torch.tensor([0, -7, 3, 9, 50], dtype=torch.int32)
    assert_same_tables(KINDS[kind], packed_lengths(q_offset=offsets, block_m=16), "cuda")


def test_rows_of_packed_batches_in_another_order() -> None:
    order = torch.stack([torch.randperm(200), torch.cat([torch.randperm(90), torch.full((110,), -1)])])[:, None]
    cu = torch.tensor([4, 204, 294])
    pattern = sp.causal() & sp.permuted(sp.window(50), q=order)
    assert_same_tables(pattern, Lengths(200, 200, batch=2, cu_q=cu, cu_k=cu, block_m=64, block_n=32), "cuda")


def numbers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(-3, high + 3, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)


FAR = 300_000  # keys: more than a bitmap in shared memory has bits


def _long() -> dict[str, tuple[Pattern, Lengths]]:
    """Every way of making a table, with lists that fill several programs."""
    n = 16384
    call = Lengths(n, n, 8, 2, block_m=128, block_n=64)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand((8, n // 128, n // 128), generator=generator) < 0.3
    fine = torch.rand((2, n // 32, n // 64), generator=generator) < 0.1
    counts = torch.randint(0, 40, (8, n // 128), generator=generator)
    indptr = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    entries = numbers(n // 128, 8, int(indptr.max()))
    causal = sp.causal()
    far = Lengths(64, FAR, 2, 2, block_m=32, block_n=64)
    return {
        "mask": (causal & sp.block(128, mask=mask), call),
        "mask of small blocks": (causal & sp.block(32, 64, mask=fine), call),
        "short lists": (causal & sp.block(128, indices=numbers(n // 128, 8, n // 128, 50)), call),
        "long lists": (causal & sp.block(128, 16, indices=numbers(n // 16, 2, n // 128, 700)), call),
        "lists of tokens": (causal & sp.top_k(numbers(n, 1, n // 4, 100), rows=4), call),
        "compressed rows": (causal & sp.block(128, indptr=indptr, indices=entries), call),
        "short compressed rows": (causal & sp.block(32, 64, indptr=indptr, indices=entries), call),
        "lists of rows": (causal & sp.top_k(numbers(n, 2, n, 16)), call),
        "columns": (causal & sp.columns(numbers(n, 8, 1000)), call),
        "many columns": (causal & sp.columns(numbers(n, 8, 3000)), call),
        "columns of many": (sp.columns(numbers(2**18, 2, 900)), Lengths(256, 2**18, 2, 2, block_m=128, block_n=64)),
        "tokens of a long cache": (sp.top_k(numbers(FAR, 2, 64, 2000)), far),
        "compressed rows of a long cache": (
            sp.block(16, 1, indptr=torch.tensor([[0, 4000, 4100, 8000, 9000]]), indices=numbers(FAR, 2, 9000)),
            far,
        ),
        "columns of a long cache": (causal & sp.columns(numbers(FAR, 2, 20000)), far),
        "offsets": (causal & sp.vertical_slash(numbers(n, 8, 1000), numbers(n, 2, 6000)), call),
        "columns beside others": (
            causal & (sp.window(100) | sp.columns(numbers(n, 40)) | sp.block(128, mask=mask)),
            call,
        ),
    }


def _packed() -> dict[str, tuple[Pattern, Lengths]]:
    """The same over sequences of very different lengths."""
    lengths = torch.tensor([3, 1, 900, 0, 4096, 127, 2000, 0, 640])
    n, count = 4096, len(lengths)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    call = Lengths(n, n, 4, 2, count, cu_q=cu + 70, cu_k=cu.long(), block_m=128, block_n=64)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand((count, 4, n // 64, n // 64), generator=generator) < 0.3
    causal = sp.causal()
    return {
        "mask": (causal & sp.block(64, mask=mask), call),
        "one mask": (causal & sp.block(32, 128, mask=mask[0, :, :40, :32]), call),
        "short lists": (causal & sp.block(128, indices=numbers(32, count, 4, 32, 9)), call),
        "lists of tokens": (causal & sp.top_k(numbers(n, count, 2, n // 64, 300), rows=64), call),
        "lists of rows": (causal & sp.top_k(numbers(n, 2, n, 9)), call),
        "columns": (causal & (sp.window(100) | sp.columns(numbers(n, count, 4, 300))), call),
        "offsets": (causal & sp.vertical_slash(numbers(n, 4, 100), numbers(n, count, 2, 1300)), call),
    }


LONG = _long()
LONG_PACKED = _packed()


@pytest.mark.parametrize("kind", LONG)
def test_long_lists(kind: str) -> None:
    assert_same_tables(*LONG[kind], "cuda")


@pytest.mark.parametrize("kind", LONG_PACKED)
def test_long_lists_of_packed_batches(kind: str) -> None:
    assert_same_tables(*LONG_PACKED[kind], "cuda")


def _again(builder: Builder, op: Op) -> torch.Tensor:
    """A table by tensor operations."""
    builder.heads[op["name"]] = op["heads"]
    builder.tables[op["name"]] = builder.make(op)
    return builder.tables[op["name"]]


def test_plans_are_captured() -> None:
    """New data take effect when the graph is replayed."""
    made_by, builder, _ = planned(*LONG["mask"], "cuda")
    made_by(builder)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = made_by(builder)
    builder.data[0].copy_(torch.rand(builder.data[0].shape, device="cuda") < 0.5)
    graph.replay()
    for table, right in zip(tables, [_again(builder, op) for op in made_by.tables], strict=True):
        assert torch.equal(table, right)


def test_packed_plans_are_captured() -> None:
    """New boundaries take effect when the graph is replayed."""
    made_by, builder, _ = planned(*LONG_PACKED["offsets"], "cuda")
    made_by(builder)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = made_by(builder)
    for boundaries in (builder.sequences.cu_q, builder.sequences.cu_k):
        assert boundaries is not None
        boundaries[3:7] += 300
    graph.replay()
    for table, right in zip(tables, [_again(builder, op) for op in made_by.tables], strict=True):
        assert torch.equal(table, right)


def test_bitmaps_are_shared_by_many_lists() -> None:
    """More lists than programs run at a time; bitmaps in global memory serve several of them."""
    index = numbers(4096, 4, 4096, 300)
    assert_same_tables(sp.top_k(index), Lengths(4096, 4096, 4, 4, block_m=1, block_n=64), "cuda")
    assert_same_tables(sp.top_k(index), Lengths(4096, 4096, 4, 4, block_m=2, block_n=64), "cuda")


def test_streams_are_those_of_the_caller() -> None:
    made_by, builder, wanted = planned(*LONG["columns"], "cuda")
    made_by(builder)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        builder.data[0].zero_()
        tables = made_by(builder)
    stream.synchronize()
    units = next(t for op, t in zip(made_by.tables, tables, strict=True) if op.kind == "units")
    assert (units[..., 0] == 0).all()
    assert (units[..., 1:] == 2**31 - 1).all()
    assert len(wanted) == len(tables)


@pytest.mark.parametrize("kind", ["mask", "columns", "offsets"])
def test_whole_calls_under_compile(kind: str) -> None:
    pattern, call = LONG[kind]
    attend = sp.attention(pattern.to("cuda"))
    q = torch.randn(1, call.q_heads, call.q_len, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, call.kv_heads, call.kv_len, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    eager = attend(q, k, v)
    assert torch.equal(attend(q, k, v, plan=attend.plan(q, k)), eager)
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, plan=attend.plan(q, k)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), eager)
