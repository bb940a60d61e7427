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
from typing import Any

from spgen.ir import expr
from spgen.ir.expr import TRUE, Expr, const, maximum, minimum, substitute, var
from spgen.ir.node import Op, Slot, walk
from spgen.ir.tiles import TILES
from spgen.passes.membership import KV_LEN, POSITION, Q_OFFSET, C, H, J, Membership, R, S, picked
from spgen.passes.normalize import leaf_of
from spgen.passes.ownership import is_condition
from spgen.passes.tables import TILE, ProgramTables, Shape, core_rank

P = var("p")


def tile(node: Op, slots: Sequence[Slot], shape: Shape) -> Op:
    """The level-2 program of `node`, a union of disjoint terms over the tensors `slots`."""
    members = Membership(node, slots, shape)
    segments = [_Segment(members, f"s{number}", term).build() for number, term in enumerate(node.operands)]
    order = None if members.row_order is None else expr.load(members.tables.order(members.row_order, "q"), 0, S)
    return TILES.make(
        "program", *members.tables.ops.values(), *segments, row_tile=shape.row_tile, block_m=shape.block_m,
        block_n=shape.block_n, row=order, slot=shape.slot,
    )  # fmt: skip


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


class _Segment:
    """The making of one segment from one term."""

    def __init__(self, members: Membership, name: str, term: Op) -> None:
        self.members, self.tables, self.shape, self.name = members, members.tables, members.shape, name
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
        rows_agree = q is self.members.row_order
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
        end = KV_LEN if self.key_space is None else self.members.capacity(self.key_space)
        lows, highs, inner_lows, inner_highs = [const(0)], [end], [const(0)], [end]
        mask, when, exact = TRUE, TRUE, self.key_space is None
        for literal in self.literals:
            if literal is self.driver:
                continue
            if is_condition(literal):
                when = when & self.members.predicate(literal, None)
                continue
            ends = self._bounds(literal)
            # by the run's own ends, if those are exact
            said = ends and ends[0] is ends[1] and self.driver is None and self.shape.align == 1
            if not said and not self._limits_offsets(literal):
                mask = mask & self.members.predicate(literal, self.key_space)
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
        if position is not POSITION or _space(literal) != _space(self.driver):
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
        extent = self.members.extent(q)
        return None if extent is None else (substitute(bound, {"i": extent[0]}), substitute(bound, {"i": extent[1]}))

    def _source(self) -> dict[str, Any]:
        """What the driver fixes: kind, column, and how positions are counted."""
        if self.driver is None:
            return self._range()
        leaf, _, _ = leaf_of(self.driver)
        if leaf.kind == "stripe":
            return self._stripe(leaf)
        return self._listed(leaf) if leaf.kind == "listed" else self._diagonals(leaf)

    def _range(self) -> dict[str, Any]:
        """All columns, in order."""
        unit = self.shape.align
        return {"source": "range", "contiguous": True, "column": P, "below": var("x"), "unit": unit}

    def _stripe(self, leaf: Op) -> dict[str, Any]:
        """Column p is the (p % w)-th of period p // w; the first period starts at or before column 0."""
        period, width = leaf["stride"] * leaf["cols"], const(leaf["width"] * leaf["cols"])
        shift = leaf["offset"] + H * leaf["shift_per_head"]
        source: dict[str, Any] = {"source": "range", "contiguous": False, "unit": 1}
        if leaf["relative"]:
            extent = self.members.extent(_space(self.driver)[0]) if self.driver else None
            assert extent is not None
            first, last = (position // leaf["cols"] for position in extent)
            width = minimum(last - first + leaf["width"], leaf["stride"]) * leaf["cols"]
            shift = first - shift - leaf["width"] + 1
            source["exact"] = False
            source["mask"] = self.members.predicate(self.driver, self.key_space) if self.driver else TRUE
        elif leaf["width"] >= leaf["stride"]:
            return self._range()
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
        name = self.members.listed_table("units", leaf, row_tile=0 if aligned else row_tile)
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
            return self.members.predicate(self.driver, self.key_space)
        rows, cols = leaf["rows"], leaf["cols"]
        count = self.members.group_words(rows)
        name = self.members.listed_table("groups", leaf, row_tile=self.shape.row_tile, words=count)
        words = [expr.load(name, self.shape.slot, P // cols * count + n) for n in range(count)]
        first = self.members.first_group(rows)
        return picked(words, (R if self.members.row_order is None else S) // rows - first)

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
        at = self.members.place(*_space(self.driver), self.key_space)
        inside = (J if self.key_space is None else C) - base < expr.load(names["ends"], 0, number)
        return {
            "source": "list", "contiguous": True, "unit": shape.block_n, "exact": False,
            "column": expr.load(names["starts"], 0, number) + P % shape.block_n + base,
            "mask": inside & self.members.diagonal_predicate(leaf, at, self.low, self.high),
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
