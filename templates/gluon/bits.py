"""Masks of tiles whose keys follow each other, 32 at least, as words of bits for each row.

What tables say of diagonals are bits that lie side by side for each row, the last column's first; a table of columns
has one answer for all rows; what differs by block is one answer for a word. So a mask takes a few words for each row,
and a pair is left with one test of a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from spgen.ir.expr import Expr, const, operands, split_constant, substitute, var
from spgen.templates.triton.masks import Places, signed, total

WORD = 32
_COLUMNS = (var("c"), var("j"))  # the same: keys follow each other
_BY_BLOCK = {"c": var("c0"), "j": var("c0")}

_FIRST_ROW = const(0)

Kind: TypeAlias = Literal["row", "column", "block"]


@dataclass(frozen=True)
class Bits:
    """A part of a mask, for the columns from `c0` on (and positions from `p` on).

    row: bits of a table's row, from bit `value` (a vector over rows) down. column: from bit `value` (a scalar) up, for
    all rows. block: `value` says of all columns of a word, for each row, whether they are kept.
    """

    kind: Kind
    value: Expr
    table: str = ""
    row: Expr = _FIRST_ROW
    wanted: bool = True  # what the bit must be


def bits_of(part: Expr, lets: Mapping[str, Expr], places: Places, *, aligned: bool) -> Bits | None:
    """A part of a mask as bits, if it is.

    `lets` are the vectors over rows that have names; `aligned`: columns and positions of words are multiples of 32.
    """
    if aligned and _is_constant(part):
        return Bits("block", substitute(part, _BY_BLOCK))
    wanted = True
    while part.op == "not":
        part, wanted = part.args[0], not wanted
    if part.op == "bit":
        return _by_column(part, wanted, places)
    if part.op in ("ne", "eq") and part.args[1] is const(0):
        return _by_row(substitute(part.args[0], lets), wanted == (part.op == "ne"), places)
    return None


def conjunction(mask: Expr) -> list[Expr]:
    """The parts that all must hold."""
    return [one for part in mask.args for one in conjunction(part)] if mask.op == "and" and mask.is_bool else [mask]


def solved(part: Expr, places: Places) -> tuple[str, Expr] | None:
    """A comparison of the tile's column with what is none: ("upper", columns are below) or ("lower", at least)."""
    if part.op not in ("lt", "le"):
        return None
    terms = [*signed(part.args[0], 1), *signed(part.args[1], -1)]
    columns = [sign for term, sign in terms if term in _COLUMNS]
    others = [(term, sign) for term, sign in terms if term not in _COLUMNS]
    if len(columns) != 1 or any(places.kind(term) not in ("row", "scalar") for term, _ in others):
        return None
    if columns[0] > 0:
        return "upper", total([(term, -sign) for term, sign in others]) + int(part.op == "le")
    return "lower", total(others) + int(part.op == "lt")


def _is_constant(part: Expr) -> bool:
    """Whether columns and positions occur as numbers of blocks alone, of whole words."""
    if part in (*_COLUMNS, var("p")):
        return False
    if part.op == "floordiv" and part.args[1].op == "const" and part.args[1].args[0] % WORD == 0:
        return part.args[0] in (*_COLUMNS, var("p")) or _is_constant(part.args[0])
    return all(_is_constant(child) for child in operands(part))


def _by_column(bit: Expr, wanted: bool, places: Places) -> Bits | None:
    """Bit `column + x` of a table's row."""
    table, row, x = bit.args
    terms = signed(x, 1)
    if [sign for term, sign in terms if term in _COLUMNS] != [1] or places.kind(row) != "scalar":
        return None
    if any(term not in _COLUMNS and places.kind(term) != "scalar" for term, _ in terms):
        return None
    return Bits("column", substitute(x, _BY_BLOCK), table, row, wanted)


def _by_row(tested: Expr, wanted: bool, places: Places) -> Bits | None:
    """`chosen >> at % 32 & 1`, where `chosen` is the word of consecutive ones that holds bit `at`."""
    if tested.op != "and" or tested.args[1] is not const(1) or tested.args[0].op != "shr":
        return None
    chosen, at = tested.args[0].args
    if at.op == "mod" and at.args[1] is const(WORD):
        at = at.args[0]
    words = _consecutive(chosen, at)
    if not words or any(word.op != "word" or word.args[:2] != words[0].args[:2] for word in words):
        return None
    table, row, x = words[0].args
    base, offset = split_constant(x)
    if any(split_constant(word.args[2]) != (base, offset + WORD * n) for n, word in enumerate(words)):
        return None
    terms = signed(x, 1)
    if [sign for term, sign in terms if term in _COLUMNS] != [-1] or places.kind(row) != "scalar":
        return None
    if any(term not in _COLUMNS and places.kind(term) != "scalar" for term, _ in terms) or places.kind(at) != "row":
        return None
    value = total([(var("c0") if term in _COLUMNS else term, sign) for term, sign in [*terms, *signed(at, 1)]])
    return Bits("row", value, table, row, wanted)


def _consecutive(chosen: Expr, at: Expr) -> list[Expr]:
    """The words of a choice by `at`, 32 bits each; none if it is another choice."""
    found: list[Expr] = []
    while chosen.op == "select":
        condition, word, rest = chosen.args
        if condition is not (at < WORD * len(found) + WORD):
            return []
        found.append(word)
        chosen = rest
    return [*found, chosen]
