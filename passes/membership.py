"""Whether a pair is in a literal: predicates over the rows and columns of a tile, and the tables that they read.

Rows of a tile follow each other, so what a predicate asks of a bit table for one column are bits side by side: words,
read once for each column, from which each row picks its bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from spgen.ir import expr
from spgen.ir.expr import FALSE, TRUE, Expr, const, minimum, substitute, var
from spgen.ir.node import Op, Slot, walk
from spgen.passes.normalize import leaf_of
from spgen.passes.permutation import push_permutations
from spgen.passes.tables import Q_START, TILE, B, ProgramTables, Shape, core_rank

POSITION, J, R, S, C, H = map(var, ("i", "j", "r", "s", "c", "h"))
Q_LEN, KV_LEN, Q_OFFSET, K_START = (var(name) for name in ("q_len", "kv_len", "q_offset", "k_start"))


@dataclass(frozen=True)
class Place:
    """A pair as a literal sees it: position, row and column in its spaces.

    `tile_row` is the row of the tile's first slot if rows follow each other there. `order` is that of the keys, if the
    column is a rank.
    """

    position: Expr
    row: Expr
    column: Expr
    tile_row: Expr | None
    order: Slot | None


class Membership:
    """The predicates of one program: how the rows of a tile and its columns are read, and the tables that takes."""

    def __init__(self, node: Op, slots: Sequence[Slot], shape: Shape) -> None:
        self.node, self.shape = node, shape
        self.margin = 0  # rows around those of the call that predicates must also answer for
        self.tables = ProgramTables(slots, shape)
        orders = {op["q"] for op in walk(node) if op.kind == "permuted" and op["q"] is not None}
        self.row_order: Slot | None = orders.pop() if len(orders) == 1 else None
        first = TILE * shape.row_tile
        last = minimum(first + shape.row_tile, Q_LEN) - 1
        self.slot_extent = (first + Q_OFFSET, last + Q_OFFSET)

    def extent(self, q: Slot | None) -> tuple[Expr, Expr] | None:
        """The smallest and largest position of the tile's rows as a literal in row space `q` sees them."""
        if q is self.row_order:
            return self.slot_extent
        if q is not None:
            return None
        assert self.row_order is not None
        heads = self.tables.heads_of(self.row_order, 1)
        name = self.tables.add(
            "extent", f"extent_{self.row_order.index}", heads, order=self.row_order, row_tile=self.shape.row_tile
        )
        slot = self.shape.slot
        return expr.load(name, slot, 0) + Q_OFFSET, expr.load(name, slot, 1) + Q_OFFSET

    def place(self, q: Slot | None, k: Slot | None, key_space: Slot | None) -> Place:
        """How a literal in the spaces `q` and `k` reads a pair of a segment whose columns are of `key_space`."""
        if q is None:
            position, row = POSITION, R
        elif q is self.row_order:
            position, row = S + Q_OFFSET, S
        else:
            row = expr.load(self.tables.order(q, "q", inverse=True), 0, R)
            position = row + Q_OFFSET
        column = J if k is None else C
        if k is not None and k is not key_space:
            column = expr.load(self.tables.order(k, "k", inverse=True), 0, J)
        follows = q is self.row_order and not self.margin
        return Place(position, row, column, TILE * self.shape.row_tile if follows else None, k)

    def predicate(self, op: Op, key_space: Slot | None, positive: bool = True) -> Expr:
        """Membership of the pair (row, column) in `op`, any combination of leaves, or in its complement."""
        if op.kind == "not":
            return self.predicate(op.operands[0], key_space, not positive)
        if op.kind in ("and", "or", "term"):
            parts = [self.predicate(operand, key_space, positive) for operand in op.operands]
            either = (op.kind == "or") == positive
            return reduce(expr.or_ if either else expr.and_, parts, FALSE if either else TRUE)
        leaf, _, body = leaf_of(op)
        q, k = (body["q"], body["k"]) if body.kind == "permuted" else (None, None)
        found = self.leaf_predicate(leaf, self.place(q, k, key_space))
        found = found if positive else ~found
        if self.margin and (q is not None or (leaf.kind == "listed" and leaf["rows"])):
            # Data by row exist for the rows of the call alone; a cover also looks at the rows around them.
            found = found & (R >= 0) & (R < Q_LEN)
        return found

    def leaf_predicate(self, leaf: Op, at: Place) -> Expr:
        """Membership in one leaf."""
        if leaf.kind == "dense":
            return TRUE
        if leaf.kind == "before":
            return at.column < substitute(self.tables.resolve(leaf["bound"]), {"i": at.position})
        if leaf.kind == "where":
            return substitute(self.tables.resolve(leaf["predicate"]), {"i": at.position, "j": at.column})
        if leaf.kind == "stripe":
            return _stripe_predicate(leaf, at)
        if leaf.kind == "listed":
            return self.listed_predicate(leaf, at)
        if leaf.kind == "diagonals":
            return self.diagonal_predicate(leaf, at)
        return self.cover_predicate(leaf, at)

    def diagonal_predicate(self, leaf: Op, at: Place, low: int | None = None, high: int | None = None) -> Expr:
        """Whether the pair's offset is listed, and at least `low` and below `high`."""
        name = self.tables.add(
            "diagonal_bits", f"diagonal_bits_{leaf['offsets'].index}", self.tables.heads_of(leaf["offsets"], 1),
            offsets=leaf["offsets"], margin=self.margin, order=at.order, low=low, high=high,
        )  # fmt: skip
        keys = KV_LEN if at.order is None else self.capacity(at.order)
        x = keys - at.column + self.margin
        if self.shape.cu_seqlens:
            before = Q_START + (K_START if at.order is None else B * keys)
            x = before + B * (1 + 2 * self.margin) + x
        if at.tile_row is None:
            return expr.bit(name, 0, x + at.row)
        words = [expr.word(name, 0, x + at.tile_row + 32 * n) for n in range(-(-self.shape.row_tile // 32))]
        return picked(words, at.row - at.tile_row)

    def capacity(self, order: Slot) -> Expr:
        """How many ranks an order of keys has."""
        return expr.load(self.tables.add("capacity", f"capacity_{order.index}", "one", order=order), 0, 0)

    def listed_predicate(self, leaf: Op, at: Place) -> Expr:
        """Whether the pair's unit is listed for its group of rows."""
        unit = at.column // leaf["cols"]
        if not leaf["rows"]:
            return expr.bit(self.listed_table("bits", leaf, by_unit=False), 0, unit)
        if leaf["mask"] is None:
            return expr.contains(self.listed_table("units", leaf, row_tile=0), at.row // leaf["rows"], unit)
        if at.tile_row is None:
            return expr.bit(self.listed_table("bits", leaf, by_unit=False), at.row // leaf["rows"], unit)
        name = self.listed_table("bits", leaf, by_unit=True)
        first = self.first_group(leaf["rows"])
        words = [expr.word(name, unit, first + 32 * n) for n in range(self.group_words(leaf["rows"]))]
        return picked(words, at.row // leaf["rows"] - first)

    def first_group(self, rows: int) -> Expr:
        """The group of `rows` rows that the row tile's first row is in."""
        row_tile = self.shape.row_tile
        if row_tile % rows == 0:
            return TILE * (row_tile // rows)
        return TILE // (rows // row_tile) if rows % row_tile == 0 else TILE * row_tile // rows

    def group_words(self, rows: int) -> int:
        """How many words it takes to say something of each group of `rows` rows that a row tile crosses."""
        row_tile = self.shape.row_tile
        whole = row_tile % rows == 0 or rows % row_tile == 0
        groups = -(-row_tile // rows) if whole else (row_tile - 1) // rows + 2
        return -(-groups // 32)

    def listed_table(self, kind: str, leaf: Op, **attrs: int) -> str:
        """The table of a list."""
        data = leaf["mask"] or leaf["indices"]
        heads = self.tables.heads_of(data, core_rank(leaf))
        return self.tables.add(kind, f"{kind}_{data.index}", heads, **dict(leaf.attrs), **attrs)

    def cover_predicate(self, leaf: Op, at: Place) -> Expr:
        """Whether the pair's tile is touched; what it covers is looked at when the plan is made."""
        inner = push_permutations(leaf.operands[0])
        neutral = Membership(inner, list(self.tables.slots.values()), self.shape)
        neutral.tables, neutral.row_order, neutral.margin = self.tables, None, leaf["rows"]
        found = neutral.predicate(inner, None)
        heads = self.tables.widest(expr.tables(found), found)
        rows, cols = leaf["rows"], leaf["cols"]
        count = sum(op.kind == "touch" for op in self.tables.ops.values())
        name = self.tables.add("touch", f"touch_{count}", heads, predicate=found, rows=rows, cols=cols)
        group = at.position // rows - Q_OFFSET // rows
        return expr.bit(name, Q_START // rows + 2 * B + group if self.shape.cu_seqlens else group, at.column // cols)


def picked(words: Sequence[Expr], at: Expr) -> Expr:
    """Bit `at` of consecutive words: they are read once for each column, each row takes its bit."""
    chosen = words[-1]
    for n, word in reversed(list(enumerate(words[:-1]))):
        chosen = expr.select(at < 32 * n + 32, word, chosen)
    return expr.and_(chosen >> (at % 32 if len(words) > 1 else at), const(1)).ne(0)


def _stripe_predicate(leaf: Op, at: Place) -> Expr:
    unit = at.column // leaf["cols"]
    x = at.position // leaf["cols"] - unit if leaf["relative"] else unit
    inside: Expr = (x - leaf["offset"] - H * leaf["shift_per_head"]) % leaf["stride"] < leaf["width"]
    return inside
