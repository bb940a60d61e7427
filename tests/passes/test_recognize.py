"""Predicates and what they are recognised as hold the same pairs, on any positions; and kernels walk fewer columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spgen as sp
from spgen.compile import level_1
from spgen.ir import expr
from spgen.ir.expr import Expr, const, var
from spgen.ir.linear import linear
from spgen.ir.node import Op, walk
from spgen.passes.normalize import normalize
from spgen.passes.recognize import recognize
from spgen.patterns import Pattern
from tests.ir.expressions import CONDITIONS, ENVIRONMENTS, INTEGERS
from tests.lowering import Lengths, lowered_pairs

VARIABLES = tuple(map(var, "bhij"))
PLACES = [(b, h, i, j) for b in (0, 1) for h in (0, 3) for i in (-7, -1, 0, 3, 8, 17, 20) for j in (0, 1, 4, 9, 16, 19)]


def holds(op: Op, env: dict[str, int]) -> bool:
    """Membership, written from what the operations mean."""
    if op.kind in ("and", "or"):
        return (all if op.kind == "and" else any)(holds(operand, env) for operand in op.operands)
    if op.kind == "not":
        return not holds(op.operands[0], env)
    if op.kind == "before":
        return bool(env["j"] < expr.evaluate(op["bound"], env))
    if op.kind == "where":
        return bool(expr.evaluate(op["predicate"], env))
    if op.kind == "stripe":
        i, j = env["i"] // op["cols"], env["j"] // op["cols"]
        x = i - j if op["relative"] else j
        return bool((x - op["offset"] - env["h"] * op["shift_per_head"]) % op["stride"] < op["width"])
    assert op.kind == "dense"
    return True


def atoms(draw: st.DrawFn) -> Expr:
    """Integers of rows, columns, heads and sequences, as masks use them."""
    b, h, i, j = VARIABLES
    size, shift = draw(st.sampled_from([1, 2, 3, 8, 300])), draw(st.integers(-5, 5))
    forms = [
        i, j, i - j, j - i, j // size, i // size, i // size - j // size, (i - j) // size, j * 2 + i, i + j, b, h,
        abs(i - j), abs(i // size - j // size), expr.minimum(j, i + shift), expr.maximum(i - j, h), j % size,
        (j // 2 - h * 2 + shift) % (size + 3), (i - j + shift) % (size + 3), (j - i + h) % 300, j >> 1, i << 1,
        expr.select(h < 2, i, j), i * 3 - j * 2, const(4),
    ]  # fmt: skip
    return draw(st.sampled_from(forms)) + draw(st.sampled_from([0, shift]))


@st.composite
def conditions(draw: st.DrawFn, depth: int = 3) -> Expr:
    kind = draw(st.integers(0, 9)) if depth else 0
    if kind < 5:
        compare: Any = draw(
            st.sampled_from([Expr.__lt__, Expr.__le__, Expr.__gt__, Expr.__ge__, Expr.eq, Expr.ne, Expr.__lt__])
        )
        found: Expr = compare(atoms(draw), draw(st.sampled_from([const(draw(st.integers(-3, 20))), atoms(draw)])))
        return found
    a, b, c = (draw(conditions(depth - 1)) for _ in range(3))
    return [a & b, a | b, ~a, a ^ b, expr.select(a, b, c)][kind - 5]


@settings(max_examples=400)
@given(conditions())
def test_recognized_conditions_hold_the_same_pairs(predicate: Expr) -> None:
    if predicate.op == "const":
        return
    found = recognize(Op("pattern.where", (), (("predicate", predicate),)))
    for place in PLACES:
        env = dict(zip("bhij", place, strict=True))
        assert holds(found, env) == expr.evaluate(predicate, env), (str(found), env)


@settings(max_examples=300)
@given(CONDITIONS, ENVIRONMENTS)
def test_so_do_any_conditions(both: Any, env: dict[str, int]) -> None:
    node = expr.substitute(both.node, {"q_len": var("h")})
    if node.op != "const":
        place = {"i": env["i"], "j": abs(env["j"]), "h": env["q_len"]}
        found = recognize(Op("pattern.where", (), (("predicate", node),)))
        assert holds(found, place) == expr.evaluate(node, place)


@given(conditions())
def test_half_lines_never_fall(predicate: Expr) -> None:
    if predicate.op == "const":
        return
    for op in walk(recognize(Op("pattern.where", (), (("predicate", predicate),)))):
        if op.kind == "before":
            bounds = [expr.evaluate(op["bound"], {"i": i, "h": 3, "b": 1}) for i in range(-20, 40)]
            assert bounds == sorted(bounds)


@given(conditions())
def test_few_terms(predicate: Expr) -> None:
    if predicate.op != "const":
        found = normalize(recognize(Op("pattern.where", (), (("predicate", predicate),))))
        assert len(found.operands) <= 8
        masks = [
            term for term in found.operands
            if any(op.kind == "where" and expr.free_variables(op["predicate"]) & {"i", "j"} for op in walk(term))
        ]  # fmt: skip
        assert len(masks) <= 8


@settings(max_examples=60)
@given(conditions(), st.sampled_from([(20, 20), (7, 30), (30, 7)]), st.sampled_from([None, 0, 5]))
def test_kernels_visit_the_oracles_pairs(predicate: Expr, lengths: tuple[int, int], offset: int | None) -> None:
    if predicate.op == "const":
        return
    pattern = Pattern(Op("pattern.where", (), (("predicate", predicate),)))
    call: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "batch": 2, "q_offset": offset}
    found = lowered_pairs(pattern, Lengths(*lengths, block_m=8, block_n=8, **call))
    assert torch.equal(found, pattern.mask(*lengths, **call))


@given(INTEGERS, ENVIRONMENTS)
def test_sums_keep_their_value(both: Any, env: dict[str, int]) -> None:
    total = linear(both.node)
    assert expr.evaluate(total.expression(), env) == both.value(env)
    assert total.plus(total.times(-1)).expression() is const(0)


@pytest.mark.parametrize(
    ("predicate", "closed"),
    [
        (sp.where(lambda i, j: j <= i), sp.causal()),
        (sp.where(lambda i, j: (i >= j) & (i - j < 9)), sp.causal() & sp.window(9)),
        (sp.where(lambda i, j: (i - j < 9) & (j - i <= 3)), sp.window(9, 3)),
        (
            sp.where(lambda i, j: (j <= i) & ((j < 4) | (i - j < 9))),
            sp.causal() & (sp.sink(4) | sp.window(9)),
        ),
        (sp.where(lambda i, j: j % 16 == 5), sp.stripe(16, offset=5)),
    ],
)
def test_a_predicate_and_its_closed_form_are_one_kernel(predicate: Pattern, closed: Pattern) -> None:
    assert level_1(predicate.node) is level_1(closed.node)


def test_chains_of_exclusive_or_take_no_exponential_time() -> None:
    chain = sp.where(lambda i, j: j < i)
    *_, i, j = VARIABLES
    node = chain.node["predicate"]
    for n in range(60):
        node = node ^ (i - j).eq(n)
    assert recognize(Op("pattern.where", (), (("predicate", node),)))
