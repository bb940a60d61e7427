"""Prints integer expressions as Triton source.

Vectors over a tile's rows are [BLOCK_M], vectors over its columns [BLOCK_N]; where both meet, in a mask, names are
indexed `[:, None]` and `[None, :]`. `//` and `%` truncate in Triton and are floored here: by a shift or an `&` where
the divisor is a power of two, as they stand where the dividend is proven non-negative, else by a helper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spgen.ir.expr import Expr, operands, walk
from spgen.ir.ranges import Range, value_range

ROW, COLUMN = "[:, None]", "[None, :]"

# level of Python's operators; comparisons are printed in parentheses, since Python chains them
_INFIX = {
    "lt": ("<", 1), "le": ("<=", 1), "eq": ("==", 1), "ne": ("!=", 1), "or": ("|", 2), "xor": ("^", 3), "and": ("&", 4),
    "shl": ("<<", 5), "shr": (">>", 5), "add": ("+", 6), "sub": ("-", 6), "mul": ("*", 7),
    "floordiv": ("//", 7), "mod": ("%", 7),
}  # fmt: skip
_CALLS = {"min": "tl.minimum", "max": "tl.maximum", "abs": "tl.abs", "select": "tl.where"}
_UNARY, _ATOM = 8, 9


@dataclass(frozen=True)
class Printed:
    """Source of one expression: assignments that come first (parts used twice), then its `value`."""

    lines: tuple[str, ...]
    value: str


def print_expression(
    node: Expr, names: Mapping[str, str], ranges: Mapping[str, Range], temporary: str = "part"
) -> Printed:
    """`node` as source; `names` gives the text of each variable and table, `ranges` the interval of each variable.

    Assigned names begin with `temporary`, which must be unique to the place.
    """
    printer = _Printer(names, ranges)
    lines = []
    for number, shared in enumerate(_shared(node)):
        lines.append(f"{temporary}_{number} = {printer.bare(shared)}")
        printer.done[shared] = f"{temporary}_{number}", _ATOM
    return Printed(tuple(lines), printer.bare(node))


def _shared(node: Expr) -> Iterator[Expr]:
    """The operations that are used more than once, operands first."""
    uses = Counter(child for parent in walk(node) for child in operands(parent))
    return (child for child in walk(node) if uses[child] > 1 and operands(child))


class _Printer:
    def __init__(self, names: Mapping[str, str], ranges: Mapping[str, Range]) -> None:
        self.names, self.ranges = names, ranges
        self.done: dict[Expr, tuple[str, int]] = {}

    def text(self, node: Expr) -> tuple[str, int]:
        """Source and precedence of `node`."""
        if node in self.done:
            return self.done[node]
        if node.op == "const":
            return str(node.args[0]), _ATOM if node.args[0] >= 0 else _UNARY
        if node.op == "var":
            return self.names[node.args[0]], _ATOM
        if node.op in ("floordiv", "mod"):
            return self._division(node)
        if node.op == "not":
            return f"~{self._within(node.args[0], _UNARY)}", _UNARY
        if node.op in _INFIX:
            return self._infix(node)
        if node.op in _CALLS:
            return self._call(_CALLS[node.op], *node.args)
        return self._call(node.op, *node.args[1:], first=(self.names[node.args[0]],))

    def _infix(self, node: Expr) -> tuple[str, int]:
        sign, level = _INFIX[node.op]
        a, b = node.args
        if node.op == "add" and b.op == "const" and b.args[0] < 0:
            return f"{self._within(a, level)} - {-b.args[0]}", level
        if level == 1:
            return f"({self._within(a, 2)} {sign} {self._within(b, 2)})", _ATOM
        return f"{self._within(a, level)} {sign} {self._within(b, level + 1)}", level

    def _division(self, node: Expr) -> tuple[str, int]:
        dividend, divisor = node.args
        value = divisor.args[0] if divisor.op == "const" else 0
        if value > 0 and value & (value - 1) == 0:
            if node.op == "floordiv":
                return f"{self._within(dividend, 5)} >> {value.bit_length() - 1}", 5
            return f"{self._within(dividend, 4)} & {value - 1}", 4
        if self._not_negative(dividend) and self._not_negative(divisor):
            return self._infix(node)
        return self._call("floor_divide" if node.op == "floordiv" else "floor_modulo", dividend, divisor)

    def _not_negative(self, node: Expr) -> bool:
        low = value_range(node, self.ranges)[0]
        return low is not None and low >= 0

    def _call(self, function: str, *args: Expr, first: tuple[str, ...] = ()) -> tuple[str, int]:
        return f"{function}({', '.join([*first, *(self.bare(arg) for arg in args)])})", _ATOM

    def bare(self, node: Expr) -> str:
        """Source that stands alone, between commas or after a `=`: a comparison needs no parentheses there."""
        text, _ = self.text(node)
        return text[1:-1] if node.op in ("lt", "le", "eq", "ne") and node not in self.done else text

    def _within(self, node: Expr, level: int) -> str:
        text, own = self.text(node)
        return text if own >= level else f"({text})"
