"""hoist: what a mask computes from rows alone is computed once per row tile.

mask = j < load(document_highs_0, 0, count_le(document_starts_0, 0, i))
    ->  let row_0 = load(document_highs_0, 0, count_le(document_starts_0, 0, i))   (per row)
        mask = j < row_0
"""

from __future__ import annotations

from spgen.ir import expr
from spgen.ir.expr import Expr, var
from spgen.ir.kernel import COLUMN_VARIABLES, KERNEL, ROW_VARIABLES
from spgen.ir.node import Op


def hoist(kernel: Op) -> Op:
    """`kernel` with row-only and program-only parts of masks, columns and keys as lets."""
    names: dict[Expr, Op] = {}
    operands = [_hoisted(op, names) if op.kind == "segment" else op for op in kernel.operands]
    first = next((n for n, op in enumerate(operands) if op.kind == "segment"), len(operands))
    return Op(kernel.name, (*operands[:first], *names.values(), *operands[first:]), kernel.attrs)


def _hoisted(segment: Op, names: dict[Expr, Op]) -> Op:
    def lift(node: Expr) -> Expr:
        if node.op in ("const", "var"):
            return node
        free = expr.free_variables(node)
        if not free & set(COLUMN_VARIABLES):
            return _named(node, free, names)
        return expr.rebuild(node, [lift(child) for child in expr.operands(node)])

    attrs = tuple(
        (name, lift(value) if name in ("mask", "column", "key") and isinstance(value, Expr) else value)
        for name, value in segment.attrs
    )
    return Op(segment.name, (), attrs)


def _named(node: Expr, free: frozenset[str], names: dict[Expr, Op]) -> Expr:
    if node not in names:
        per = "row" if free & set(ROW_VARIABLES) else "program"
        names[node] = KERNEL.make("let", name=f"{per}_{len(names)}", per=per, value=node)
    return var(names[node]["name"])
