"""ownership: makes the terms of a union disjoint, each pair owned by the first term that holds it.

    union(term(before(i + 1), before(64)), term(before(i + 1), ~before(i - 1023)))
        ->  union(term(before(i + 1), before(64)), term(before(i + 1), ~before(i - 1023), ~before(64)))

Terms are ordered by the segment they will become: ranges, then runs of tiles, then gathers. A term of half-lines is
subtracted exactly, as half-lines; any other term is subtracted by its predicate. Columns that all rows share own their
pairs before diagonals do: to leave them out takes one bit for each column, and leaves their own tiles whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from spgen.ir.expr import free_variables
from spgen.ir.node import Op
from spgen.ir.pattern import PATTERN, negation
from spgen.passes.normalize import contradict, implies, leaf_of, merge


def own(node: Op) -> Op:
    """`node`, a union of terms, with disjoint terms in the order in which a kernel visits them."""
    ordered = sorted(node.operands, key=lambda term: max(map(_claim, term.operands), default=0))
    owned: list[list[Op]] = []
    for at, term in enumerate(ordered):
        pieces = [list(term.operands)]
        for earlier in ordered[:at]:
            pieces = [rest for piece in pieces for rest in _subtract(piece, earlier)]
        owned.extend(pieces)
    owned.sort(key=segment_order)
    return PATTERN.make("union", *(PATTERN.make("term", *term) for term in owned))


def segment_order(literals: Iterable[Op]) -> int:
    """0 range, 1 masked range, 2 runs of tiles, 3 gather."""
    return max(map(_driver_rank, literals), default=0)


def _claim(literal: Op) -> int:
    """The order in which terms own pairs: that of segments, but diagonals come after columns that all rows share."""
    leaf, positive, _ = leaf_of(literal)
    rank = _driver_rank(literal)
    if positive and leaf.kind == "diagonals":
        return 4
    return rank if rank < 3 else 3 if leaf["rows"] == 0 else 5


def _driver_rank(literal: Op) -> int:
    leaf, positive, _ = leaf_of(literal)
    if leaf.kind == "before":
        return 0
    if positive and leaf.kind == "listed":
        return 2 if leaf["cols"] >= 16 else 3
    if positive and leaf.kind == "diagonals":
        return 2
    return 0 if is_condition(literal) else 1


def is_condition(literal: Op) -> bool:
    """Whether the literal speaks of the head and the sequence alone."""
    leaf, _, _ = leaf_of(literal)
    return leaf.kind == "where" and not free_variables(leaf["predicate"]) & {"i", "j"}


def _subtract(piece: list[Op], earlier: Op) -> list[list[Op]]:
    """Disjoint pieces that make up `piece` without `earlier`."""
    literals = [e for e in earlier.operands if not any(implies(own, e) for own in piece)]
    if any(contradict(own, e) for own in piece for e in literals):
        return [piece]
    if not all(leaf_of(e)[0].kind == "before" or is_condition(e) for e in literals):
        return [[*piece, negation(PATTERN.make("term", *literals))]]
    pieces = []
    for at, literal in enumerate(literals):
        rest = merge([*piece, *literals[:at], negation(literal)])
        if rest is not None:
            pieces.append(rest)
    return pieces
