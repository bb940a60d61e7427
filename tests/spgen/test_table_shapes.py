"""The sizes of plans, known without making them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spgen as sp
from spgen.compile import Request, lower
from spgen.ir.config import Config
from spgen.ir.tiles import table_ops
from spgen.passes.schedule import Call
from spgen.patterns import Pattern
from spgen.table_shapes import Sizes, table_shapes
from spgen.target import Target
from tests.kinds import KINDS, LENGTH
from tests.lowering import Lengths, lowered_builder
from tests.passes.test_lowering import packed_cases
from tests.plans import packed_lengths
from tests.strategies import calls, patterns_of


def assert_shapes(pattern: Pattern, call: Lengths) -> None:
    levels, builder = lowered_builder(pattern, call)
    sizes = Sizes(
        call.batch, call.rows, call.keys, call.q_heads, call.kv_heads, [t.shape for t in builder.data],
        call.kv_lengths is not None,
        isinstance(call.q_offset, torch.Tensor) or (call.q_offset is None and call.kv_lengths is not None),
        call.cu_q is not None,
    )  # fmt: skip
    made = {name: tuple(table.shape) for name, table in builder.tables.items()}
    assert table_shapes(table_ops(levels.program), sizes) == made


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    assert_shapes(KINDS[kind], Lengths(LENGTH, LENGTH, 4, 2, block_m=64, block_n=32))
    lengths = torch.tensor([LENGTH, 70])
    assert_shapes(KINDS[kind], Lengths(LENGTH, LENGTH, 4, 2, 2, kv_lengths=lengths, block_m=16, block_n=64))


def test_a_fixed_offset_is_the_same_for_sequences_of_any_length() -> None:
    pattern = sp.permuted(sp.diagonals(torch.tensor([3, 1])), k=torch.randperm(16))
    assert_shapes(pattern, Lengths(8, 16, 3, 1, 2, q_offset=0, kv_lengths=torch.tensor([0, 9]), block_m=2, block_n=16))


def test_a_cover_of_columns_is_the_same_for_all_offsets() -> None:
    offsets = torch.tensor([0, 3])
    for pattern in (sp.cover(sp.stripe(1), 1, 1), sp.cover(sp.stripe(2), 2, 2), sp.cover(sp.window(3), 2, 2)):
        call = Lengths(8, 16, 3, 1, 2, q_offset=offsets, block_m=2, block_n=16)
        assert_shapes(sp.causal() & pattern, call)


@given(st.data())
def test_any_pattern(data: st.DataObject) -> None:
    call = data.draw(calls())
    tensors = st.just(torch.zeros(call.batch, dtype=torch.int32))
    lengths = Lengths(
        call.q_len, call.kv_len, call.q_heads, call.kv_heads, call.batch,
        q_offset=data.draw(st.one_of(st.none(), st.integers(-3, 9), tensors)),
        kv_lengths=data.draw(st.one_of(st.none(), tensors)), block_m=data.draw(st.sampled_from([2, 4, 16])),
    )  # fmt: skip
    assert_shapes(data.draw(patterns_of(call)), lengths)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"permuted rows"}))
def test_kinds_of_packed_batches(kind: str) -> None:
    assert_shapes(KINDS[kind], packed_lengths(block_m=64, block_n=32))
    assert_shapes(KINDS[kind], packed_lengths(kv_lengths=torch.tensor([9, 0, 4, 200, 30]), block_m=16, block_n=64))


@given(packed_cases())
def test_any_pattern_of_a_packed_batch(case: tuple[Pattern, Lengths]) -> None:
    assert_shapes(*case)


TOKENS, HEADS = 2**20, 32


def bytes_of(pattern: Pattern) -> int:
    """The size of a plan for a million tokens, 32 query heads on 8 key heads."""
    request = Request(repr(pattern), Call("bfloat16", 128, 128), HEADS, 8, False, Target.of("sm_90"))
    ops = table_ops(lower(request, Config(128, 64)).program)
    sizes = Sizes(1, TOKENS, TOKENS, HEADS, 8, [t.shape for t in pattern.data])
    shapes = table_shapes(ops, sizes).values()
    return sum(4 * batch * heads * rows * cols for batch, heads, rows, cols in shapes)


def index(*shape: int) -> torch.Tensor:
    """A tensor without memory of its own."""
    return torch.zeros(1, dtype=torch.int32).expand(shape)


streaming = sp.causal() & (sp.sink(64) | sp.window(1024))
LONG = {
    "streaming": (streaming, 0),
    "mixture": (sp.per_head([sp.causal() & sp.window(64 * (n + 1)) for n in range(HEADS)]), 1),
    "stripes": (sp.causal() & (sp.stripe(8, cols=64, shift_per_head=1) | sp.window(2048)), 0),
    "documents": (sp.documents(index(1000)), 1),
    "columns": (sp.causal() & sp.columns(index(HEADS, 1000)), 10),
    "columns for all heads": (sp.causal() & sp.columns(index(1000)), 1),
    "columns beside a window": (sp.causal() & (sp.window(1024) | sp.columns(index(HEADS, 2048))), 10),
    "vertical and slash": (sp.causal() & sp.vertical_slash(index(HEADS, 1000), index(HEADS, 6096)), 60),
    "one order of keys": (sp.causal() & sp.permuted(sp.window(1024), k=index(TOKENS)), 20),
    "all of these": (sp.causal() & (sp.vertical_slash(index(HEADS, 1000), index(HEADS, 64)) | sp.sink(4)), 60),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_million_tokens(kind: str) -> None:
    """Closed forms and lists per head stay what they are: no lists per row tile, no row of the call in a table."""
    pattern, megabytes = LONG[kind]
    assert bytes_of(pattern) <= megabytes * 1e6
    assert megabytes < 100
