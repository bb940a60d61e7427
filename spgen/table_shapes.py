"""The sizes of a program's tables, from shapes alone: what spgen/tables.py makes, without making it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from spgen.ir.expr import free_variables, tables
from spgen.ir.node import Op, Slot

Shape: TypeAlias = "tuple[int, int, int, int]"
_BITS = 32  # of a word


@dataclass(frozen=True)
class Sizes:
    """A call's sizes: rows and keys of its tensors, heads, and which values differ from sequence to sequence.

    Of a packed batch `batch` is the number of sequences, the rows and keys are those of all together.
    """

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    shapes: Sequence[Sequence[int]]  # of the pattern's tensors
    kv_lengths: bool = False
    q_offsets: bool = False
    packed: bool = False

    def tiles(self, rows: int) -> int:
        """Row tiles of `rows` rows; the slots of a packed batch."""
        return self.q_len // rows + self.batch + 2 if self.packed else int(-(-self.q_len // rows))

    def lead(self, slot: Slot, core: int) -> tuple[int, int]:
        """Batch and heads of a tensor with `core` axes behind them."""
        shape = self.shapes[slot.index]
        batch, heads = (1, 1, *shape[: len(shape) - core])[-2:]
        return batch, heads

    def last(self, slot: Slot, axis: int = -1) -> int:
        """A size of a tensor, counted from behind."""
        return int(self.shapes[slot.index][axis])

    def units(self, op: Op) -> int:
        """Blocks of `cols` keys."""
        return int(-(-self.kv_len // op["cols"]))

    @property
    def varying(self) -> frozenset[str]:
        """The variables for whose sake a table has a batch axis: none where all sequences lie in one."""
        if self.packed:
            return frozenset()
        names = {"b"} | ({"kv_len"} if self.kv_lengths else set())
        return frozenset(names | ({"q_offset"} if self.q_offsets else set()))


def table_shapes(ops: Sequence[Op], sizes: Sizes) -> dict[str, Shape]:
    """[batch or 1, heads, rows, columns] of each table of a program, by name; `ops` in the order of building."""
    known: dict[str, Shape] = {}
    for op in ops:
        known[op["name"]] = _SHAPES[op.kind](op, sizes, known)
    return known


def span_of(op: Op) -> int:
    """How many groups of `rows` rows a row tile can cross; 1 where lists are not united."""
    return (op["row_tile"] - 1) // op["rows"] + 2 if op["row_tile"] and op["rows"] else 1


def entries_of(op: Op, sizes: Sizes) -> int:
    """How many entries of a list, repeats included, a row of its table is made from."""
    return sizes.last(op["indices"]) * span_of(op)


def _membership(op: Op, sizes: Sizes) -> tuple[int, int, int]:
    """Batch, heads and groups of rows of listed units."""
    if op["mask"] is not None:
        return *sizes.lead(op["mask"], 2), sizes.last(op["mask"], -2)
    if op["indptr"] is not None:
        (a, b), (c, d) = (sizes.lead(op[name], 1) for name in ("indices", "indptr"))
        return max(a, c), max(b, d), sizes.last(op["indptr"]) - 1
    if op["rows"]:
        return *sizes.lead(op["indices"], 2), sizes.last(op["indices"], -2)
    return *sizes.lead(op["indices"], 1), 1


def _units(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    batch, heads, groups = _membership(op, sizes)
    if op["row_tile"] and op["rows"]:
        batch, groups = 1 if sizes.packed else batch, sizes.tiles(op["row_tile"])
    width = sizes.units(op)
    if op["mask"] is not None:
        width = min(width, sizes.last(op["mask"]))
    elif op["indptr"] is None:
        width = min(width, entries_of(op, sizes))
    return batch, heads, groups, max(width, 1)


def _bits(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    batch, heads, groups = _membership(op, sizes)
    units = sizes.units(op) if op["mask"] is None else min(sizes.units(op), sizes.last(op["mask"]))
    rows, bits = (units, groups) if op["by_unit"] else (groups, units)
    return batch, heads, rows, -(-bits // _BITS)


def _groups(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    batch, heads, rows, width = _units(op, sizes, known)
    return batch, heads, rows, width * op["words"]


def _diagonal_bits(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    batch, heads = sizes.lead(op["offsets"], 1)
    varies = sizes.varying & ({"kv_len", "q_offset"} if op["order"] is None else {"q_offset"})
    keys = sizes.kv_len if op["order"] is None else sizes.last(op["order"])
    around = 1 + 2 * op["margin"]
    size = sizes.q_len + keys + around
    if sizes.packed:
        # the bits of all sequences, one behind the other; an order of keys ranks as many in each of them
        size += (sizes.batch - 1) * (around + (0 if op["order"] is None else keys))
        return 1, heads, 1, -(-size // _BITS)
    return sizes.batch if varies else batch, heads, 1, -(-size // _BITS)


def _diagonal_runs(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    tiles = -(-op["row_tile"] // op["block_n"])
    return *sizes.lead(op["offsets"], 1), 1, max(sizes.last(op["offsets"]), 1) * tiles


def _documents(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    count = sizes.last(op["cu_seqlens"])
    return 1, 1, 1, count if op["part"] == "starts" else count + 1


def _order(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    return *sizes.lead(op["order"], 1), 1, sizes.last(op["order"])


def _extent(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    batch, heads = sizes.lead(op["order"], 1)
    return 1 if sizes.packed else batch, heads, sizes.tiles(op["row_tile"]), 2


def _touch(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    heads = {"one": 1, "kv": sizes.kv_heads, "q": sizes.q_heads}[op["heads"]]
    predicate = op["predicate"]
    names = free_variables(predicate) | {"kv_len"}
    if names & {"i", "r"}:  # groups of positions begin where the offset says
        names |= {"q_offset"}
    batch = _batch(names, tables(predicate), sizes, known)
    if sizes.packed:
        return 1, heads, sizes.q_len // op["rows"] + 2 * sizes.batch + 1, -(-sizes.units(op) // _BITS)
    return batch, heads, sizes.tiles(op["rows"]) + 1, -(-sizes.units(op) // _BITS)


def _splits(op: Op, sizes: Sizes, known: Mapping[str, Shape]) -> Shape:
    heads = {"one": 1, "kv": sizes.kv_heads, "q": sizes.q_heads}[op["heads"]]
    bounds = ("lo", "inner_lo", "inner_hi", "hi") if op["exact"] else ("lo", "hi")
    read = [op[bound] - op["base"] for bound in bounds]
    names = frozenset[str]().union(*map(free_variables, read))
    batch = _batch(names, frozenset({op["units"]}).union(*map(tables, read)), sizes, known)
    return 1 if sizes.packed else batch, heads, sizes.tiles(op["row_tile"]), 4


def _batch(names: frozenset[str], read: frozenset[str], sizes: Sizes, known: Mapping[str, Shape]) -> int:
    """The batch of something computed from these variables and tables."""
    return sizes.batch if names & sizes.varying else max((known[name][0] for name in read), default=1)


_SHAPES: dict[str, Callable[[Op, Sizes, Mapping[str, Shape]], Shape]] = {
    "constants": lambda op, sizes, known: (1, len(op["values"]), 1, 1),
    "capacity": lambda op, sizes, known: (1, 1, 1, 1),
    "documents": _documents,
    "order": _order,
    "rank": _order,
    "extent": _extent,
    "units": _units,
    "bits": _bits,
    "groups": _groups,
    "diagonal_bits": _diagonal_bits,
    "diagonal_runs": _diagonal_runs,
    "touch": _touch,
    "splits": _splits,
}
