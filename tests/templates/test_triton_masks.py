"""Masks rearranged: the same truth values, rows and columns computed apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spgen.ir import expr
from spgen.ir.expr import Expr, const, evaluate, read, select, var
from spgen.templates.triton.expressions import print_mask
from spgen.templates.triton.masks import Places, separate

PLACES = Places(frozenset({"i", "s"}), frozenset({"j", "c", "inside"}))
NAMES = {name: name for name in ("i", "s", "j", "c", "inside", "base", "bits", "ends")}


@pytest.mark.parametrize(
    ("text", "separated"),
    [
        ("j <= i", "j <= i"),
        ("i - j < 40", "i - 40 < j"),
        ("i - j + base + 9 < 40 - s", "i + base + s - 31 < j"),
        ("(j <= i) & (c < base) & (i - 100 < j)", "(select(c < base, j, 2147483647) <= i) & (i - 100 < j)"),
        ("(i - 100 < j) & (c < base)", "i - 100 < select(c < base, j, -2147483648)"),
        ("word(bits, 0, base - j) >> s & 1 != 0", "word(bits, 0, base - j) & 1 << s != 0"),
        ("word(bits, 0, base - j) >> s & 1 == 1", "word(bits, 0, base - j) & 1 << s != 0"),
        (
            "(word(bits, 0, base - j) >> s & 1 == 0) & (j < 7)",
            "select(j < 7, word(bits, 0, base - j), -1) & 1 << s == 0",
        ),
        (
            "(select(s < 32, load(bits, 0, c), load(bits, 1, c)) >> s % 32 & 1 != 0) & (j < 7)",
            "select(s < 32, select(j < 7, load(bits, 0, c), 0), select(j < 7, load(bits, 1, c), 0)) & 1 << s % 32 != 0",
        ),
        ("(i - j + base) % 5 == 0", "(i + base - j) % 5 == 0"),
        ("(j <= load(ends, 0, i)) & (c < 3)", "(j <= load(ends, 0, i)) & (c < 3)"),
    ],
)
def test_rows_and_columns_meet_late(text: str, separated: str) -> None:
    assert str(separate(read(text), PLACES)) == separated


def test_columns_are_computed_once_and_dealt_out() -> None:
    mask = separate(read("(word(bits, 0, base - j) >> s - base & 1 != 0) & (c < 9)"), PLACES)
    printed = print_mask(mask, NAMES, {}, PLACES, "mask")
    assert printed.lines == (
        "mask_0 = deal(tl.where(c < 9, word(bits, 0, base - j), 0))",
        "mask_1 = 1 << s - base",
    )
    assert printed.value == "mask_0[None, :] & mask_1[:, None] != 0"


def test_columns_that_tables_give_are_dealt_out_too() -> None:
    printed = print_mask(read("j <= i"), NAMES, {}, PLACES, "mask", frozenset({"j"}))
    assert printed.lines == ("mask_0 = deal(j)",)
    assert printed.value == "mask_0[None, :] <= i[:, None]"
    assert print_mask(read("j < 9"), NAMES, {}, PLACES, "mask").value == "mask_0[None, :]"


LEAVES = st.one_of(st.sampled_from([var(name) for name in "isjc"]), st.integers(-9, 9).map(const))


def _sums(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.builds(lambda op, a, b: op(a, b), st.sampled_from([expr.add, expr.sub, expr.mul]), inner, inner),
        st.builds(lambda a, n: a // n, inner, st.integers(1, 5)),
        st.builds(lambda a, n: a % n, inner, st.integers(1, 5)),
    )


SUMS = st.recursive(LEAVES, _sums, max_leaves=6)
TESTS = st.one_of(
    st.builds(lambda op, a, b: expr.fold(op, a, b), st.sampled_from(["lt", "le", "eq", "ne"]), SUMS, SUMS),
    st.builds(
        lambda op, x, n, v: expr.fold(op, (x >> n % 8) & 1, const(v)),
        st.sampled_from(["eq", "ne"]), SUMS, LEAVES, st.integers(0, 1),
    ),
)  # fmt: skip
MASKS = st.recursive(
    TESTS,
    lambda inner: st.one_of(
        st.builds(lambda op, a, b: op(a, b), st.sampled_from([expr.and_, expr.or_]), inner, inner),
        st.builds(expr.not_, inner),
        st.builds(select, inner, inner, inner),
    ),
    max_leaves=6,
)


@given(MASKS, st.tuples(*[st.integers(-20, 20)] * 4))
def test_the_same_truth_values(mask: Expr, values: tuple[int, ...]) -> None:
    variables = dict(zip("isjc", values, strict=True))
    assert bool(evaluate(separate(mask, PLACES), variables)) == bool(evaluate(mask, variables))
