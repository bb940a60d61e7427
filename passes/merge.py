"""merge: terms that another contains are dropped, and runs that touch or overlap become one.

union(term(before(4)), term(before(8)))                                     ->  union(term(before(8)))
union(term(~before(i - 3), before(i)), term(~before(i), before(i + 4)))
    ->  union(term(~before(i - 3), before(i + 4)))
"""

from __future__ import annotations

from itertools import permutations

from spgen.ir.node import Op
from spgen.ir.pattern import PATTERN
from spgen.passes.normalize import bound_gap, implies, leaf_of


def merge_runs(node: Op) -> Op:
    """`node`, a union of terms, with as few terms as constants allow."""
    terms = [term.operands for term in node.operands]
    while (joined := _one_step(terms)) is not None:
        terms = joined
    return PATTERN.make("union", *(PATTERN.make("term", *term) for term in terms))


def _one_step(terms: list[tuple[Op, ...]]) -> list[tuple[Op, ...]] | None:
    """The terms with one pair replaced by its union, or None if no pair joins."""
    for a, b in permutations(range(len(terms)), 2):
        union = _union(terms[a], terms[b])
        if union is not None:
            at = min(a, b)
            rest = [term for n, term in enumerate(terms) if n not in (a, b)]
            return [*rest[:at], union, *rest[at:]]
    return None


def _union(a: tuple[Op, ...], b: tuple[Op, ...]) -> tuple[Op, ...] | None:
    """One term that equals the two, if there is one: `b` contains `a`, or both are runs that touch."""
    if all(any(implies(own, other) for own in a) for other in b):
        return b
    common = set(a) & set(b)
    (lows_a, highs_a, rest_a), (lows_b, highs_b, rest_b) = _ends(a, common), _ends(b, common)
    if rest_a or rest_b or any(len(ends) > 1 for ends in (lows_a, highs_a, lows_b, highs_b)):
        return None
    if not (_reaches(lows_b, highs_a) and _reaches(lows_a, highs_b)):
        return None
    low, high = _farther(lows_a, lows_b, lowest=True), _farther(highs_a, highs_b, lowest=False)
    if low is None or high is None:
        return None
    return (*(literal for literal in a if literal in common), *low, *high)


def _ends(term: tuple[Op, ...], common: set[Op]) -> tuple[list[Op], list[Op], list[Op]]:
    """The lower bounds, upper bounds and other literals of a term outside `common`."""
    own = [literal for literal in term if literal not in common]
    lines = [literal for literal in own if leaf_of(literal)[0].kind == "before"]
    lows = [literal for literal in lines if not leaf_of(literal)[1]]
    return lows, [line for line in lines if line not in lows], [literal for literal in own if literal not in lines]


def _reaches(lows: list[Op], highs: list[Op]) -> bool:
    """Whether a run that starts at `lows` starts no later than one that stops at `highs` stops."""
    if not lows or not highs:
        return True
    gap = bound_gap(lows[0], highs[0])
    return gap is not None and gap <= 0


def _farther(a: list[Op], b: list[Op], lowest: bool) -> list[Op] | None:
    """The looser of two bounds (none is loosest); None if it cannot be told."""
    if not a or not b:
        return []
    gap = bound_gap(a[0], b[0])
    if gap is None:
        return None
    return a if (gap <= 0) == lowest else b
