"""Interval arithmetic: what values an expression can take, given those of its variables.

Printers use it to leave out the fix-up of floored division, templates to leave out loops that never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from spgen.ir.expr import Expr, operands

Bound: TypeAlias = "int | None"
Range: TypeAlias = "tuple[Bound, Bound]"


def value_range(node: Expr, env: Mapping[str, Range]) -> Range:
    """An interval that holds the integer value of `node`, given intervals of its variables (None: unbounded)."""
    if node.op == "const":
        return int(node.args[0]), int(node.args[0])
    if node.op == "var":
        return env.get(node.args[0], (None, None))
    parts = [value_range(child, env) for child in operands(node)]
    rule = _RANGES.get(node.op)
    return rule(*parts) if rule else ((0, 1) if node.is_bool else (None, None))


def _sum(a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else a + b


def _negate(a: Range) -> Range:
    lo, hi = a
    return (None if hi is None else -hi, None if lo is None else -lo)


def _range_add(a: Range, b: Range) -> Range:
    return _sum(a[0], b[0]), _sum(a[1], b[1])


def _range_mul(a: Range, b: Range) -> Range:
    if None in (*a, *b):
        both_positive = a[0] is not None and b[0] is not None and a[0] >= 0 and b[0] >= 0
        return (a[0] * b[0], None) if both_positive else (None, None)  # type: ignore[operator]
    corners = [x * y for x in a for y in b]  # type: ignore[operator]
    return min(corners), max(corners)


def _range_div(a: Range, b: Range) -> Range:
    if b[0] is None or b[0] <= 0:
        return None, None
    lo = None if a[0] is None else (a[0] // b[0] if a[0] < 0 else (a[0] // b[1] if b[1] is not None else 0))
    hi = None if a[1] is None else (a[1] // b[0] if a[1] >= 0 else (a[1] // b[1] if b[1] is not None else -1))
    return lo, hi


def _range_mod(a: Range, b: Range) -> Range:
    if b[0] is None or b[0] <= 0:
        return None, None
    return 0, None if b[1] is None else b[1] - 1


def _range_min(a: Range, b: Range) -> Range:
    highs = [x for x in (a[1], b[1]) if x is not None]
    lo = None if a[0] is None or b[0] is None else min(a[0], b[0])
    return lo, min(highs) if highs else None


def _range_max(a: Range, b: Range) -> Range:
    lows = [x for x in (a[0], b[0]) if x is not None]
    hi = None if a[1] is None or b[1] is None else max(a[1], b[1])
    return max(lows) if lows else None, hi


_RANGES: dict[str, Callable[..., Range]] = {
    "add": _range_add,
    "sub": lambda a, b: _range_add(a, _negate(b)),
    "mul": _range_mul,
    "floordiv": _range_div,
    "mod": _range_mod,
    "min": _range_min,
    "max": _range_max,
    "select": lambda _, a, b: (_range_min(a, b)[0], _range_max(a, b)[1]),
}
