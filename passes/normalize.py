"""normalize: disjunctive normal form, with contradictions dropped and half-lines merged.

    before(i + 1) & (before(64) | ~before(i - 1023))
        ->  union(term(before(i + 1), before(64)), term(before(i + 1), ~before(i - 1023)))

A `term` is a conjunction of literals; a literal is a leaf, `permuted` or not, negated or not. A union without terms
holds nothing; a term without literals holds everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spgen.ir import expr
from spgen.ir.expr import FALSE, TRUE, Expr
from spgen.ir.node import Op
from spgen.ir.pattern import PATTERN, negation

# Beyond this many terms loops cost more than they skip: the pattern is then one term, masked by its predicate.
MAX_TERMS = 16


def normalize(node: Op) -> Op:
    """The union of terms that equals `node`."""
    terms = _terms(node, False)
    if terms is None:
        return union([[node]])
    return union(terms)


def union(terms: Iterable[Sequence[Op]]) -> Op:
    """A union of the different terms that can hold something."""
    merged = [term for term in map(merge, terms) if term is not None]
    unique = dict.fromkeys(tuple(term) for term in merged)
    return PATTERN.make("union", *(PATTERN.make("term", *term) for term in unique))


def _terms(node: Op, negated: bool) -> list[list[Op]] | None:
    """The terms of `node` (or of its complement); None if there are too many."""
    if node.kind == "not":
        return _terms(node.operands[0], not negated)
    if node.kind == "dense":
        return [] if negated else [[]]
    if node.kind not in ("and", "or"):
        return [[negation(node) if negated else node]]
    left, right = (_terms(operand, negated) for operand in node.operands)
    if left is None or right is None:
        return None
    if (node.kind == "or") != negated:
        found = left + right
    else:
        found = [term for a in left for b in right if (term := merge([*a, *b])) is not None]
    found = [list(term) for term in dict.fromkeys(map(tuple, found))]
    return found if len(found) <= MAX_TERMS else None


def merge(literals: Iterable[Op]) -> list[Op] | None:
    """The literals of a conjunction without redundant ones; None if they contradict each other."""
    kept: list[Op] = []
    for literal in dict.fromkeys(literals):
        truth = _truth(literal)
        if truth is False or any(contradict(literal, other) for other in kept):
            return None
        if truth is True or any(implies(other, literal) for other in kept):
            continue
        kept = [other for other in kept if not implies(literal, other)] + [literal]
    return kept


def leaf_of(literal: Op) -> tuple[Op, bool, Op]:
    """(leaf, whether it is positive, the literal without its sign) of a literal."""
    positive = literal.kind != "not"
    body = literal if positive else literal.operands[0]
    return (body.operands[0] if body.kind == "permuted" else body), positive, body


def _truth(literal: Op) -> bool | None:
    leaf, positive, _ = leaf_of(literal)
    if leaf.kind == "dense":
        return positive
    if leaf.kind == "where" and leaf["predicate"] in (TRUE, FALSE):
        return bool((leaf["predicate"] is TRUE) == positive)
    if leaf.kind == "before":
        known = leaf["bound"]
        if known.op == "const" and known.args[0] <= 0:
            return not positive  # no key lies before the first
    return None


def bound_gap(a: Op, b: Op) -> int | None:
    """bound(a) - bound(b) for half-lines in the same space, when it is a constant."""
    leaf_a, _, body_a = leaf_of(a)
    leaf_b, _, body_b = leaf_of(b)
    if leaf_a.kind != "before" or leaf_b.kind != "before":
        return None
    if _space(body_a) != _space(body_b):
        return None
    gap = expr.sub(leaf_a["bound"], leaf_b["bound"])
    return int(gap.args[0]) if gap.op == "const" else None


def _space(body: Op) -> tuple[object, object]:
    return (body["q"], body["k"]) if body.kind == "permuted" else (None, None)


def contradict(a: Op, b: Op) -> bool:
    """Whether no pair can satisfy both literals (as far as constants tell)."""
    if negation(a) is b:
        return True
    (leaf_a, positive_a, _), (leaf_b, positive_b, _) = leaf_of(a), leaf_of(b)
    gap = bound_gap(a, b)
    if gap is not None and positive_a != positive_b:
        return gap <= 0 if positive_a else gap >= 0
    if leaf_a.kind == leaf_b.kind == "where" and positive_a and positive_b:
        return _different_cases(leaf_a["predicate"], leaf_b["predicate"])
    return False


def _different_cases(a: Expr, b: Expr) -> bool:
    """x == 1 and x == 2."""
    return a.op == b.op == "eq" and a.args[0] is b.args[0] and a is not b and a.args[1].op == b.args[1].op == "const"


def implies(a: Op, b: Op) -> bool:
    """Whether literal `a` makes `b` redundant (as far as constants tell)."""
    if a is b:
        return True
    (leaf_a, positive_a, _), (leaf_b, positive_b, _) = leaf_of(a), leaf_of(b)
    gap = bound_gap(a, b)
    if gap is not None and positive_a == positive_b:
        return gap <= 0 if positive_a else gap >= 0
    if leaf_a.kind == leaf_b.kind == "where" and positive_a and not positive_b:
        return _different_cases(leaf_a["predicate"], leaf_b["predicate"])
    return False
