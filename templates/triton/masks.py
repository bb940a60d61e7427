"""Rearranges masks so that rows and columns meet as late as possible: what speaks of columns alone is computed once per
column of a tile, what speaks of rows alone once per row, and the pairs are left with two or three operations.

    inside & (i - j + 9 < 40) & (word(bits, 0, first - j) >> i - first & 1) != 0
        ->  (i + 9 - 40 < j) & (select(inside, word(bits, 0, first - j), 0) & 1 << i - first) != 0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, TypeAlias

from spgen.ir.expr import Expr, and_, const, fold, free_variables, operands, or_, rebuild, select, tables
from spgen.ir.kernel import PROGRAM_VARIABLES, ROW_VARIABLES

Kind: TypeAlias = Literal["scalar", "row", "column", "pair"]
_LARGEST = 2**31 - 1
_COMPARISONS = ("lt", "le", "eq", "ne")


@dataclass
class Places:
    """Which variables are vectors over a tile's rows and which over its columns; the kind of each expression."""

    rows: frozenset[str]
    columns: frozenset[str]

    def kind(self, node: Expr) -> Kind:
        """What a value differs by."""
        free = free_variables(node)
        if free & self.rows:
            return "pair" if free & self.columns else "row"
        return "column" if free & self.columns else "scalar"


def separate(node: Expr, places: Places) -> Expr:
    """The same truth values, rows and columns apart; sums may be rearranged, as if integers did not overflow."""
    return _Separation(places).of(node)


@dataclass
class _Separation:
    places: Places
    done: dict[Expr, Expr] = field(default_factory=dict)

    def of(self, node: Expr) -> Expr:
        if self.places.kind(node) != "pair":
            return node
        if node not in self.done:
            self.done[node] = self._pair(node)
        return self.done[node]

    def _pair(self, node: Expr) -> Expr:
        if node.op in ("and", "or"):
            return self._chain(node)
        if node.op in ("add", "sub"):
            return self._sum(node)
        if node.op in _COMPARISONS:
            tested = self._tested_bit(node)
            return self._comparison(node) if tested is None else tested
        return rebuild(node, map(self.of, operands(node)))

    def _split(self, parts: Iterable[Expr]) -> dict[Kind, list[Expr]]:
        """Parts by kind; scalars go to the rows, which a loop over columns computes once."""
        found: dict[Kind, list[Expr]] = {"row": [], "column": [], "pair": []}
        for part in parts:
            kind = self.places.kind(part)
            found["row" if kind == "scalar" else kind].append(part)
        return found

    def _chain(self, node: Expr) -> Expr:
        """A conjunction or disjunction: rows, columns and pairs each among themselves first."""
        join = and_ if node.op == "and" else or_
        found = self._split(map(self.of, _flat(node.op, node)))
        pairs = found["pair"]
        if node.op == "and" and node.is_bool and found["column"]:
            condition = reduce(join, found["column"])
            for number, part in enumerate(pairs):
                narrowed = self._only_where(condition, part)
                if narrowed is not None:
                    found["column"], pairs[number] = [], narrowed
                    break
        return reduce(join, [reduce(join, group) for group in (pairs, found["row"], found["column"]) if group])

    def _only_where(self, condition: Expr, part: Expr) -> Expr | None:
        """`part & condition`, a condition on columns, with no operation per pair; None where that takes one."""
        a, b = operands(part) if part.op in _COMPARISONS else (part, part)
        if part.op in ("eq", "ne") and b is const(0) and a.op == "and" and _is_one_bit(a.args[1]):
            bits = self._bits_where(condition, a.args[0], 0 if part.op == "ne" else -1)
            return None if bits is None else fold(part.op, fold("and", bits, a.args[1]), b)
        kinds = self.places.kind(a), self.places.kind(b)
        if part.op == "lt" and kinds == ("column", "row"):
            return fold("lt", select(condition, a, _LARGEST), b)
        if part.op == "lt" and kinds == ("row", "column"):
            return fold("lt", a, select(condition, b, -_LARGEST - 1))
        if part.op == "le" and kinds == ("column", "row") and _is_position(b):
            return fold("le", select(condition, a, _LARGEST), b)
        if part.op == "le" and kinds == ("row", "column") and _is_position(a):
            return fold("le", a, select(condition, b, -_LARGEST - 1))
        return None

    def _bits_where(self, condition: Expr, bits: Expr, outside: int) -> Expr | None:
        """`bits` where `condition` holds, else `outside`."""
        if self.places.kind(bits) == "column":
            return select(condition, bits, outside)
        if bits.op == "select" and self.places.kind(bits.args[0]) == "row":
            chosen = [self._bits_where(condition, value, outside) for value in bits.args[1:]]
            return None if None in chosen else select(bits.args[0], *chosen)  # type: ignore[arg-type]
        return None

    def _tested_bit(self, node: Expr) -> Expr | None:
        """`(bits >> row & 1) != 0` as `(bits & 1 << row) != 0`: the shift is one per row."""
        tested, value = node.args
        if not (node.op in ("eq", "ne") and tested.op == "and" and value.op == "const" and value.args[0] in (0, 1)):
            return None
        shifted, one = tested.args
        if one is not const(1) or shifted.op != "shr" or self.places.kind(shifted.args[1]) not in ("row", "scalar"):
            return None
        bit = fold("and", self.of(shifted.args[0]), fold("shl", const(1), shifted.args[1]))
        return fold("ne" if (node.op == "ne") == (value.args[0] == 0) else "eq", bit, const(0))

    def _comparison(self, node: Expr) -> Expr:
        """Terms of rows to the left, those of columns to the right, where both meet on one side."""
        a, b = map(self.of, node.args)
        if "pair" not in (self.places.kind(a), self.places.kind(b)) or a.is_bool or b.is_bool:
            return fold(node.op, a, b)
        terms = [*signed(a, 1), *signed(b, -1)]
        if any(self.places.kind(term) == "pair" for term, _ in terms):
            return fold(node.op, a, b)
        left = [(term, sign) for term, sign in terms if self.places.kind(term) != "column"]
        right = [(term, -sign) for term, sign in terms if self.places.kind(term) == "column"]
        return fold(node.op, total(left), total(right))

    def _sum(self, node: Expr) -> Expr:
        """A sum of rows and scalars, of columns, and of pairs; constants stay with the rows."""
        terms = [(self.of(term), sign) for term, sign in signed(node, 1)]
        sums: list[tuple[Expr, bool]] = []
        for kinds in (("row", "scalar"), ("column",), ("pair",)):
            group = [(term, sign) for term, sign in terms if self.places.kind(term) in kinds]
            if group:
                positive = any(sign > 0 for _, sign in group)
                sums.append((total(group if positive else _negated(group)), positive))
        sums.sort(key=lambda each: each[0].op == "const")
        added = [total for total, positive in sums if positive] or [const(0)]
        taken = [total for total, positive in sums if not positive]
        result = reduce(lambda a, b: Expr("add", (a, b)), added)
        return reduce(lambda a, b: Expr("sub", (a, b)), taken, result)


def _flat(op: str, node: Expr) -> list[Expr]:
    return [part for child in node.args for part in _flat(op, child)] if node.op == op else [node]


def signed(node: Expr, sign: int) -> list[tuple[Expr, int]]:
    """The terms of a sum with their signs."""
    if node.op in ("add", "sub"):
        return signed(node.args[0], sign) + signed(node.args[1], sign if node.op == "add" else -sign)
    return [(node, sign)]


def _negated(terms: Sequence[tuple[Expr, int]]) -> list[tuple[Expr, int]]:
    return [(term, -sign) for term, sign in terms]


def total(terms: Sequence[tuple[Expr, int]]) -> Expr:
    """The sum, positive terms first."""
    added: Expr = sum((term for term, sign in terms if sign > 0), start=const(0))
    return reduce(lambda total, term: total - term, (term for term, sign in terms if sign < 0), added)


def _is_one_bit(node: Expr) -> bool:
    return node.op == "shl" and node.args[0] is const(1)


def _is_position(node: Expr) -> bool:
    """Whether a value is a row's position or near one, never one of the extreme integers."""
    return not tables(node) and free_variables(node) <= {*ROW_VARIABLES, *PROGRAM_VARIABLES}
