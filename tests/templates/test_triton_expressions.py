"""Expressions printed as Triton source mean what they mean in the IR: floored division, precedence, shared parts."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spgen.ir import expr
from spgen.ir.expr import Expr, const, read, select, var
from spgen.templates.render import render
from spgen.templates.triton.expressions import print_expression

RANGES = {"n": (0, None)}


class Truncating(int):
    """An integer whose division truncates, as Triton's does."""

    def __add__(self, other: int) -> Truncating:
        return Truncating(int(self) + int(other))

    def __sub__(self, other: int) -> Truncating:
        return Truncating(int(self) - int(other))

    def __rsub__(self, other: int) -> Truncating:
        return Truncating(int(other) - int(self))

    def __mul__(self, other: int) -> Truncating:
        return Truncating(int(self) * int(other))

    def __and__(self, other: int) -> Truncating:
        return Truncating(int(self) & int(other))

    def __rshift__(self, other: int) -> Truncating:
        return Truncating(int(self) >> int(other))

    def __floordiv__(self, other: int) -> Truncating:
        size = abs(int(self)) // abs(int(other))
        return Truncating(size if (self < 0) == (other < 0) else -size)

    def __rfloordiv__(self, other: int) -> Truncating:
        return Truncating(other) // self

    def __mod__(self, other: int) -> Truncating:
        return Truncating(int(self) - int(self // other) * int(other))

    def __rmod__(self, other: int) -> Truncating:
        return Truncating(other) % self

    __radd__, __rmul__, __rand__ = __add__, __mul__, __and__


def wrap(value: int) -> int:
    return value if isinstance(value, bool) else Truncating(value)


TL = SimpleNamespace(
    minimum=lambda a, b: Truncating(min(a, b)),
    maximum=lambda a, b: Truncating(max(a, b)),
    abs=lambda a: Truncating(abs(a)),
    where=lambda c, a, b: wrap(a if c else b),
)


def run(node: Expr, values: dict[str, int]) -> Any:
    """The value of the printed source, with the helpers of the template."""
    namespace: dict[str, Any] = {"tl": TL, "triton": SimpleNamespace(jit=lambda f: f)}
    exec(render("triton/operations.py.jinja", operations={"floordiv", "mod"}, deals=False, jit="triton.jit"), namespace)
    namespace.update({f"x_{name}": Truncating(value) for name, value in values.items()})
    printed = print_expression(node, {name: f"x_{name}" for name in values}, RANGES)
    exec("\n".join([*printed.lines, f"result = {printed.value}"]), namespace)
    return namespace["result"]


LEAVES = st.one_of(st.sampled_from([var("a"), var("b"), var("n")]), st.integers(-9, 9).map(const))


def _larger(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    divisors = st.one_of(st.sampled_from([-7, -4, -1, 2, 3, 8, 10]).map(const), st.just(var("n") + 1))
    conditions = st.builds(
        lambda op, a, b: expr.fold(op, a, b), st.sampled_from(["lt", "le", "eq", "ne"]), inner, inner
    )
    return st.one_of(
        st.builds(lambda op, a, b: op(a, b), st.sampled_from([expr.add, expr.sub, expr.mul]), inner, inner),
        st.builds(lambda op, a, b: op(a, b), st.sampled_from([expr.minimum, expr.maximum]), inner, inner),
        st.builds(lambda op, a, b: op(a, b), st.sampled_from([expr.floordiv, expr.mod]), inner, divisors),
        st.builds(select, conditions, inner, inner),
        st.builds(abs, inner),
        st.builds(lambda a: a + a // 3 - a % 5, inner),
    )


@given(st.recursive(LEAVES, _larger, max_leaves=12), st.integers(-50, 50), st.integers(-50, 50), st.integers(0, 50))
def test_means_the_same(node: Expr, a: int, b: int, n: int) -> None:
    values = {"a": a, "b": b, "n": n}
    assert int(run(node, values)) == int(expr.evaluate(node, values))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a // 128", "a >> 7"),
        ("a % 128 + 1", "(a & 127) + 1"),
        ("n // 3 * 3", "n // 3 * 3"),
        ("a // 3", "floor_divide(a, 3)"),
        ("n % 5", "n % 5"),
        ("(a + 1) % 5", "floor_modulo(a + 1, 5)"),
        ("a - (n - 3)", "a - n + 3"),
        ("(a < n) & (n <= 7)", "(a < n) & (n <= 7)"),
        ("a <= n", "a <= n"),
        ("~(a == n)", "a != n"),
        ("min(a, n) << 1", "tl.minimum(a, n) << 1"),
        ("load(t, n // 2, a) == -1", "load(t, n >> 1, a) == -1"),
        ("select(a < 0, -a, a)", "tl.where(a < 0, 0 - a, a)"),
    ],
)
def test_reads_well(text: str, source: str) -> None:
    printed = print_expression(read(text), {name: name for name in ("a", "b", "n", "t")}, RANGES)
    assert printed.lines == ()
    assert printed.value == source
    ast.parse(source)


def test_shared_parts_are_computed_once() -> None:
    part = var("a") * 3 + var("n")
    printed = print_expression(part * part, {"a": "a", "n": "n"}, RANGES, "column")
    assert printed.lines == ("column_0 = a * 3 + n",)
    assert printed.value == "column_0 * column_0"
