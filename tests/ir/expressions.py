"""Random expressions, built by the same constructors as the compiler's, with a plain evaluation beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from spgen.ir import expr
from spgen.ir.expr import Expr, const, var

NAMES = ("i", "j", "q_len")


@dataclass(frozen=True)
class Both:
    """An expression, and a function that computes the same value without it."""

    node: Expr
    value: Callable[[Mapping[str, int]], Any]


@dataclass(frozen=True)
class Rule:
    """How to build a node, how to compute its value, and what its operands are (see `_draw`)."""

    build: Callable[..., Expr]
    compute: Callable[..., Any]
    operands: str


_INTEGER_RULES = [
    Rule(operator.add, operator.add, "ii"),
    Rule(operator.sub, operator.sub, "ii"),
    Rule(operator.mul, operator.mul, "ii"),
    Rule(operator.floordiv, operator.floordiv, "id"),
    Rule(operator.mod, operator.mod, "id"),
    Rule(expr.minimum, min, "ii"),
    Rule(expr.maximum, max, "ii"),
    Rule(operator.and_, operator.and_, "ii"),
    Rule(operator.or_, operator.or_, "ii"),
    Rule(operator.xor, operator.xor, "ii"),
    Rule(operator.lshift, operator.lshift, "is"),
    Rule(operator.rshift, operator.rshift, "is"),
    Rule(operator.neg, operator.neg, "i"),
    Rule(operator.abs, operator.abs, "i"),
    Rule(operator.invert, operator.invert, "i"),
    Rule(expr.select, lambda c, a, b: a if c else b, "cii"),
]
_CONDITION_RULES = [
    Rule(operator.lt, operator.lt, "ii"),
    Rule(operator.le, operator.le, "ii"),
    Rule(operator.gt, operator.gt, "ii"),
    Rule(operator.ge, operator.ge, "ii"),
    Rule(Expr.eq, operator.eq, "ii"),
    Rule(Expr.ne, operator.ne, "ii"),
    Rule(operator.and_, operator.and_, "cc"),
    Rule(operator.or_, operator.or_, "cc"),
    Rule(operator.xor, operator.xor, "cc"),
    Rule(operator.invert, operator.not_, "c"),
    Rule(expr.select, lambda c, a, b: a if c else b, "ccc"),
]
# after the leaves: c is also true and false, i also small numbers and variables
_LEAVES: dict[str, list[Any]] = {
    "i": [*NAMES, *range(-9, 10)],
    "d": [1, 2, 3, 8, -1, -2, -7],
    "s": [0, 1, 2, 5],
    "c": [True, False],
}


def _leaf(value: int | str) -> Both:
    if isinstance(value, str):
        return Both(var(value), lambda env: env[value])
    return Both(const(value), lambda env: value)


def _draw(draw: st.DrawFn, kind: str, depth: int) -> Both:
    """An expression of a kind: an integer, a condition, a divisor or a shift."""
    rules = {"i": _INTEGER_RULES, "c": _CONDITION_RULES}.get(kind, [])
    if not rules or depth == 0 or (kind == "i" and draw(st.integers(0, 2)) == 0):
        return _leaf(draw(st.sampled_from(_LEAVES[kind])))
    rule = draw(st.sampled_from(rules))
    parts = [_draw(draw, operand, depth - 1) for operand in rule.operands]
    return Both(rule.build(*(p.node for p in parts)), lambda env: rule.compute(*(p.value(env) for p in parts)))


@st.composite
def _expressions(draw: st.DrawFn, kind: str, depth: int = 4) -> Both:
    return _draw(draw, kind, depth)


INTEGERS: st.SearchStrategy[Both] = _expressions("i")
CONDITIONS: st.SearchStrategy[Both] = _expressions("c")
ENVIRONMENTS: st.SearchStrategy[dict[str, int]] = st.fixed_dictionaries({name: st.integers(-50, 50) for name in NAMES})


@st.composite
def with_tables(draw: st.DrawFn) -> Expr:
    """Conditions that also read tables and per-head constants (they have no plain value)."""
    a, b, c = (_draw(draw, "i", 2).node for _ in range(3))
    numbers = expr.heads(draw(st.lists(st.integers(-9, 9), min_size=1, max_size=4)))
    reads = [
        expr.load("t", a, b).eq(c),
        expr.bit("t", a, b),
        expr.count_le("t", a, b) < c,
        expr.contains("t", a, b),
        expr.load("t", expr.load("u", a, b), c) < a,
    ]
    return draw(st.sampled_from(reads)) & (numbers + c < a)
