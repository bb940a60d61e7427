"""Prints integer expressions as Triton source.

Vectors over a tile's rows are [BLOCK_M], vectors over its columns [BLOCK_N]; where both meet, in a mask, they are
indexed `[:, None]` and `[None, :]`: what is computed from one of them alone has a name and stays a vector. `//` and `%`
truncate in Triton and are floored here: by a shift or an `&` where the divisor is a power of two, as they stand where
the dividend is proven non-negative, else by a helper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from spgen.ir.expr import Expr, free_variables, operands, tables, walk
from spgen.ir.ranges import Range, value_range
from spgen.templates.triton.masks import Places

_SPREAD = {"row": "[:, None]", "column": "[None, :]"}  # how vectors are indexed beside pairs

# level of Python's operators; comparisons are printed in parentheses, since Python chains them
_INFIX = {
    "lt": ("<", 1), "le": ("<=", 1), "eq": ("==", 1), "ne": ("!=", 1), "or": ("|", 2), "xor": ("^", 3), "and": ("&", 4),
    "shl": ("<<", 5), "shr": (">>", 5), "add": ("+", 6), "sub": ("-", 6), "mul": ("*", 7),
    "floordiv": ("//", 7), "mod": ("%", 7),
}  # fmt: skip
_CALLS = {"min": "tl.minimum", "max": "tl.maximum", "abs": "tl.abs", "select": "tl.where"}
_UNARY, _ATOM = 8, 9
DEAL = "deal"  # the helper of operations.py.jinja that computes a vector once and gives it to all threads
_NOTHING: Mapping[Expr, str] = {}
_NO_VECTORS = Places(frozenset(), frozenset())  # all values of an expression have one shape, or are scalars


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
    printer = _Printer(names, ranges, _NO_VECTORS)
    lines = printer.assign(_shared(node), temporary)
    return Printed(lines, printer.bare(node))


def print_mask(
    node: Expr,
    names: Mapping[str, str],
    ranges: Mapping[str, Range],
    places: Places,
    temporary: str,
    loaded: frozenset[str] = frozenset(),
    own: Mapping[str, str] | None = None,
) -> Printed:
    """A mask as source of shape [BLOCK_M, BLOCK_N], [BLOCK_M, 1] or [1, BLOCK_N].

    Vectors over columns that read tables, or any of the variables `loaded`, which do, are dealt out to the threads. If
    there is `own`, what is dealt out speaks of the columns by these names, and shares no part with anything else.
    """
    vectors = {part for part in _vectors(node, places) if operands(part) or free_variables(part) & loaded}
    dealt = {
        part for part in vectors
        if places.kind(part) == "column" and (tables(part) or free_variables(part) & loaded)
    }  # fmt: skip
    printer = _Printer(names, ranges, places)
    alone: dict[Expr, str] = {}
    if own is not None:
        alone = {part: _Printer({**names, **own}, ranges, places).bare(part) for part in dealt}
    inner = {part for outer in alone for part in walk(outer) if part is not outer}
    named = {*_shared(node), *vectors}
    named -= {part for part in inner if places.kind(part) == "column" and part not in alone}
    lines = printer.assign((part for part in walk(node) if part in named), temporary, dealt, alone)
    return Printed(lines, printer.beside_pairs(node))


def _shared(node: Expr) -> Iterator[Expr]:
    """The operations that are used more than once."""
    uses = Counter(child for parent in walk(node) for child in operands(parent))
    return (child for child in walk(node) if uses[child] > 1 and operands(child))


def _vectors(node: Expr, places: Places) -> Iterator[Expr]:
    """The largest parts that speak of rows alone or of columns alone."""
    if places.kind(node) in _SPREAD:
        yield node
    for parent in walk(node):
        if places.kind(parent) == "pair":
            yield from (child for child in operands(parent) if places.kind(child) in _SPREAD)


class _Printer:
    def __init__(self, names: Mapping[str, str], ranges: Mapping[str, Range], places: Places) -> None:
        self.names, self.ranges, self.places = names, ranges, places
        self.done: dict[Expr, tuple[str, int]] = {}

    def assign(
        self, parts: Iterable[Expr], temporary: str, dealt: Container[Expr] = (), alone: Mapping[Expr, str] = _NOTHING
    ) -> tuple[str, ...]:
        """Lines that give names to `parts`, operands first; `alone` is the text of some."""
        lines = []
        for number, part in enumerate(parts):
            text, name = alone.get(part) or self.bare(part), f"{temporary}_{number}"
            lines.append(f"{name} = {DEAL}({text})" if part in dealt else f"{name} = {text}")
            self.done[part] = name, _ATOM
        return tuple(lines)

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
            return f"~{self._operand(node, 0, _UNARY)}", _UNARY
        if node.op in _INFIX:
            return self._infix(node)
        if node.op in _CALLS:
            return self._call(node, _CALLS[node.op])
        return self._call(node, node.op, first=(self.names[node.args[0]],))

    def _infix(self, node: Expr) -> tuple[str, int]:
        sign, level = _INFIX[node.op]
        right = node.args[1]
        if node.op == "add" and right.op == "const" and right.args[0] < 0:
            return f"{self._operand(node, 0, level)} - {-right.args[0]}", level
        if level == 1:
            return f"({self._operand(node, 0, 2)} {sign} {self._operand(node, 1, 2)})", _ATOM
        return f"{self._operand(node, 0, level)} {sign} {self._operand(node, 1, level + 1)}", level

    def _division(self, node: Expr) -> tuple[str, int]:
        dividend, divisor = node.args
        value = divisor.args[0] if divisor.op == "const" else 0
        if value > 0 and value & (value - 1) == 0:
            if node.op == "floordiv":
                return f"{self._operand(node, 0, 5)} >> {value.bit_length() - 1}", 5
            return f"{self._operand(node, 0, 4)} & {value - 1}", 4
        if self._not_negative(dividend) and self._not_negative(divisor):
            return self._infix(node)
        return self._call(node, "floor_divide" if node.op == "floordiv" else "floor_modulo")

    def _not_negative(self, node: Expr) -> bool:
        low = value_range(node, self.ranges)[0]
        return low is not None and low >= 0

    def _call(self, node: Expr, function: str, first: tuple[str, ...] = ()) -> tuple[str, int]:
        arguments = (self._operand(node, at, 0) for at in range(len(operands(node))))
        return f"{function}({', '.join([*first, *arguments])})", _ATOM

    def bare(self, node: Expr) -> str:
        """Source that stands alone, between commas or after a `=`: a comparison needs no parentheses there."""
        text, _ = self.text(node)
        return text[1:-1] if node.op in ("lt", "le", "eq", "ne") and node not in self.done else text

    def _operand(self, parent: Expr, at: int, level: int) -> str:
        """The source of an operand, in parentheses if it binds less than `level`; 0 wants none."""
        node = operands(parent)[at]
        text, own = self.text(node)
        text = self.bare(node) if not level else text if own >= level else f"({text})"
        return text + _SPREAD.get(self.places.kind(node), "") if self.places.kind(parent) == "pair" else text

    def beside_pairs(self, node: Expr) -> str:
        """The source of a whole mask."""
        return self.bare(node) + _SPREAD.get(self.places.kind(node), "")
