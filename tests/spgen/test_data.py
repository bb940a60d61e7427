"""Shapes and values of a pattern's tensors: what fits a call, and what each error says."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spgen as sp
from spgen.data import check_data, check_shapes
from spgen.errors import DataError, DeviceError, DtypeError, PatternError, ShapeError, SpgenError
from spgen.patterns import Pattern
from tests.strategies import calls, patterns_of

CALL: dict[str, Any] = {"q_len": 6, "kv_len": 10, "q_heads": 4, "kv_heads": 2, "batch": 3}


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def bools(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    "pattern",
    [
        sp.causal(),
        sp.block(4, mask=bools(2, 3)),
        sp.block(4, mask=bools(1, 2, 3)),
        sp.block(4, 3, mask=bools(1, 4, 2, 4)),
        sp.block(4, indices=zeros(3, 2, 2, 9)),
        sp.block(4, indptr=zeros(4, 3), indices=zeros(2, 20)),
        sp.top_k(zeros(6, 0)),
        sp.n_of_m(1, 4, mask=bools(6, 10)),
        sp.columns(zeros(3, 1, 0)),
        sp.permuted(sp.permuted(sp.causal(), q=zeros(6)), k=zeros(2, 10)),
        sp.per_head([sp.causal()] * 4),
        sp.per_head([sp.causal()] * 2),
        sp.documents(zeros(1)),
    ],
    ids=repr,
)
def test_shapes_that_fit(pattern: Pattern) -> None:
    check_shapes(pattern.node, pattern.data, **CALL, device="cpu")
    check_shapes(pattern.node, pattern.data, **CALL, device=torch.device("cpu"))
    check_shapes(pattern.node, [t.to("meta") for t in pattern.data], **CALL, device="meta")


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        (sp.block(4, mask=bools(3, 3)), ShapeError, r"mask \(\$0\): got R = 3 in shape \[3, 3\].*R = 2, exactly: ceil"),
        (sp.block(4, mask=bools(2, 2)), ShapeError, r"C = 2 in.*C = 3, exactly: .*= ceil\(10 / 4\)"),
        (sp.block(4, mask=bools(3, 2, 3)), ShapeError, r"3 heads in.*1, 2 \(the key heads\) or 4 \(the query"),
        (sp.block(4, mask=bools(2, 4, 2, 3)), ShapeError, "batch 2 in shape.*1 or 3"),
        (sp.block(4, indices=zeros(1, 5)), ShapeError, r"block: indices \(\$0\): got R = 1"),
        (sp.block(4, indptr=zeros(4), indices=zeros(9)), ShapeError, r"block: indptr \(\$1\): got P = 4.*P = 3"),
        (sp.top_k(zeros(5, 2)), ShapeError, "top_k: index.*R = 6"),
        (sp.top_k(zeros(6, 2), rows=2), ShapeError, "top_k: index.*R = 3"),
        (sp.n_of_m(1, 4, mask=bools(6, 9)), ShapeError, "n_of_m: mask.*C = 10, exactly: 10 keys"),
        (sp.n_of_m(1, 4, mask=bools(5, 10)), ShapeError, "n_of_m: mask.*R = 6, exactly: 6 rows"),
        (sp.permuted(sp.causal(), q=zeros(10)), ShapeError, "permuted: q.*N = 6"),
        (sp.permuted(sp.causal(), k=zeros(6)), ShapeError, "permuted: k.*N = 10"),
        (sp.columns(zeros(3, 4)), ShapeError, "columns: index.*3 heads"),
        (sp.causal() & sp.per_head([sp.sink(1)] * 3), PatternError, "per_head: got 3 patterns.*4 .*or 2 .*remedy"),
        (sp.columns(zeros(4)).to("meta"), DeviceError, r"tensor on meta.*cpu, where q and k are.*pattern\.to"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(pattern: Pattern, error: type[SpgenError], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        check_shapes(pattern.node, pattern.data, **CALL, device="cpu")


def test_tensors_are_checked_against_their_slots() -> None:
    """What reaches the compiler as text and tensors is checked like what the constructors got."""
    node = sp.columns(zeros(1, 4, 5)).node
    check_shapes(node, [zeros(1, 4, 7)], **CALL)
    for data, error, message in [
        ([], PatternError, "got 0 tensors"),
        ([zeros(3, 4, 5)], ShapeError, r"shape \[3, 4, 5\]"),
        ([zeros(1, 2, 5)], ShapeError, r"shape \[1, 2, 5\]"),
        ([zeros(5)], ShapeError, r"shape \[5\]"),
        ([zeros(1, 4, 5, dtype=torch.int64)], DtypeError, "int64"),
        ([torch.zeros(1, 4, 5)], DtypeError, "float32"),
    ]:
        with pytest.raises(error, match=message):
            check_shapes(node, data, **CALL)


def ints(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (sp.columns(ints([1, 2], [3, 10])), r"columns: index \(\$0\) at \(h=1, 1\): got 10.*-1 to 9: one of 10 keys"),
        (sp.columns(ints(4, -1, -2)), r"at \(2\): got -2.*remedy: pad with -1"),
        (sp.columns(ints([[0]], [[0]], [[11]])), r"at \(b=2, h=0, 0\): got 11"),
        (sp.diagonals(ints(0, 9, 10)), r"diagonals: offsets \(\$0\) at \(2\): got 10.*-9 to 9.*repeating"),
        (sp.vertical_slash(ints(0), ints(-10)), r"vertical_slash: offsets \(\$1\) at \(0\): got -10"),
        (sp.vertical_slash(ints(10), ints(0)), r"vertical_slash: columns \(\$0\) at \(0\): got 10"),
        (sp.block(4, indices=ints([0, 1], [2, 3])), r"indices \(\$0\) at \(r=1, 1\): got 3.*-1 to 2: one of 3 tiles"),
        (sp.top_k(torch.full((4, 3, 1), 10), rows=2), r"top_k: index \(\$0\) at \(h=0, r=0, 0\): got 10"),
        (sp.block(4, indptr=ints(0, 1, 2), indices=ints(0, 3)), r"block: indices \(\$0\) at \(1\): got 3"),
        (sp.block(4, indptr=ints(0, 2, 1), indices=ints(0, 1)), r"indptr \(\$1\) at \(2\): got 1.*least 2, the bound"),
        (sp.block(4, indptr=ints(-1, 0, 1), indices=ints(0, 1)), r"block: indptr \(\$1\) at \(0\): got -1"),
        (sp.block(4, indptr=ints(0, 1, 3), indices=ints(0, 1)), r"block: indptr \(\$1\) at \(2\): got 3.*at most 2"),
        (sp.documents(ints(0, 5, 3, 9)), r"documents: cu_seqlens \(\$0\) at \(2\): got 3.*at least 5.*cumulative"),
        (sp.documents(ints(-3, 5)), r"documents: cu_seqlens \(\$0\) at \(0\): got -3"),
        (sp.permuted(sp.causal(), q=ints(0, 1, 2, 3, 4, 6)), r"permuted: q \(\$0\) at \(5\): got 6.*0 to 5.*argsort"),
        (sp.permuted(sp.causal(), q=ints([0, 1, 2, 3, 4, 5], [0, 1, 5, 3, 1, 4])), r"\(h=1, 4\): got 1.*came before"),
        (sp.permuted(sp.causal(), k=ints(0, 1, 2, 3, 4, 5, 6, 7, -1, 8)), r"permuted: k \(\$0\) at \(8\): got -1"),
        (sp.n_of_m(2, 4, mask=torch.ones(6, 10, dtype=torch.bool)), r"mask \(\$0\), group at \(r=0, 0\): got 4"),
    ],
)  # fmt: skip
def test_values_that_contradict_themselves(pattern: Pattern, message: str) -> None:
    check_shapes(pattern.node, pattern.data, **CALL)
    with pytest.raises(DataError, match=f"(?s){message}"):
        check_data(pattern.node, pattern.data, **CALL)


@pytest.mark.parametrize(
    "pattern",
    [
        sp.columns(ints(-1, 9, 9, 0)),
        sp.diagonals(ints(-9, 9, -1, -1)),
        sp.block(4, mask=bools(2, 3)),
        sp.block(4, indices=ints([0, -1], [2, 2])),
        sp.block(4, indptr=ints([0, 0, 2], [0, 3, 3]), indices=ints(0, -1, 2)),
        sp.n_of_m(2, 4, mask=torch.eye(10, dtype=torch.bool)[:6]),
        sp.documents(ints(2, 2, 5, 10)),
        sp.permuted(sp.causal(), q=ints(5, 4, 3, 2, 1, 0), k=ints(*range(10))),
    ],
    ids=repr,
)
def test_values_that_are_right(pattern: Pattern) -> None:
    check_shapes(pattern.node, pattern.data, **CALL)
    check_data(pattern.node, pattern.data, **CALL)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_patterns_fit_their_call(data: st.DataObject) -> None:
    call = data.draw(calls())
    pattern = data.draw(patterns_of(call))
    sizes: dict[str, Any] = {name: size for name, size in vars(call).items() if name != "rows"}
    check_shapes(pattern.node, pattern.data, **sizes, device="cpu")
    with suppress(DataError):  # random data hold mistakes; any other error is a mistake of the check
        check_data(pattern.node, pattern.data, **sizes)
