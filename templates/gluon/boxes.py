"""Which keys of a tile follow each other: what is brought as boxes of rows, and what row by row."""

from __future__ import annotations

from spgen.ir.expr import Expr, var
from spgen.ir.kernel import parts
from spgen.ir.node import Op

LEAST_BOX = 16  # keys that follow each other: fewer are as quick when they are gathered


def run_of(segment: Op, block_n: int) -> int:
    """How many keys of a tile follow each other, as a power of two: all, those of a list's unit, or one."""
    if segment["key"] is not None:
        return 1
    if segment["contiguous"]:
        return block_n
    column = segment["column"]
    unit = column.args[1].args[1].args[0] if column.op == "add" and column.args[1].op == "mod" else 1
    first = load_of(column)
    if first is None or column is not first * unit + var("p") % unit or unit & (unit - 1):
        return 1
    return min(int(unit), block_n)


def load_of(column: Expr) -> Expr | None:
    """The unit that a list's column names, if it is one."""
    unit = column.args[0] if column.op == "add" else column
    return unit.args[0] if unit.op == "mul" and unit.args[0].op == "load" else None


def box_rows(kernel: Op) -> int:
    """Rows of K or V that are brought at once, where they are not brought one by one."""
    runs = [run_of(op, kernel["block_n"]) for op in parts(kernel, "segment")]
    return min((run for run in runs if run >= LEAST_BOX), default=kernel["block_n"])


def gathers(kernel: Op) -> bool:
    """Whether rows of K and V are brought one by one in any segment."""
    return any(run_of(op, kernel["block_n"]) < LEAST_BOX for op in parts(kernel, "segment"))
