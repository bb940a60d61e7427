"""Masks as words of bits keep the pairs that the masks keep."""

from __future__ import annotations

from typing import Any

import pytest

from spgen.ir.expr import _PYTHON, Expr, evaluate, read
from spgen.templates.gluon.bits import Bits, bits_of, solved
from spgen.templates.triton.masks import Places

PLACES = Places(frozenset({"r", "i", "near", "at"}), frozenset({"j", "c", "p"}))
LETS = {"near": read("r - tile * 64 < 32"), "at": read("(r - tile * 64) % 32")}
WORDS = "select(near, word(t, 0, keys - j + first), word(t, 0, keys - j + first + 32))"
BITS = 0x9E3779B97F4A7C15F39CC0605CEDC8341082276BF3A27251F86C6A11D0C18E95


def bit(_table: str, row: int, x: int) -> bool:
    return bool(BITS >> (x + 7 * row) & 1) if x >= 0 else False


def word(table: str, row: int, x: int) -> int:
    return sum(bit(table, row, x + n) << n for n in range(32))


def value(node: Expr, **env: int) -> Any:
    known = {"tile": 1, "first": 64, "keys": 100, "near": 0, "at": 0, **env}
    for name, body in LETS.items():
        known[name] = evaluate(body, known) if "r" in env else 0
    return evaluate(node, known, {**_PYTHON, "bit": bit, "word": word, "load": lambda _t, row, x: row + x})


def kept(bits: Bits, r: int, c0: int, n: int) -> bool:
    """What lane `n` of a word that begins at column `c0` says of row `r`."""
    found = value(bits.value, r=r, c0=c0, p=c0)
    if bits.kind == "block":
        return bool(found)
    return bit(bits.table, value(bits.row), found - n if bits.kind == "row" else found + n) == bits.wanted


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{WORDS} >> at & 1 != 0", "row"),
        (f"{WORDS} >> at & 1 == 0", "row"),
        ("word(t, 2, 190 - c) >> (r - 64) // 2 & 1 != 0", "row"),
        ("bit(t, 0, j)", "column"),
        ("~bit(t, 1, j + 3)", "column"),
        ("word(t, j // 32, tile) >> r // 32 & 1 != 0", "block"),
        ("load(t, 0, p // 64) * 64 < r", "block"),
    ],
)
def test_bits_keep_the_same_pairs(text: str, kind: str) -> None:
    mask = read(text)
    bits = bits_of(mask, LETS, PLACES, aligned=True)
    assert bits is not None
    assert bits.kind == kind
    assert (bits_of(mask, LETS, PLACES, aligned=False) is None) == (kind == "block")
    for r in range(64, 128, 9):
        for c0 in (0, 32, 96):
            for n in range(32):
                wanted = value(mask, r=r, j=c0 + n, c=c0 + n, p=c0 + n)
                assert kept(bits, r, c0, n) == bool(wanted), (r, c0, n)


@pytest.mark.parametrize(
    "text",
    [
        "bit(t, 0, j // 2)",  # two columns share a bit
        "bit(t, r, j)",  # a row of the table for each row
        "word(t, 0, keys + j) >> at & 1 != 0",  # columns run the other way
        "select(near, word(t, 0, keys - j), word(t, 0, keys - j + 31)) >> at & 1 != 0",  # not one after the other
        "select(r < 70, word(t, 0, keys - j), word(t, 0, keys - j + 32)) >> at & 1 != 0",  # another choice
        "word(t, j // 16, tile) >> r // 32 & 1 != 0",  # blocks of less than a word
        "(i * j) % 3 == 0",
    ],
)
def test_what_is_no_bits(text: str) -> None:
    assert bits_of(read(text), LETS, PLACES, aligned=True) is None


@pytest.mark.parametrize(
    ("text", "side"), [("j - first - 64 < load(t, 0, 3)", "upper"), ("i - keys <= j", "lower"), ("j + 3 <= r", "upper")]
)
def test_comparisons_are_solved_for_the_column(text: str, side: str) -> None:
    comparison = read(text)
    found = solved(comparison, PLACES)
    assert found is not None
    assert found[0] == side
    for j in range(-10, 300):
        bound = value(found[1], r=90, i=130)
        assert value(comparison, r=90, i=130, j=j) == (j < bound if side == "upper" else j >= bound)


@pytest.mark.parametrize("text", ["j + c < 3", "2 * j < 7", "j < load(t, 0, j)", "j == 3", "j < p"])
def test_what_is_no_bound(text: str) -> None:
    assert solved(read(text), PLACES) is None
