"""permutation: pushes `permuted` down to the leaves, where it only says in which space a leaf is read.

permuted(block($0) & before(i + 1), k=$1)  ->  permuted(block($0), k=$1) & permuted(before(i + 1), k=$1)
permuted(before(9), q=$1)                  ->  before(9)
permuted(permuted(p, k=$1), q=$2)          ->  permuted(p, q=$2, k=$1)
"""

from __future__ import annotations

from spgen.errors import UnsupportedError
from spgen.ir.expr import free_variables, tables
from spgen.ir.node import Op, Slot
from spgen.ir.pattern import PATTERN

_CONNECTIVES = ("and", "or", "not")


def push_permutations(node: Op) -> Op:
    """`node` with `permuted` around leaves only."""
    return _push(node, None, None, {})


def _push(op: Op, q: Slot | None, k: Slot | None, done: dict[tuple[Op, Slot | None, Slot | None], Op]) -> Op:
    key = (op, q, k)
    if key not in done:
        done[key] = _pushed(op, q, k, done)
    return done[key]


def _pushed(op: Op, q: Slot | None, k: Slot | None, done: dict[tuple[Op, Slot | None, Slot | None], Op]) -> Op:
    if op.kind == "permuted":
        return _push(op.operands[0], _only(q, op["q"], "q"), _only(k, op["k"], "k"), done)
    if op.kind in _CONNECTIVES:
        return Op(op.name, tuple(_push(operand, q, k, done) for operand in op.operands), op.attrs)
    q = q if _reads_rows(op) else None
    k = k if _reads_columns(op) else None
    return op if q is None and k is None else PATTERN.make("permuted", op, q=q, k=k)


def _only(outer: Slot | None, inner: Slot | None, name: str) -> Slot | None:
    if outer is not None and inner is not None:
        raise UnsupportedError(
            f"permuted: {name}",
            given="a permutation of a permutation of the same axis",
            allowed="one order for each axis",
            remedy="compose the two orders into one tensor: order = outer[inner]",
        )
    return outer if outer is not None else inner


def _reads_rows(op: Op) -> bool:
    if op.kind == "before":
        return "i" in free_variables(op["bound"]) or bool(tables(op["bound"]))
    if op.kind == "where":
        return "i" in free_variables(op["predicate"])
    if op.kind == "stripe":
        return bool(op["relative"])
    return op.kind != "dense" and not (op.kind == "listed" and op["rows"] == 0)


def _reads_columns(op: Op) -> bool:
    if op.kind == "where":
        return "j" in free_variables(op["predicate"])
    return op.kind != "dense"
