"""recognize: predicates that speak of an interval of keys become half-lines, periodic ones stripes, which skip work.

    where(j <= i & i - j < 1024)        ->  before(i + 1) & ~before(i - 1023)
    where(i // 64 == j // 64)           ->  before(i // 64 * 64 + 64) & ~before(i // 64 * 64)
    where(i >= 500 | j < 4)             ->  before(select(499 < i, 1073741824, 0)) | before(4)
    where(j % 16 < 4)                   ->  stripe(16, width=4)
    where(j <= i & (i + j) % 3 == 0)    ->  before(i + 1) & where((i + j) % 3 == 0)

A comparison is solved for `j`: sums, products with constants, floored quotients, min, max and abs are undone step by
step, exactly. The bound that is left must not fall as `i` grows. What cannot be solved stays a predicate, and as few of
them as possible: each that stands in a union by itself would walk its columns once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from math import prod

from spgen.ir import expr
from spgen.ir.expr import Expr, const, free_variables, var
from spgen.ir.linear import Linear, linear
from spgen.ir.node import Op, rewrite
from spgen.ir.pattern import PATTERN, conjunction, disjunction, negation

_J = var("j")
_FAR = 2**30  # beyond every position, with room to add
# More intervals than this are masked: each is a loop, and the rest of the pattern multiplies them.
_MAX_TERMS = 8
# A stripe gathers its columns: it must leave out at least half of them. The rows of a tile meet different columns of a
# relative one, so only wide strides leave out anything.
_RELATIVE_STRIDE = 256


@dataclass(frozen=True)
class _Found:
    """What a condition became.

    `terms` counts the intervals (those of the disjunctive normal form), `masked` says that a predicate of rows and
    columns is among them.
    """

    source: Expr
    op: Op
    terms: int = 1
    masked: bool = False


def recognize(node: Op) -> Op:
    """`node` with predicates as half-lines and stripes where they are."""
    return rewrite(node, lambda op: _convert(op["predicate"]).op if op.kind == "where" else op)


@lru_cache(maxsize=4096)
def _convert(node: Expr) -> _Found:
    """A condition as a pattern."""
    if node.op in ("and", "or"):
        parts = [_convert(part) for part in expr.flatten(node.op, node)]
        return _all(node, parts) if node.op == "and" else _any(node, parts)
    if node.op == "not" and node.args[0].op in _NEGATED:
        return replace(_convert(_NEGATED[node.args[0].op](node.args[0])), source=node)
    if node.op in ("xor", "select"):
        found = _convert(expr.cases(node))
        return _kept(node) if found.masked else replace(found, source=node)
    if node.op in ("lt", "le", "eq", "ne") and free_variables(node) & {"i", "j"}:
        return _stripe(node) or _compared(node) or _kept(node)
    return _kept(node)


def _kept(node: Expr) -> _Found:
    """The condition as it is; one of heads and sequences alone as `==` or `<`, or their complement."""
    if node.op == "const":
        return _Found(node, conjunction() if node.args[0] else disjunction())
    masked = bool(free_variables(node) & {"i", "j"})
    if node.op in ("le", "ne") and not masked:
        return _Found(node, negation(PATTERN.make("where", predicate=~node)))
    return _Found(node, PATTERN.make("where", predicate=node), masked=masked)


_NEGATED: dict[str, Callable[[Expr], Expr]] = {
    "and": lambda node: reduce(expr.or_, (~arg for arg in node.args)),
    "or": lambda node: reduce(expr.and_, (~arg for arg in node.args)),
    "xor": lambda node: ~expr.cases(node),
    "select": lambda node: ~expr.cases(node),
}


def _split(parts: Iterable[_Found]) -> tuple[list[_Found], list[_Found]]:
    """(parts without a mask, parts with one)."""
    every = list(parts)
    return [part for part in every if not part.masked], [part for part in every if part.masked]


def _all(source: Expr, parts: Sequence[_Found]) -> _Found:
    """A conjunction: what would multiply out to too many terms is masked, together with all other masks."""
    solved, masked = _split(parts)
    while prod(part.terms for part in solved) > _MAX_TERMS:
        widest = max(solved, key=lambda part: part.terms)
        solved.remove(widest)
        masked.append(widest)
    if len(masked) > 1 or prod(part.terms for part in (*solved, *masked)) > _MAX_TERMS:
        literals = [literal for part in masked for literal in _half_lines(part.op)]
        rest = _kept(reduce(expr.and_, (part.source for part in masked)))
        masked = [replace(rest, op=conjunction(*literals, rest.op))]
    chosen = [*solved, *masked]
    return _Found(source, conjunction(*(part.op for part in chosen)), prod(part.terms for part in chosen), bool(masked))


def _any(source: Expr, parts: Sequence[_Found]) -> _Found:
    """A union: its masks are one, inside the half-lines that all of them have."""
    solved, masked = _split(parts)
    if sum(part.terms for part in parts) > _MAX_TERMS:
        solved, masked = [], list(parts)
    if len(masked) > 1:
        shared = reduce(lambda a, b: [literal for literal in a if literal in b], (_half_lines(p.op) for p in masked))
        rest = _kept(reduce(expr.or_, (part.source for part in masked)))
        masked = [replace(rest, op=conjunction(*shared, rest.op))]
    chosen = [*solved, *masked]
    return _Found(source, disjunction(*(part.op for part in chosen)), sum(part.terms for part in chosen), bool(masked))


def _half_lines(op: Op) -> list[Op]:
    """Half-lines that hold everywhere in `op`."""
    if op.kind == "and":
        return [literal for operand in op.operands for literal in _half_lines(operand)]
    leaf = op.operands[0] if op.kind == "not" else op
    return [op] if leaf.kind == "before" else []


def _compared(node: Expr) -> _Found | None:
    """A comparison solved for j."""
    a, b = node.args
    if node.op in ("lt", "le"):
        return _solved(node, _negative(a - b if node.op == "lt" else a - b - 1))
    low, high = _negative(a - b - 1), _negative(b - a - 1)
    if low is None or high is None:
        return None
    equal = conjunction(low, high)
    return _solved(node, equal if node.op == "eq" else _complement(equal))


def _solved(node: Expr, op: Op | None) -> _Found | None:
    return None if op is None else _Found(node, op, _terms(op))


def _terms(op: Op) -> int:
    if op.kind in ("and", "or"):
        return (prod if op.kind == "and" else sum)(map(_terms, op.operands))
    return 1


def _complement(op: Op) -> Op:
    """The complement of half-lines as half-lines."""
    if op.kind in ("and", "or"):
        return (disjunction if op.kind == "and" else conjunction)(*map(_complement, op.operands))
    return negation(op)


def _negative(node: Expr) -> Op | None:
    """The half-lines where `node < 0`; None where it cannot be solved."""
    total = linear(node)
    keys = [atom for atom in total.terms if "j" in free_variables(atom)]
    if not keys:
        return _rows(total)
    if len(keys) > 1:
        return None
    factor, rest = total.without(keys[0])
    if factor > 0:  # factor * atom < -rest
        return _below(keys[0], (rest.times(-1).expression() + (factor - 1)) // factor)
    inside = _below(keys[0], rest.expression() // -factor + 1)
    return None if inside is None else _complement(inside)


def _rows(total: Linear) -> Op | None:
    """Every key of the rows where `total < 0`, if these are the first or the last ones."""
    slope = _slope(total.expression())
    left, right = total.sides()
    holds = left < right
    if slope is None:
        return None
    if slope == 0:
        return _kept(holds).op
    if slope < 0:
        return PATTERN.make("before", bound=expr.select(holds, _FAR, 0))
    return negation(PATTERN.make("before", bound=expr.select(holds, 0, _FAR)))


def _below(atom: Expr, bound: Expr) -> Op | None:
    """`atom < bound` for an atom of j."""
    if atom is _J:
        slope = _slope(bound)
        return None if slope is None or slope < 0 else PATTERN.make("before", bound=bound)
    if atom.op not in _UNDONE:
        return None
    parts = _UNDONE[atom.op](*atom.args, bound)
    solved = [op for op in map(_negative, parts) if op is not None]
    if not parts or len(solved) < len(parts):
        return None
    return (disjunction if atom.op == "min" else conjunction)(*solved)


def _quotient(a: Expr, size: Expr, bound: Expr) -> list[Expr]:
    return [a - bound * size] if size.op == "const" and size.args[0] > 0 else []


# What must be negative where the operation's result is below the bound: all of them, or for min one.
_UNDONE: dict[str, Callable[..., list[Expr]]] = {
    "floordiv": _quotient,
    "shr": lambda a, bits, bound: _quotient(a, const(1) << bits, bound),
    "max": lambda a, b, bound: [a - bound, b - bound],
    "min": lambda a, b, bound: [a - bound, b - bound],
    "abs": lambda a, bound: [a - bound, -a - bound],
}


def _slope(node: Expr) -> int | None:
    """1 if `node` never falls as i grows, -1 if it never rises, 0 without i, None if it cannot be told."""
    if "i" not in free_variables(node):
        return 0
    if node.op == "var":
        return 1
    slopes = [_slope(arg) for arg in expr.operands(node)]
    if node.op in ("add", "min", "max"):
        return _joint(slopes)
    if node.op == "sub":
        return _joint([slopes[0], None if slopes[1] is None else -slopes[1]])
    if node.op == "select" and slopes[0] == 0:
        return _joint(slopes[1:])
    factor = node.args[-1].args[0] if node.args[-1].op == "const" else None
    if node.op == "mul" and factor and slopes[0] is not None:
        return slopes[0] if factor > 0 else -slopes[0]
    if node.op in ("floordiv", "shr", "shl") and factor is not None and factor > 0:
        return slopes[0]
    return None


def _joint(slopes: Sequence[int | None]) -> int | None:
    """The slope of a sum."""
    signs = {slope for slope in slopes if slope != 0}
    return 0 if not signs else signs.pop() if len(signs) == 1 else None


def _stripe(node: Expr) -> _Found | None:
    """`x % stride` in an interval, for columns x = j // cols + c or distances x = i // cols - j // cols + c."""
    interval = _residues(node)
    if interval is None:
        return None
    x, stride, first, width = interval
    shift = x.terms.get(var("h"), 0)
    units = {atom: factor for atom, factor in x.terms.items() if atom is not var("h")}
    keys = [atom for atom in units if "j" in free_variables(atom)]
    if len(keys) != 1 or abs(units[keys[0]]) != 1 or not 0 < 2 * width <= stride:
        return None
    factor, cols = units[keys[0]], _columns_of(keys[0])
    relative = units.get(expr.substitute(keys[0], {"j": var("i")})) == -factor
    if cols is None or len(units) != 1 + relative or (relative and stride * cols < _RELATIVE_STRIDE):
        return None
    offset, shift = first - x.constant, -shift
    if (factor < 0) != relative:  # the sum counts backwards: so does the interval
        offset, shift = 1 - width - offset, -shift
    op = PATTERN.make(
        "stripe", stride=stride, width=width, offset=offset, cols=cols, relative=relative, shift_per_head=shift
    )
    return _Found(node, op)


def _columns_of(atom: Expr) -> int | None:
    """cols, if the atom is j // cols."""
    if atom is _J:
        return 1
    known = atom.op == "floordiv" and atom.args[0] is _J and atom.args[1].op == "const" and atom.args[1].args[0] > 0
    return int(atom.args[1].args[0]) if known else None


def _residues(node: Expr) -> tuple[Linear, int, int, int] | None:
    """(x, stride, first, width) of a comparison that says first <= x % stride < first + width."""
    a, b = node.args
    value, bound = (a, b) if a.op == "mod" else (b, a)
    if value.op != "mod" or bound.op != "const" or value.args[1].op != "const" or value.args[1].args[0] <= 0:
        return None
    stride, limit = value.args[1].args[0], bound.args[0]
    ends = {
        "eq": (limit, limit + 1),
        "lt": (0, limit) if value is a else (limit + 1, stride),
        "le": (0, limit + 1) if value is a else (limit, stride),
    }.get(node.op)
    if ends is None or not 0 <= ends[0] < ends[1] <= stride:
        return None
    return linear(value.args[0]), stride, ends[0], ends[1] - ends[0]
