"""hull: the pattern without what its data select, which is what dense attention would compute in its place.

    causal() & (block(64, indices=…) | window(1024))  ->  causal()        causal() & window(1024)  ->  itself

Lists, masks of blocks, columns and diagonals say which pairs matter most. Closed forms, documents and permutations say
which pairs there are, and stay.
"""

from __future__ import annotations

from spgen.ir.expr import var
from spgen.ir.node import Op
from spgen.ir.pattern import PATTERN
from spgen.passes.normalize import implies, leaf_of, union
from spgen.passes.ownership import own

_SELECT = ("listed", "diagonals")


def hull(terms: Op) -> Op:
    """The disjoint terms of the hull of disjoint terms: a superset of their pairs."""
    kept = [[literal for literal in term.operands if not _selects(literal)] for term in terms.operands]
    return own(union(kept))


def _selects(literal: Op) -> bool:
    """Whether a literal speaks of selections alone; ownership subtracts whole terms, too."""
    leaf, _, body = leaf_of(literal)
    if body.kind == "term":
        return any(_selects(part) for part in body.operands)
    return leaf.kind in _SELECT


def within_causal(terms: Op) -> bool:
    """Whether no pair looks ahead, as far as bounds tell."""
    causal = PATTERN.make("before", bound=var("i") + 1)
    return all(any(implies(literal, causal) for literal in term.operands) for term in terms.operands)
