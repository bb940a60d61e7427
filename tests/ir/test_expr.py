"""Expressions: text, values, simplification, ranges."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spgen.errors import TextError
from spgen.ir import expr
from spgen.ir.expr import FALSE, TRUE, Expr, const, evaluate, read, rebuild, substitute, var, walk
from spgen.ir.ranges import value_range
from tests.ir.expressions import CONDITIONS, ENVIRONMENTS, INTEGERS, NAMES, Both, with_tables

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
EITHER = st.one_of(INTEGERS, CONDITIONS)
I, J = var("i"), var("j")  # noqa: E741


@MANY
@given(EITHER, ENVIRONMENTS)
def test_constructors_keep_the_value(both: Both, env: dict[str, int]) -> None:
    found = evaluate(both.node, env)
    assert found == both.value(env)
    assert isinstance(found, bool) == both.node.is_bool


@MANY
@given(EITHER, ENVIRONMENTS)
def test_text_reads_back_to_the_same_object(both: Both, env: dict[str, int]) -> None:
    back = read(str(both.node))
    assert back is both.node
    assert evaluate(back, env) == both.value(env)
    assert pickle.loads(pickle.dumps(both.node)) is both.node


@FEW
@given(with_tables())
def test_tables_read_back_too(node: Expr) -> None:
    assert read(str(node)) is node


@MANY
@given(EITHER, ENVIRONMENTS)
def test_text_means_the_same_in_python(both: Both, env: dict[str, int]) -> None:
    """The precedences are Python's, so that text can be pasted into a program."""
    assume("false" not in str(both.node) and "true" not in str(both.node))
    helpers = {"select": lambda c, a, b: a if c else b, "min": min, "max": max, "abs": abs}
    tilde = "~" in str(both.node) and any(n.op == "not" and n.is_bool for n in walk(both.node))
    assume(not tilde)  # ~True is -2 in Python
    assert eval(str(both.node), {"__builtins__": {}}, {**helpers, **env}) == both.value(env)


@MANY
@given(EITHER)
def test_rebuilding_changes_nothing(both: Both) -> None:
    for node in walk(both.node):
        assert rebuild(node, expr.operands(node)) is node
    assert substitute(both.node, {}) is both.node


@MANY
@given(EITHER, INTEGERS, ENVIRONMENTS)
def test_substitution(both: Both, inner: Both, env: dict[str, int]) -> None:
    result = substitute(both.node, {"i": inner.node})
    assert evaluate(result, env) == both.value({**env, "i": inner.value(env)})


@MANY
@given(INTEGERS, ENVIRONMENTS, st.data())
def test_ranges_hold_the_value(both: Both, env: dict[str, int], data: st.DataObject) -> None:
    bounds = st.one_of(st.none(), st.integers(0, 20))
    ranges: dict[str, expr.Range] = {}
    for name in NAMES:
        below, above = data.draw(bounds), data.draw(bounds)
        ranges[name] = (None if below is None else env[name] - below, None if above is None else env[name] + above)
    low, high = value_range(both.node, ranges)
    value = both.value(env)
    assert low is None or low <= value
    assert high is None or value <= high


@FEW
@given(EITHER, ENVIRONMENTS)
def test_sympy_agrees(both: Both, env: dict[str, int]) -> None:
    bitwise = {"and", "or", "xor", "not"}
    for node in walk(both.node):
        assume(node.op not in ("shl", "shr", "heads"))
        assume(not (node.op in bitwise and not node.is_bool))  # sympy's are logical
        assume(not (node.op in ("xor", "select") and node.is_bool))
    found = expr.to_sympy(both.node)
    if hasattr(found, "free_symbols"):
        found = found.subs({symbol: env[str(symbol)] for symbol in found.free_symbols})
    assert bool(found) == both.value(env) if both.node.is_bool else int(found) == both.value(env)


@pytest.mark.parametrize(
    ("written", "simplified"),
    [
        ("i + 0", "i"),
        ("0 + i", "i"),
        ("3 + i + 4", "i + 7"),
        ("i + 3 - 5", "i - 2"),
        ("i - i", "0"),
        ("i + 3 - i", "3"),
        ("i + j - j", "i"),
        ("i * 1", "i"),
        ("i * 0", "0"),
        ("i // 1", "i"),
        ("i % 1", "0"),
        ("2 + 3 * 4", "14"),
        ("-7 // 2", "-4"),
        ("-7 % 4", "1"),
        ("min(i, i)", "i"),
        ("min(i + 3, i)", "i"),
        ("max(i + 3, i)", "i + 3"),
        ("min(3, min(i, 5))", "min(3, i)"),
        ("select(true, i, j)", "i"),
        ("select(i < j, i, i)", "i"),
        ("(i < j) & true", "i < j"),
        ("(i < j) & false", "false"),
        ("(i < j) | (i < j)", "i < j"),
        ("~(i < j)", "j <= i"),
        ("~(i == j)", "i != j"),
        ("~~i", "i"),
        ("3 < 4", "true"),
        ("i > j", "j < i"),
        ("i >= j", "j <= i"),
    ],
)
def test_simplifications(written: str, simplified: str) -> None:
    assert str(read(written)) == simplified


def test_true_is_not_one() -> None:
    assert const(True) is not const(1)
    assert read("true") is TRUE
    assert read("1") is not TRUE
    assert TRUE.is_bool
    assert not const(1).is_bool


def test_division_by_a_zero_constant_is_left_alone() -> None:
    assert str(const(3) // const(0)) == "3 // 0"


def test_expressions_have_no_truth_value() -> None:
    with pytest.raises(TypeError, match="no truth value"):
        bool(I < J)
    with pytest.raises(TypeError, match="cannot contain 'x'"):
        I + "x"  # type: ignore[operator]


def test_equality_is_identity() -> None:
    assert (I + J == I + J) is True
    assert (I + J != J + I) is True
    assert I.eq(J) is I.eq(J)
    assert str(I.ne(J)) == "i != j"


@pytest.mark.parametrize(
    ("text", "underlined"),
    [
        ("i +", None),
        ("i ** 2", "*"),
        ("open(i)", "open(i)"),
        ("min(i)", "min(i)"),
        ("select(i, j)", "select(i, j)"),
        ("load(t, i)", "load(t, i)"),
        ("load(3, i, j)", "load(3, i, j)"),
        ("[i]", "[i]"),
        ('"i"', '"i"'),
        ("i; j", ";"),
        ("1.5", "1.5"),
        ("(i", None),
        ("i j", "j"),
        ("i if j else 3", "if"),
        ("$0: int32[K]", "$0: int32[K]"),
        ("f(x=3)", "f(x=3)"),
        ("min(a=3, b=4)", "a=3"),
        ("é", "é"),
        ("", None),
        ("-" * 5000 + "i", None),
    ],
)
def test_bad_text_is_underlined(text: str, underlined: str | None) -> None:
    with pytest.raises(TextError) as caught:
        read(text)
    if underlined is not None:
        assert caught.value.text[caught.value.start : caught.value.end] == underlined


def test_long_chains_are_no_problem() -> None:
    """Sums and conjunctions as long as generated code may need them."""
    total = sum((var(f"x{n}") * n for n in range(200)), const(0))
    assert read(str(total)) is total
    conjunction, row = TRUE, I
    for n in range(200):
        conjunction &= row < n
    assert read(str(conjunction)) is conjunction
    assert conjunction is not FALSE


def test_shared_graphs_stay_small() -> None:
    """Doubling 200 times: hashing, equality, substitution and evaluation never unfold the graph."""
    node, twin = I, I
    for _ in range(200):
        node, twin = node * node % 1001, twin * twin % 1001
    assert node is twin
    assert len(list(walk(node))) < 1000
    assert evaluate(node, {"i": 3}) == evaluate(substitute(node, {"i": J}), {"j": 3})
    assert expr.free_variables(node) == {"i"}


def test_only_sympy_needs_sympy() -> None:
    code = "import sys, spgen.ir.expr, spgen.ir.pattern, spgen.ir.kernel; assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
