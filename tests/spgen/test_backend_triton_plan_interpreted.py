"""Plans by kernels in Triton's interpreter, against tensor operations: in a process of their own (TRITON_INTERPRET=1).

Started by test_backend_triton_plan.py; the interpreter changes Triton for the rest of its process.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spgen as sp
from spgen.patterns import Pattern
from spgen.settings import triton_interpreted
from spgen.templates.triton import plan
from tests.kinds import KINDS, LENGTH
from tests.lowering import Lengths
from tests.passes.test_lowering import packed_cases
from tests.plans import assert_same_tables, packed_lengths, planned
from tests.strategies import calls, patterns_of

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's sort takes seconds for long lists."""
    monkeypatch.setattr(plan, "LIST_LANES", (8, 16, 32))


@pytest.mark.usefixtures("few_lanes")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    lengths = torch.tensor([LENGTH, 70])
    call = Lengths(LENGTH, LENGTH, 4, 2, 2, kv_lengths=lengths, block_m=64, block_n=32)
    assert_same_tables(KINDS[kind], call)


@settings(max_examples=8)
@given(st.data())
def test_any_pattern(data: st.DataObject) -> None:
    call = data.draw(calls())
    per_sequence = st.lists(st.integers(-2, call.kv_len + 2), min_size=call.batch, max_size=call.batch)
    tensors = st.builds(torch.tensor, per_sequence, dtype=st.sampled_from([torch.int32, torch.int64]))
    lengths = Lengths(
        call.q_len, call.kv_len, call.q_heads, call.kv_heads, call.batch,
        q_offset=data.draw(st.one_of(st.none(), st.integers(-3, 9), tensors)),
        kv_lengths=data.draw(st.one_of(st.none(), tensors)),
        block_m=data.draw(st.sampled_from([2, 4, 16])), block_n=data.draw(st.sampled_from([2, 8, 16])),
    )  # fmt: skip
    assert_same_tables(data.draw(patterns_of(call)), lengths)


@pytest.mark.usefixtures("few_lanes")
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"permuted rows"}))
def test_kinds_of_packed_batches(kind: str) -> None:
    assert_same_tables(KINDS[kind], packed_lengths(block_m=64, block_n=32))


@settings(max_examples=15)
@given(packed_cases())
def test_any_pattern_of_a_packed_batch(case: tuple[Pattern, Lengths]) -> None:
    assert_same_tables(*case)


LISTS = {  # (entries of a list, keys, blocks of columns): each way of making a list
    "sorted": (13, 5000, 1), "marked": (70, 5000, 1), "marked, of few units": (30, 5000, 64),
    "sorted, of many units": (30, 70000, 1),
}  # fmt: skip


@pytest.mark.usefixtures("few_lanes")
@pytest.mark.parametrize("kind", LISTS)
def test_long_lists(kind: str) -> None:
    entries, keys, cols = LISTS[kind]
    index = torch.randint(-3, keys // cols + 3, (2, entries), dtype=torch.int32)
    pattern = sp.columns(index) if cols == 1 else sp.block(64, cols, indices=index[:, None].contiguous())
    call = Lengths(64, keys, 2, 2, block_m=64, block_n=64)
    made_by = assert_same_tables(pattern, call)
    _, builder, _ = planned(pattern, call)
    assert made_by.planning(builder).works[0].method == kind.partition(",")[0]


def _lists(entries: int) -> Pattern:
    return sp.top_k(torch.randint(-3, 300, (2, 40, entries)), rows=3)


def _compressed_rows() -> Pattern:
    indptr = torch.nn.functional.pad(torch.randint(0, 9, (2, 40)).cumsum(-1), (1, 0))
    return sp.block(3, 4, indptr=indptr, indices=torch.randint(-3, 75, (2, int(indptr.max()))))


@pytest.mark.usefixtures("few_lanes")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("pattern", "methods"),
    [(_lists(2), ["sorted", "groups"]), (_lists(20), ["marked"]), (_compressed_rows(), ["marked"])],
    ids=["sorted", "marked", "compressed rows"],
)
def test_groups_of_united_lists(pattern: Pattern, methods: list[str], packed: bool) -> None:
    """By bisection in a sorted list, or beside a bitmap; row tiles that cut groups of rows."""
    cu = torch.tensor([2, 57, 57, 110])
    boundaries = {"cu_q": cu, "cu_k": 2 * cu} if packed else {}
    call = Lengths(118, 290, 2, 2, 3 if packed else 1, block_m=16, block_n=16, **boundaries)
    made_by = assert_same_tables(pattern, call)
    _, builder, _ = planned(pattern, call)
    works = made_by.planning(builder).works
    assert [work.method for work in works if work.op.kind in ("units", "groups")] == methods


def test_many_units_of_one_row_tile() -> None:
    """Words that are nearly full are listed bit by bit, behind others that are not."""
    index = torch.cat([torch.randint(40000, 43000, (32, 150)), torch.randint(0, 43000, (32, 4))], 1)
    assert_same_tables(sp.top_k(index), Lengths(32, 43000, block_m=32, block_n=64))


@pytest.mark.usefixtures("few_lanes")
def test_orders_of_the_rows_of_a_packed_batch() -> None:
    order = torch.stack([torch.randperm(20), torch.cat([torch.randperm(9), torch.full((11,), -1)])])[:, None]
    cu = torch.tensor([4, 24, 33])
    for pattern in (
        sp.causal() & sp.permuted(sp.window(5), q=order),
        sp.permuted(sp.block(8, 4, mask=torch.rand(3, 5) < 0.5), q=order, k=order),
    ):
        assert_same_tables(pattern, Lengths(20, 20, batch=2, cu_q=cu, cu_k=cu, block_m=8, block_n=8))


@pytest.mark.usefixtures("few_lanes")
def test_more_offsets_than_are_sorted_together() -> None:
    offsets = torch.randint(-5, 600, (100,))
    assert_same_tables(sp.causal() & sp.diagonals(offsets), Lengths(70, 600, block_m=64, block_n=32))


def test_strided_data() -> None:
    mask = torch.rand(40, 2, 80) < 0.3
    index = torch.randint(0, 90, (5, 40, 2))
    call = Lengths(80, 80, 2, 2, block_m=16, block_n=16)
    assert_same_tables(sp.block(2, 1, mask=mask.transpose(0, 1)), call)
    assert_same_tables(sp.top_k(index.permute(2, 1, 0), rows=2), call)
