"""structure: what a pattern's kernels have in common with those of other patterns, and how many keys a row has.

    causal() & window(1024)  ->  before                  causal() & block(64, mask=…)  ->  before&listed(64x64)

Constants of closed forms, heads and lengths are left out: they change how much work there is, not of which kind it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spgen.ir.expr import Expr, evaluate, free_variables, tables, walk
from spgen.ir.node import Op
from spgen.passes.cost import keys_of_row
from spgen.passes.normalize import leaf_of


def structure(terms: Op) -> str:
    """The kinds of the disjoint terms, each named by the kinds of its literals."""
    names = {"&".join(sorted({_name(literal) for literal in term.operands})) for term in terms.operands}
    return "|".join(sorted(names))


def _name(literal: Op) -> str:
    leaf, positive, body = leaf_of(literal)
    # a half-line's complement is one, too
    name: str = leaf.kind if positive or leaf.kind == "before" else f"~{leaf.kind}"
    if leaf.kind == "listed":
        name += f"({leaf['rows']}x{leaf['cols']})"
    return f"permuted({name})" if body.kind == "permuted" else name


def width(terms: Op, kv_len: int, shapes: Mapping[int, Sequence[int]]) -> int:
    """About how many keys the last row has, from shapes alone: `shapes` are those of the slots. 0 where data decide."""
    total = 0
    for term in terms.operands:
        closed = keys_of_row(term)
        found = _listed(term, kv_len, shapes) if closed is None else _at_last_row(closed, kv_len)
        if found is None:
            return 0
        total += max(found, 0)
    return min(total, kv_len)


def _at_last_row(keys: Expr, kv_len: int) -> int | None:
    """None where heads or sequences differ."""
    last = {"i": kv_len - 1, "kv_len": kv_len}
    return int(evaluate(keys, last)) if free_variables(keys) <= last.keys() and not _differs(keys) else None


def _listed(term: Op, kv_len: int, shapes: Mapping[int, Sequence[int]]) -> int | None:
    """Keys of the shortest list among a term's literals."""
    found = []
    for literal in term.operands:
        leaf, positive, _ = leaf_of(literal)
        if positive and leaf.kind == "listed" and leaf["indices"] is not None and leaf["indptr"] is None:
            found.append(shapes[leaf["indices"].index][-1] * leaf["cols"])
        if positive and leaf.kind == "diagonals":
            found.append(shapes[leaf["offsets"].index][-1])
    return min((*found, kv_len)) if found else None


def _differs(keys: Expr) -> bool:
    return bool(tables(keys)) or any(node.op == "heads" for node in walk(keys))
