"""Level 2, TILES: for a row tile, disjoint segments; and how each table they read is built.

A segment is a run of positions of one source. Its bounds are columns: outside `[lo, hi)` no row of the tile wants
anything, inside `[inner_lo, inner_hi)` every row wants every column (`exact` says whether that holds of the source's
columns; otherwise every tile is masked). Three kinds:

    range   columns in closed form: `column` of a position, and `below`, the number of positions before column `x`
    list    runs of tiles whose starts are in a table; `splits` names the table of position bounds per row tile
    gather  single columns (or short runs) from a table, likewise

Tables are int32, [batch, heads, row, column], ascending where they are lists (padded with 2^31 - 1). `heads` says whose
axis it is: "one" list for all, one per key head ("kv") or per query head ("q"). Tables with a row for each row tile
(extent, splits, units with a `row_tile`) are indexed by the program's `slot`: the tile's number in its sequence, or its
slot in a packed batch (ir/kernel.py), where they have one batch; so has `touch`, by groups of rows.
"""

from __future__ import annotations

from spgen.ir.node import Dialect, Op, OpDef

PAD = 2**31 - 1

_TABLES = {
    # What is known before the call: one row of constants per head, [1, H, 1, 1].
    "constants": {"values": "ints"},
    # How many keys an order of keys ranks: its ranks end there, not at the sequence's length.
    "capacity": {"order": "slot"},
    # Document bounds by document number (0: before the first): starts, and the interval's ends.
    "documents": {"cu_seqlens": "slot", "part": "str"},
    # A permutation with invalid entries -1; its inverse; its smallest and largest entry per row tile.
    "order": {"order": "slot", "axis": "str"},
    "rank": {"order": "slot", "axis": "str"},
    "extent": {"order": "slot", "row_tile": "int"},
    # The units (blocks of `cols` columns) listed for each group of `rows` rows (0: all); `row_tile` > 0: for each row
    # tile, the union over the groups it crosses.
    "units": {
        "mask": "slot?", "indices": "slot?", "indptr": "slot?", "rows": "int", "cols": "int", "row_tile": "int",
    },
    # The same as bits, a row for each group and a bit per unit; `by_unit`: a row for each unit and a bit per group.
    "bits": {
        "mask": "slot?", "indices": "slot?", "indptr": "slot?", "rows": "int", "cols": "int", "by_unit": "bool",
    },
    # Beside units with a `row_tile`: for each of them `words` words, a bit for each group that the row tile crosses.
    "groups": {
        "mask": "slot?", "indices": "slot?", "indptr": "slot?", "rows": "int", "cols": "int", "row_tile": "int",
        "words": "int",
    },
    # Diagonal offsets as bits: bit r - j + kv_len + margin, for rows up to `margin` outside the call; in a packed batch
    # the bits of each sequence follow those before it. With an `order` of keys, j is a rank and kv_len its length.
    # Only offsets from `low` up to, not including, `high` count.
    "diagonal_bits": {"offsets": "slot", "margin": "int", "order": "slot?", "low": "int?", "high": "int?"},
    # The columns that the offsets sweep over a row tile, counted from its end, as tiles of `block_n` that begin with
    # each run's first column: where they start, and where their run ends (exclusive).
    "diagonal_runs": {
        "offsets": "slot", "row_tile": "int", "block_n": "int", "part": "str", "low": "int?", "high": "int?",
    },
    # One bit per rows x cols tile that holds a pair of `predicate`.
    "touch": {"predicate": "expr", "rows": "int", "cols": "int"},
    # Position bounds per row tile (start, full_start, full_stop, stop) in the list of another table, which has a row
    # for every `tiles_per_row` row tiles of a sequence (0: one row for all; `units_by_tile`: for each row tile).
    # `starts`: the list holds first columns of `unit` columns each, not numbers of units.
    "splits": {
        "units": "str", "tiles_per_row": "int", "units_by_tile": "bool", "unit": "int", "starts": "bool",
        "base": "expr", "lo": "expr", "inner_lo": "expr", "inner_hi": "expr", "hi": "expr", "exact": "bool",
        "row_tile": "int", "block_n": "int",
    },
}  # fmt: skip

TILES = Dialect(
    "tiles",
    {
        **{kind: OpDef({"name": "str", "heads": "str", **attrs}) for kind, attrs in _TABLES.items()},
        "segment": OpDef(
            {
                "name": "str", "source": "str", "contiguous": "bool", "exact": "bool", "column": "expr", "key": "expr?",
                "below": "expr?", "unit": "int", "splits": "str?", "lo": "expr", "inner_lo": "expr",
                "inner_hi": "expr", "hi": "expr", "when": "expr?", "mask": "expr?",
            }
        ),
        # Tables in the order in which they are built, then segments in the order in which they are visited.
        "program": OpDef(
            {"row_tile": "int", "block_m": "int", "block_n": "int", "row": "expr?", "slot": "expr"}, operands=None
        ),
    },
)  # fmt: skip


def table_ops(program: Op) -> tuple[Op, ...]:
    """The program's tables in the order in which they must be built."""
    return tuple(op for op in program.operands if op.kind in _TABLES)


def segments(program: Op) -> tuple[Op, ...]:
    """The program's segments in the order in which they are visited."""
    return tuple(op for op in program.operands if op.kind == "segment")
