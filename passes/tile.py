"""tile: each term becomes a segment of the row tile (level 1 to level 2).

    term(before(i + 1), ~before(i - 1023))
        ->  segment range   lo = max(0, i_lo - 1023)  inner = [i_hi - 1023, i_lo + 1)  hi = min(kv_len, i_hi + 1)
    term(before(i + 1), listed(rows=128, cols=128, mask=$0))
        ->  units (per 128 rows), splits (per row tile), segment list  column = load(units_0, tile, p // 128) * 128 + …

The driver of a term is the literal whose columns are walked: a list if there is one, else a stripe, else all columns.
Half-lines that speak of the driver's columns become bounds; every other literal is a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from spgen.ir import expr
from spgen.ir.expr import FALSE, TRUE, Expr, const, maximum, minimum, substitute, var
from spgen.ir.node import Op, Slot, walk
from spgen.ir.tiles import TILES
from spgen.passes.normalize import leaf_of
from spgen.passes.ownership import is_condition
from spgen.passes.permutation import push_permutations
from spgen.passes.tables import Q_START, TILE, B, ProgramTables, Shape, core_rank

_I, J, R, S, C, P, H = map(var, ("i", "j", "r", "s", "c", "p", "h"))
Q_LEN, KV_LEN, Q_OFFSET, K_START = (var(name) for name in ("q_len", "kv_len", "q_offset", "k_start"))


def tile(node: Op, slots: Sequence[Slot], shape: Shape) -> Op:
    """The level-2 program of `node`, a union of disjoint terms over the tensors `slots`."""
    return _Tiler(node, slots, shape).program()


def query_head_matters(node: Op, slots: Sequence[Slot], q_heads: int, kv_heads: int) -> bool:
    """Whether heads of one group may differ, so that they cannot share a row tile."""
    tables = ProgramTables(slots, Shape(q_heads, kv_heads, 1, 1, 1))
    for op in walk(node):
        for _, value in op.attrs:
            if isinstance(value, Slot) and tables.heads_of(value, core_rank(op)) == "q":
                return True
            if isinstance(value, Expr) and any(
                (n.op == "var" and n.args[0] == "h") or (n.op == "heads" and tables.heads_for(len(n.args)) == "q")
                for n in expr.walk(value)
            ):
                return True
        if op.kind == "stripe" and op["shift_per_head"]:
            return True
    return False


@dataclass(frozen=True)
class _Place:
    """A pair as a literal sees it: position, row and column in its spaces.

    `tile_row` is the row of the tile's first slot if rows follow each other there. `order` is that of the keys, if the
    column is a rank.
    """

    position: Expr
    row: Expr
    column: Expr
    tile_row: Expr | None
    order: Slot | None


class _Tiler:
    def __init__(self, node: Op, slots: Sequence[Slot], shape: Shape) -> None:
        self.node, self.shape = node, shape
        self.margin = 0  # rows around those of the call that predicates must also answer for
        self.tables = ProgramTables(slots, shape)
        orders = {op["q"] for op in walk(node) if op.kind == "permuted" and op["q"] is not None}
        self.row_order: Slot | None = orders.pop() if len(orders) == 1 else None
        first = TILE * shape.row_tile
        last = minimum(first + shape.row_tile, Q_LEN) - 1
        self.slot_extent = (first + Q_OFFSET, last + Q_OFFSET)

    def program(self) -> Op:
        segments = [self.segment(number, term) for number, term in enumerate(self.node.operands)]
        row = None if self.row_order is None else expr.load(self.tables.order(self.row_order, "q"), 0, S)
        shape = self.shape
        return TILES.make(
            "program", *self.tables.ops.values(), *segments,
            row_tile=shape.row_tile, block_m=shape.block_m, block_n=shape.block_n, row=row,
            slot=shape.slot,
        )  # fmt: skip

    def segment(self, number: int, term: Op) -> Op:
        return _Segment(self, f"s{number}", term).build()

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

    def place(self, q: Slot | None, k: Slot | None, key_space: Slot | None) -> _Place:
        if q is None:
            position, row = _I, R
        elif q is self.row_order:
            position, row = S + Q_OFFSET, S
        else:
            row = expr.load(self.tables.order(q, "q", inverse=True), 0, R)
            position = row + Q_OFFSET
        column = J if k is None else C
        if k is not None and k is not key_space:
            column = expr.load(self.tables.order(k, "k", inverse=True), 0, J)
        follows = q is self.row_order and not self.margin
        return _Place(position, row, column, TILE * self.shape.row_tile if follows else None, k)

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

    def leaf_predicate(self, leaf: Op, at: _Place) -> Expr:
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

    def diagonal_predicate(self, leaf: Op, at: _Place, low: int | None = None, high: int | None = None) -> Expr:
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
        return _picked(words, at.row - at.tile_row)

    def capacity(self, order: Slot) -> Expr:
        """How many ranks an order of keys has."""
        return expr.load(self.tables.add("capacity", f"capacity_{order.index}", "one", order=order), 0, 0)

    def listed_predicate(self, leaf: Op, at: _Place) -> Expr:
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
        return _picked(words, at.row // leaf["rows"] - first)

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
        data = leaf["mask"] or leaf["indices"]
        heads = self.tables.heads_of(data, core_rank(leaf))
        return self.tables.add(kind, f"{kind}_{data.index}", heads, **dict(leaf.attrs), **attrs)

    def cover_predicate(self, leaf: Op, at: _Place) -> Expr:
        inner = push_permutations(leaf.operands[0])
        neutral = _Tiler(inner, list(self.tables.slots.values()), self.shape)
        neutral.tables, neutral.row_order, neutral.margin = self.tables, None, leaf["rows"]
        found = neutral.predicate(inner, None)
        heads = self.tables.widest(expr.tables(found), found)
        rows, cols = leaf["rows"], leaf["cols"]
        count = sum(op.kind == "touch" for op in self.tables.ops.values())
        name = self.tables.add("touch", f"touch_{count}", heads, predicate=found, rows=rows, cols=cols)
        group = at.position // rows - Q_OFFSET // rows
        return expr.bit(name, Q_START // rows + 2 * B + group if self.shape.cu_seqlens else group, at.column // cols)


def _picked(words: Sequence[Expr], at: Expr) -> Expr:
    """Bit `at` of consecutive words: they are read once for each column, each row takes its bit."""
    chosen = words[-1]
    for n, word in reversed(list(enumerate(words[:-1]))):
        chosen = expr.select(at < 32 * n + 32, word, chosen)
    return expr.and_(chosen >> (at % 32 if len(words) > 1 else at), const(1)).ne(0)


def _stripe_predicate(leaf: Op, at: _Place) -> Expr:
    unit = at.column // leaf["cols"]
    x = at.position // leaf["cols"] - unit if leaf["relative"] else unit
    inside: Expr = (x - leaf["offset"] - H * leaf["shift_per_head"]) % leaf["stride"] < leaf["width"]
    return inside


class _Segment:
    """The making of one segment from one term."""

    def __init__(self, tiler: _Tiler, name: str, term: Op) -> None:
        self.tiler, self.tables, self.shape, self.name = tiler, tiler.tables, tiler.shape, name
        self.literals = list(term.operands)
        self.driver = max(
            (literal for literal in self.literals if self._drives(literal)), key=_selectivity, default=None
        )
        self.key_space = self._key_space()
        self.low: int | None = None  # the offsets that count, where diagonals drive
        self.high: int | None = None

    def _drives(self, literal: Op) -> bool:
        """Whether the literal's columns can be walked for this row tile."""
        leaf, positive, body = leaf_of(literal)
        q = body["q"] if body.kind == "permuted" else None
        rows_agree = q is self.tiler.row_order
        if not positive or leaf.kind not in ("listed", "diagonals", "stripe"):
            return False
        if leaf.kind == "listed":
            return rows_agree or leaf["rows"] == 0
        return rows_agree or (leaf.kind == "stripe" and not leaf["relative"])

    def _key_space(self) -> Slot | None:
        chosen = self.driver
        if chosen is None:
            lines = [literal for literal in self.literals if leaf_of(literal)[0].kind == "before"]
            spaces = [_space(literal)[1] for literal in lines]
            return spaces[0] if spaces and None not in spaces else None
        return _space(chosen)[1]

    def build(self) -> Op:
        end = KV_LEN if self.key_space is None else self.tiler.capacity(self.key_space)
        lows, highs, inner_lows, inner_highs = [const(0)], [end], [const(0)], [end]
        mask, when, exact = TRUE, TRUE, self.key_space is None
        for literal in self.literals:
            if literal is self.driver:
                continue
            if is_condition(literal):
                when = when & self.tiler.predicate(literal, None)
                continue
            ends = self._bounds(literal)
            said = ends and ends[0] is ends[1] and self.driver is None  # by the run's own ends
            if not said and not self._limits_offsets(literal):
                mask = mask & self.tiler.predicate(literal, self.key_space)
            if ends is None:
                exact = False
                continue
            at_first, at_last = ends
            if leaf_of(literal)[1]:
                highs.append(at_last)
                inner_highs.append(at_first)
            else:
                lows.append(at_first)
                inner_lows.append(at_last)
        self.bounds = {
            "lo": maximum(*lows), "inner_lo": maximum(*inner_lows),
            "inner_hi": minimum(*inner_highs), "hi": minimum(*highs),
        }  # fmt: skip
        source = self._source()
        mask = mask & source.pop("mask", TRUE)
        exact = bool(source.pop("exact", True)) and exact
        key = None if self.key_space is None else expr.load(self.tables.order(self.key_space, "k"), 0, C)
        return TILES.make(
            "segment", name=self.name, key=key, exact=exact, **self.bounds, **self._finish(source, exact),
            when=None if when is TRUE else when, mask=None if mask is TRUE else mask,
        )  # fmt: skip

    def _limits_offsets(self, literal: Op) -> bool:
        """Whether the half-line says which of the driver's diagonals count; it is noted then, and needs no mask."""
        leaf, positive, _ = leaf_of(literal)
        if self.driver is None or leaf_of(self.driver)[0].kind != "diagonals" or leaf.kind != "before":
            return False
        position, shift = expr.split_constant(self.tables.resolve(leaf["bound"]))
        if position is not _I or _space(literal) != _space(self.driver):
            return False
        limit = 1 - shift  # j < i + shift: the offset i - j is at least this
        if positive:
            self.low = limit if self.low is None else max(self.low, limit)
        else:
            self.high = limit if self.high is None else min(self.high, limit)
        return True

    def _bounds(self, literal: Op) -> tuple[Expr, Expr] | None:
        """A half-line's bound at the tile's first and last position, if it speaks of this segment's columns."""
        leaf, _, _ = leaf_of(literal)
        q, k = _space(literal)
        if leaf.kind != "before" or k is not self.key_space:
            return None
        bound = self.tables.resolve(leaf["bound"])
        if "i" not in expr.free_variables(bound):
            return bound, bound
        extent = self.tiler.extent(q)
        return None if extent is None else (substitute(bound, {"i": extent[0]}), substitute(bound, {"i": extent[1]}))

    def _source(self) -> dict[str, Any]:
        """What the driver fixes: kind, column, and how positions are counted."""
        if self.driver is None:
            return {"source": "range", "contiguous": True, "column": P, "below": var("x"), "unit": 1}
        leaf, _, _ = leaf_of(self.driver)
        if leaf.kind == "stripe":
            return self._stripe(leaf)
        return self._listed(leaf) if leaf.kind == "listed" else self._diagonals(leaf)

    def _stripe(self, leaf: Op) -> dict[str, Any]:
        """Column p is the (p % w)-th of period p // w; the first period starts at or before column 0."""
        period, width = leaf["stride"] * leaf["cols"], const(leaf["width"] * leaf["cols"])
        shift = leaf["offset"] + H * leaf["shift_per_head"]
        source: dict[str, Any] = {"source": "range", "contiguous": False, "unit": 1}
        if leaf["relative"]:
            extent = self.tiler.extent(_space(self.driver)[0]) if self.driver else None
            assert extent is not None
            first, last = (position // leaf["cols"] for position in extent)
            width = minimum(last - first + leaf["width"], leaf["stride"]) * leaf["cols"]
            shift = first - shift - leaf["width"] + 1
            source["exact"] = False
            source["mask"] = self.tiler.predicate(self.driver, self.key_space) if self.driver else TRUE
        elif leaf["width"] >= leaf["stride"]:
            return {"source": "range", "contiguous": True, "column": P, "below": var("x"), "unit": 1}
        elif (leaf["width"] * leaf["cols"]) % self.shape.block_n == 0:
            source.update(contiguous=True, unit=self.shape.block_n)
        start = shift * leaf["cols"] % period - period
        ahead = var("x") - start
        source["below"] = ahead // period * width + minimum(ahead % period, width)
        source["column"] = P // width * period + P % width + start
        return source

    def _listed(self, leaf: Op) -> dict[str, Any]:
        rows, cols, row_tile = leaf["rows"], leaf["cols"], self.shape.row_tile
        aligned = rows % row_tile == 0
        name = self.tiler.listed_table("units", leaf, row_tile=0 if aligned else row_tile)
        tiles_per_row = rows // row_tile if aligned else 1
        row = self.shape.slot if not aligned else TILE // tiles_per_row if tiles_per_row else const(0)
        first = expr.load(name, row, P // cols) * cols + P % cols
        source: dict[str, Any] = {
            "source": "list" if cols % self.shape.block_n == 0 else "gather",
            "contiguous": cols % self.shape.block_n == 0, "column": first, "unit": cols, "exact": aligned,
            "list": {"units": name, "tiles_per_row": tiles_per_row, "units_by_tile": not aligned, "base": const(0)},
        }  # fmt: skip
        if not aligned:
            source["mask"] = self._group_mask(leaf)
        return source

    def _group_mask(self, leaf: Op) -> Expr:
        """Whether the row's own group lists the unit at this position of the row tile's union."""
        assert self.driver is not None
        if leaf["mask"] is not None:
            return self.tiler.predicate(self.driver, self.key_space)
        rows, cols = leaf["rows"], leaf["cols"]
        count = self.tiler.group_words(rows)
        name = self.tiler.listed_table("groups", leaf, row_tile=self.shape.row_tile, words=count)
        words = [expr.load(name, self.shape.slot, P // cols * count + n) for n in range(count)]
        first = self.tiler.first_group(rows)
        return _picked(words, (R if self.tiler.row_order is None else S) // rows - first)

    def _diagonals(self, leaf: Op) -> dict[str, Any]:
        """Runs of columns that the offsets sweep over the row tile, cut into tiles from each run's first column."""
        slot, shape = leaf["offsets"], self.shape
        names = {
            part: self.tables.add(
                "diagonal_runs", f"diagonal_{part}_{slot.index}", self.tables.heads_of(slot, 1),
                offsets=slot, row_tile=shape.row_tile, block_n=shape.block_n, part=part, low=self.low, high=self.high,
            )
            for part in ("starts", "ends")
        }  # fmt: skip
        base = TILE * shape.row_tile + shape.row_tile + Q_OFFSET
        number = P // shape.block_n
        assert self.driver is not None
        at = self.tiler.place(*_space(self.driver), self.key_space)
        inside = (J if self.key_space is None else C) - base < expr.load(names["ends"], 0, number)
        return {
            "source": "list", "contiguous": True, "unit": shape.block_n, "exact": False,
            "column": expr.load(names["starts"], 0, number) + P % shape.block_n + base,
            "mask": inside & self.tiler.diagonal_predicate(leaf, at, self.low, self.high),
            "list": {"units": names["starts"], "tiles_per_row": 0, "units_by_tile": False, "base": base},
        }  # fmt: skip

    def _finish(self, source: dict[str, Any], exact: bool) -> dict[str, Any]:
        """Lists get their table of position bounds."""
        if "list" not in source:
            return source
        listed = source.pop("list")
        reads = [*self.bounds.values(), listed["base"]]
        names = frozenset({str(listed["units"])}).union(*map(expr.tables, reads))
        kind = self.tables.ops[listed["units"]].kind
        splits = self.tables.add(
            "splits", f"splits_{self.name}", self.tables.widest(names, *reads), **listed, unit=source["unit"],
            starts=kind == "diagonal_runs", exact=exact, **self.bounds, row_tile=self.shape.row_tile,
            block_n=self.shape.block_n,
        )  # fmt: skip
        return {**source, "splits": splits}


def _space(literal: Op) -> tuple[Slot | None, Slot | None]:
    body = literal.operands[0] if literal.kind == "not" else literal
    return (body["q"], body["k"]) if body.kind == "permuted" else (None, None)


def _selectivity(literal: Op) -> tuple[int, int]:
    """Lists before diagonals before stripes; the finer list first."""
    leaf, _, _ = leaf_of(literal)
    if leaf.kind == "listed":
        return 2, -leaf["cols"]
    return (1, 0) if leaf.kind == "diagonals" else (0, 0)


__all__ = ["Shape", "query_head_matters", "tile"]
