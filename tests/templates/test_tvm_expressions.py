"""Expressions as builder code: the text, and its value when the builder's operations are Python's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spgen.ir.expr import evaluate, free_variables, read
from spgen.templates.tvm.expressions import builder_text, is_truth

NAMES = {name: name for name in ("i", "j", "p", "odd")} | {"table:lists": "lists_table"}
RANGES = {"p": (0, None), "j": (0, None)}


def text(expression: str) -> str:
    return builder_text(read(expression), NAMES, booleans={"odd"}, ranges=RANGES)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("7", "T.int32(7)"),
        ("true", "T.bool(True)"),
        ("i - 40", "i - 40"),
        ("p // 6 * 15 + p % 6", "div(p, 6) * 15 + mod(p, 6)"),
        ("i // 7 + i % -3", "floordiv(i, 7) + floormod(i, -3)"),
        ("i // 16 + i % 16", "(i >> 4) + (i & 15)"),
        ("(j <= i) & (i - 100 < j)", "(j <= i) & (i - 100 < j)"),
        ("min(i, abs(j)) == 3", "equal(T.min(i, T.abs(j)), 3)"),
        ("select(odd, i, j) + 1", "select(odd, i, j) + 1"),
        ("odd & (j % 3 == 0)", "odd & equal(mod(j, 3), 0)"),
        ("odd + 1", "number(odd) + 1"),
        ("~(odd | (i < j))", "T.Not(odd | (i < j))"),
        ("~i & 7", "~(i) & 7"),
        ("(i < j) ^ odd", "unequal(number((i < j)), number(odd))"),
        ("load(lists, 0, p // 64) * 64", "load(lists_table, 0, p >> 6) * 64"),
        (
            "bit(lists, i, j) & (count_le(lists, 0, i) < 2)",
            "bit(lists_table, i, j) & (count_le(lists_table, 0, i) < 2)",
        ),
        ("word(lists, 0, i - j) >> 3", "word(lists_table, 0, i - j) >> 3"),
        ("i - (j - (i << 1 >> 2))", "i - (j - (i << 1 >> 2))"),
    ],
)
def test_text(expression: str, expected: str) -> None:
    assert text(expression) == expected


def test_truth() -> None:
    assert is_truth(read("odd & i"), {"odd"})
    assert is_truth(read("select(i < 3, odd, true)"), {"odd"})
    assert not is_truth(read("select(odd, i, 3)"), {"odd"})


BUILDER = {
    "T": SimpleNamespace(min=min, max=max, abs=abs, int32=int, bool=bool, Not=lambda a: not a),
    "div": lambda a, b: a // b if a >= 0 and b >= 0 else pytest.fail("div of what may be negative"),
    "mod": lambda a, b: a % b if a >= 0 and b >= 0 else pytest.fail("mod of what may be negative"),
    "floordiv": lambda a, b: a // b,
    "floormod": lambda a, b: a % b,
    "select": lambda c, a, b: a if c else b,
    "equal": lambda a, b: a == b,
    "unequal": lambda a, b: a != b,
    "number": int,
}

_integers = st.deferred(
    lambda: st.one_of(
        st.sampled_from(["i", "j", "p"]),
        st.integers(0, 40).map(str),
        st.tuples(_integers, st.sampled_from(["+", "-", "*"]), _integers).map(lambda x: f"({x[0]} {x[1]} {x[2]})"),
        st.tuples(_integers, st.sampled_from(["//", "%"]), st.sampled_from(["1", "3", "8", "-4", "11"])).map(
            lambda x: f"({x[0]} {x[1]} {x[2]})"
        ),
        st.tuples(st.sampled_from(["min", "max"]), _integers, _integers).map(lambda x: f"{x[0]}({x[1]}, {x[2]})"),
        st.tuples(_truths, _integers, _integers).map(lambda x: f"select({x[0]}, {x[1]}, {x[2]})"),
    )
)
_truths = st.deferred(
    lambda: st.one_of(
        st.just("odd"),
        st.tuples(_integers, st.sampled_from(["<", "<=", "==", "!=", ">"]), _integers).map(
            lambda x: f"({x[0]} {x[1]} {x[2]})"
        ),
        st.tuples(_truths, st.sampled_from(["&", "|", "^"]), _truths).map(lambda x: f"({x[0]} {x[1]} {x[2]})"),
        _truths.map(lambda x: f"(~{x})"),
    )
)


@given(expression=st.one_of(_integers, _truths), i=st.integers(-50, 50), j=st.integers(0, 50), p=st.integers(0, 50))
def test_value(expression: str, i: int, j: int, p: int) -> None:
    node = read(expression)
    for odd in (False, True) if "odd" in free_variables(node) else (True,):
        values = {"i": i, "j": j, "p": p, "odd": odd}
        assert eval(text(expression), {**BUILDER, **values}) == evaluate(node, values)
