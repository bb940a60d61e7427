"""Integer expressions as code for TVM's builder.

The same text serves scalars and vectors: the builder repeats a scalar along the lanes of the other operand. `//` and
`%` become shifts, plain divisions where no operand can be negative, or calls of the floored ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from spgen.errors import CompileError
from spgen.ir.expr import Expr, const, operands
from spgen.ir.ranges import Range, value_range

_INFIX = {
    "or": ("|", 1), "xor": ("^", 2), "and": ("&", 3), "shl": ("<<", 5), "shr": (">>", 5), "add": ("+", 6),
    "sub": ("-", 6), "mul": ("*", 7),
}  # fmt: skip
_COMPARE = {"lt": "<", "le": "<="}
_CALLS = {"min": "T.min", "max": "T.max", "abs": "T.abs", "select": "select", "eq": "equal", "ne": "unequal"}
_TABLE = {"load", "bit", "word", "count_le"}
_DIVISION = {"floordiv": ("div", ">>", 5), "mod": ("mod", "&", 3)}  # of what is not negative; by a power of two
_LOGIC = {"and", "or", "xor", "not"}
_ATOM, _UNARY, _COMPARISON = 9, 8, 4


def builder_text(
    node: Expr, names: Mapping[str, str], *, booleans: Collection[str] = (), ranges: Mapping[str, Range] | None = None
) -> str:
    """The Python text that builds `node`.

    `names` maps variables, and tables as "table:name", to the names in the rendered code; `booleans` are the
    variables that hold truth values; `ranges` are intervals of variables, as for `value_range`.
    """
    if node.op == "const" and not isinstance(node.args[0], bool):
        return f"T.int32({node.args[0]})"
    return _Printer(names, frozenset(booleans), ranges or {}).text(node, 0)


def is_truth(node: Expr, booleans: Collection[str]) -> bool:
    """Whether `node` is a truth value, given which variables are."""
    if node.op == "var":
        return node.args[0] in booleans
    if node.op in ("not", "and", "or", "xor"):
        return any(is_truth(child, booleans) for child in operands(node))
    if node.op == "select":
        return all(is_truth(child, booleans) for child in operands(node)[1:])
    return node.is_bool


class _Printer:
    def __init__(self, names: Mapping[str, str], booleans: frozenset[str], ranges: Mapping[str, Range]) -> None:
        self.names, self.booleans, self.ranges = names, booleans, ranges

    def text(self, node: Expr, level: int, *, truth: bool | None = None) -> str:
        """`node` inside an operator of precedence `level`, as a truth value or as an integer if that is asked for."""
        is_bool = is_truth(node, self.booleans)
        if truth is False and is_bool:
            return f"number({self.text(node, 0)})"
        if truth is True and not is_bool:
            return f"unequal({self.text(node, 0)}, 0)"
        text, own = self._print(node)
        return text if own >= level else f"({text})"

    def _print(self, node: Expr) -> tuple[str, int]:
        if node.op == "const":
            return self._constant(node.args[0])
        if node.op == "var":
            return self._name(node.args[0]), _ATOM
        if node.op in _TABLE:
            row, x = (self.text(child, 0, truth=False) for child in operands(node))
            return f"{node.op}({self._name(f'table:{node.args[0]}')}, {row}, {x})", _ATOM
        if node.op in _LOGIC:
            return self._logic(node)
        if node.op in _DIVISION:
            return self._division(node)
        if node.op in _COMPARE:
            left, right = (self.text(child, _COMPARISON + 1, truth=False) for child in node.args)
            # above | and &, below everything else, in Python as well: always bracketed, as & binds tighter there
            return f"({left} {_COMPARE[node.op]} {right})", _ATOM
        if node.op in _INFIX:
            sign, level = _INFIX[node.op]
            a, b = operands(node)
            if node.op == "add" and b.op == "const" and b.args[0] < 0:
                sign, b = "-", const(-b.args[0])
            return f"{self.text(a, level, truth=False)} {sign} {self.text(b, level + 1, truth=False)}", level
        if node.op in _CALLS:
            return self._call(node)
        raise CompileError("expression", given=node.op, allowed="an operation of the integer language")

    @staticmethod
    def _constant(value: int | bool) -> tuple[str, int]:
        if isinstance(value, bool):
            return f"T.bool({value})", _ATOM
        return str(value), _ATOM if value >= 0 else _UNARY

    def _name(self, name: str) -> str:
        return self.names[name]

    def _division(self, node: Expr) -> tuple[str, int]:
        """Shifts and masks are floored; so is truncation where nothing is negative."""
        name, sign, level = _DIVISION[node.op]
        a, b = node.args
        divisor = b.args[0] if b.op == "const" else 0
        if divisor > 0 and divisor & (divisor - 1) == 0:
            small = divisor.bit_length() - 1 if sign == ">>" else divisor - 1
            return f"{self.text(a, level, truth=False)} {sign} {small}", level
        if not all(self._is_natural(operand) for operand in (a, b)):
            name = f"floor{name}"
        return f"{name}({self.text(a, 0, truth=False)}, {self.text(b, 0, truth=False)})", _ATOM

    def _is_natural(self, node: Expr) -> bool:
        low, _ = value_range(node, self.ranges)
        return low is not None and low >= 0

    def _logic(self, node: Expr) -> tuple[str, int]:
        truth = is_truth(node, self.booleans)
        if node.op == "not":
            inner = self.text(node.args[0], 0, truth=truth)
            return (f"T.Not({inner})", _ATOM) if truth else (f"~({inner})", _UNARY)
        if node.op == "xor" and truth:
            left, right = (self.text(child, 0, truth=True) for child in node.args)
            return f"unequal(number({left}), number({right}))", _ATOM
        sign, level = _INFIX[node.op]
        left, right = node.args
        return f"{self.text(left, level, truth=truth)} {sign} {self.text(right, level + 1, truth=truth)}", level

    def _call(self, node: Expr) -> tuple[str, int]:
        children = operands(node)
        if node.op == "select":
            truth = is_truth(node, self.booleans)
            condition = self.text(children[0], 0, truth=True)
            a, b = (self.text(child, 0, truth=truth) for child in children[1:])
            return f"select({condition}, {a}, {b})", _ATOM
        inside = ", ".join(self.text(child, 0, truth=False) for child in children)
        return f"{_CALLS[node.op]}({inside})", _ATOM
