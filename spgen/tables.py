"""The tables of a level-2 program, computed on the device of the call without reading anything back.

Each builder takes the table's operation and returns an int32 tensor [batch or 1, heads, rows, columns]. Sizes follow
from shapes alone, so a plan can be made inside a CUDA graph; values that contradict themselves are dropped, never
followed: the kernels see lists inside the range of the keys, ascending, without repeats, padded with 2^31 - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spgen.ir.expr import Expr, evaluate
from spgen.ir.node import Op
from spgen.ir.tiles import PAD, table_ops

Value: TypeAlias = "Tensor | int | bool"
_FAR = 2**30  # beyond every position, with room to add


@dataclass
class Builder:
    """What a call gives its tables: lengths, heads, and the pattern's tensors in slot order.

    `q_offset` and `kv_len` are ints, or tensors [B] on the device.
    """

    data: Sequence[Tensor]
    device: torch.device
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_cap: int
    q_offset: Value
    kv_len: Value
    tables: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def build(self, program: Op) -> list[Tensor]:
        """The program's tables, in its order."""
        for op in table_ops(program):
            table = _BUILDERS[op.kind](self, op)
            self.tables[op["name"]] = table.to(torch.int32).contiguous()
            self.heads[op["name"]] = op["heads"]
        return [self.tables[op["name"]] for op in table_ops(program)]

    def slot(self, slot: Any, core: int) -> Tensor:
        """The tensor of `slot` as [batch or 1, heads, ...] with `core` axes behind the head's."""
        tensor: Tensor = self.data[slot.index]
        return tensor[(None,) * (core + 2 - tensor.dim())]

    def arange(self, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """0, 1, … on the device."""
        return torch.arange(count, device=self.device, dtype=dtype)

    def per_sequence(self, value: Value, axes: int) -> Value:
        """A per-sequence value with `axes` axes behind the batch's."""
        if isinstance(value, Tensor):
            return value.to(torch.int32).reshape(-1, *(1,) * axes)
        return value

    def variables(self, heads: str, axes: int) -> dict[str, Value]:
        """The program's scalars as tensors [B, heads, *axes ones], or ints."""
        ones = (1,) * axes
        found: dict[str, Value] = {
            "q_len": self.q_len,
            "n_heads": self.q_heads,
            "group": self.q_heads // self.kv_heads,
            "kv_len": self.per_sequence(self.kv_len, axes + 1),
            "q_offset": self.per_sequence(self.q_offset, axes + 1),
            "b": self.arange(self.batch).reshape(-1, 1, *ones),
        }
        if heads == "q":
            found["h"] = self.arange(self.q_heads).reshape(1, -1, *ones)
            found["hk"] = found["h"] // (self.q_heads // self.kv_heads)
        elif heads == "kv":
            found["hk"] = self.arange(self.kv_heads).reshape(1, -1, *ones)
        return found

    def evaluate(self, node: Expr, variables: Mapping[str, Value], heads: str, axes: int) -> Any:
        """`node` over tensors [batch, heads, ...] with `axes` axes behind the head's."""
        reader = _Reader(self, heads, axes)
        operations: dict[str, Callable[..., Any]] = {
            **_OPERATIONS, "heads": reader.heads_of, "load": reader.load, "bit": reader.bit,
            "count_le": reader.count_le,
        }  # fmt: skip
        return evaluate(node, variables, operations)


class _Reader:
    """Table reads with the meaning that expressions give them: -1, false and 0 outside."""

    def __init__(self, builder: Builder, heads: str, axes: int) -> None:
        self.builder, self.heads, self.axes = builder, heads, axes

    def heads_of(self, *values: int) -> Tensor:
        """Per-head constants along the head axis."""
        per_head = _constant_table(values, self.builder.device).reshape(1, -1, *(1,) * self.axes)
        repeat = self.builder.q_heads // len(values) if self.heads == "q" else 1
        return per_head.repeat_interleave(repeat, 1)

    def table(self, name: str) -> Tensor:
        """The table with its head axis at the granularity of the result."""
        table = self.builder.tables[name]
        if self.heads == "q" and self.builder.heads[name] == "kv" and table.shape[1] > 1:
            return table.repeat_interleave(self.builder.q_heads // self.builder.kv_heads, 1)
        return table

    def flat(self, name: str, row: Value) -> tuple[Tensor, Tensor, Tensor, int]:
        """(flat table, offset of each row, whether the row exists, columns) for rows of shape [batch, heads, ...]."""
        table = self.table(name)
        batches, heads, rows, columns = table.shape
        device = self.builder.device
        ones = (1,) * self.axes
        b = torch.arange(batches, device=device).reshape(-1, 1, *ones)
        h = torch.arange(heads, device=device).reshape(1, -1, *ones)
        row = _tensor(row, device)
        inside = (row >= 0) & (row < rows)
        start = ((b * heads + h) * rows + row.clamp(0, max(rows - 1, 0))) * columns
        return table.reshape(-1), start, inside, columns

    def load(self, name: str, row: Value, col: Value) -> Tensor:
        flat, start, inside, columns = self.flat(name, row)
        col = _tensor(col, self.builder.device)
        inside = inside & (col >= 0) & (col < columns)
        if flat.numel() == 0:
            return torch.full_like(start + col, -1)
        return torch.where(inside, flat[start + col.clamp(0, columns - 1)], -1)

    def bit(self, name: str, row: Value, x: Value) -> Tensor:
        x = _tensor(x, self.builder.device)
        word = torch.div(x, 32, rounding_mode="floor")
        flat, start, inside, columns = self.flat(name, row)
        inside = inside & (word >= 0) & (word < columns)
        if flat.numel() == 0:
            return torch.zeros_like(start + word, dtype=torch.bool)
        words = flat[start + word.clamp(0, columns - 1)]
        return inside & (((words >> (x % 32)) & 1) == 1)

    def count_le(self, name: str, row: Value, x: Value) -> Tensor:
        """Binary search, a step at a time for all entries at once."""
        flat, start, inside, columns = self.flat(name, row)
        x = _tensor(x, self.builder.device)
        low = torch.zeros_like(start + x)
        high = torch.full_like(low, columns)
        for _ in range(columns.bit_length()):
            middle = (low + high) // 2
            searching = low < high
            below = flat[start + middle.clamp(max=max(columns - 1, 0))] <= x
            low = torch.where(searching & below, middle + 1, low)
            high = torch.where(searching & ~below, middle, high)
        return torch.where(inside, low, 0)


def _lifted(operation: Callable[[Tensor, Tensor], Tensor], plain: Callable[[int, int], int]) -> Callable[..., Any]:
    def apply(a: Value, b: Value) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return plain(a, b)
        device = a.device if isinstance(a, Tensor) else b.device  # type: ignore[union-attr]
        return operation(_tensor(a, device), _tensor(b, device))

    return apply


def _select(condition: Value, a: Value, b: Value) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    device = condition.device
    return torch.where(condition, _tensor(a, device), _tensor(b, device))


def _not(a: Value) -> Any:
    return (not a) if isinstance(a, bool) else ~a


def _tensor(value: Value, device: torch.device) -> Tensor:
    """`value` on the device; a number is filled in there, since a copy from the host could not be captured."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": _lifted(lambda a, b: torch.div(a, b, rounding_mode="floor"), lambda a, b: a // b),
    "mod": _lifted(torch.remainder, lambda a, b: a % b),
    "min": _lifted(torch.minimum, min),
    "max": _lifted(torch.maximum, max),
    "abs": abs,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": _not,
    "select": _select,
}


def _constants(builder: Builder, op: Op) -> Tensor:
    return _constant_table(op["values"], builder.device)


def _capacity(builder: Builder, op: Op) -> Tensor:
    return torch.full((1, 1, 1, 1), builder.kv_cap, dtype=torch.int32, device=builder.device)


@lru_cache(maxsize=256)
def _constant_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device).reshape(1, -1, 1, 1)


def _documents(builder: Builder, op: Op) -> Tensor:
    """Entry 0 is for positions before the first document, the last one for positions behind the last."""
    cu: Tensor = builder.data[op["cu_seqlens"].index].reshape(-1).to(torch.int32)
    part = op["part"]
    if part == "starts":
        return cu.reshape(1, 1, 1, -1)
    before = cu.new_zeros(1)
    behind = cu.new_full((1,), _FAR)
    entries = [before, cu[:-1], behind] if part == "lows" else [before, cu[1:], behind]
    return torch.cat(entries).reshape(1, 1, 1, -1)


def _order(builder: Builder, op: Op) -> Tensor:
    order = builder.slot(op["order"], 1).to(torch.int32)
    length = builder.q_len if op["axis"] == "q" else builder.kv_cap
    return torch.where((order >= 0) & (order < length), order, -1).unsqueeze(2)


def _rank(builder: Builder, op: Op) -> Tensor:
    order = _order(builder, op).squeeze(2).long()
    length = builder.q_len if op["axis"] == "q" else builder.kv_cap
    rank = order.new_full((*order.shape[:2], length + 1), -1)
    target = torch.where(order < 0, length, order)
    rank.scatter_(2, target, builder.arange(order.shape[2], torch.int64).expand_as(order))
    return rank[:, :, :length].unsqueeze(2)


def _extent(builder: Builder, op: Op) -> Tensor:
    """Smallest and largest row of each row tile; a tile without valid rows is empty (largest below smallest)."""
    order = builder.slot(op["order"], 1).to(torch.int32)
    tiles = -(-builder.q_len // op["row_tile"])
    padded = order.new_full((*order.shape[:2], tiles * op["row_tile"]), -1)
    padded[:, :, : order.shape[2]] = torch.where((order >= 0) & (order < builder.q_len), order, -1)
    tiled = padded.unflatten(2, (tiles, op["row_tile"]))
    low = torch.where(tiled < 0, _FAR, tiled).amin(-1)
    return torch.stack([low, tiled.amax(-1)], -1)


def _sorted_unique(values: Tensor, valid: Tensor, capacity: int) -> Tensor:
    """The valid values of each row in ascending order, without repeats, padded."""
    padded = torch.where(valid, values, PAD).to(torch.int32)
    if padded.shape[-1] == 0:
        return padded.new_full((*padded.shape[:-1], 1), PAD)
    ascending = padded.sort(-1).values
    repeats = ascending[..., 1:] == ascending[..., :-1]
    ascending[..., 1:] = torch.where(repeats, PAD, ascending[..., 1:])
    return ascending.sort(-1).values[..., : max(capacity, 1)]


def _membership(builder: Builder, op: Op) -> Tensor:
    """The listed units as booleans [batch, heads, groups, units]."""
    units = -(-builder.kv_cap // op["cols"])
    if op["mask"] is not None:
        return builder.slot(op["mask"], 2).bool()[..., :units]
    if op["indptr"] is not None:
        return _csr_membership(builder, op, units)
    core = 2 if op["rows"] else 1
    index = builder.slot(op["indices"], core).long()
    index = index if core == 2 else index.unsqueeze(2)
    target = torch.where((index >= 0) & (index < units), index, units)
    found = torch.zeros((*index.shape[:3], units + 1), dtype=torch.bool, device=builder.device)
    return found.scatter_(3, target, torch.ones_like(target, dtype=torch.bool))[..., :units]


def _csr_membership(builder: Builder, op: Op, units: int) -> Tensor:
    indptr = builder.slot(op["indptr"], 1).long().contiguous()
    index = builder.slot(op["indices"], 1).long()
    groups = indptr.shape[2] - 1
    lead = torch.broadcast_shapes(indptr.shape[:2], index.shape[:2])
    indptr, index = indptr.expand(*lead, -1).contiguous(), index.expand(*lead, -1)
    entry = builder.arange(index.shape[2], torch.int64).expand_as(index).contiguous()
    row = torch.searchsorted(indptr, entry, right=True) - 1
    valid = (row >= 0) & (row < groups) & (index >= 0) & (index < units)
    target = torch.where(valid, row * units + index, groups * units)
    found = torch.zeros((*lead, groups * units + 1), dtype=torch.bool, device=builder.device)
    found.scatter_(2, target, torch.ones_like(target, dtype=torch.bool))
    return found[..., :-1].reshape(*lead, groups, units)


def _groups_of_tiles(builder: Builder, op: Op) -> tuple[Tensor, Tensor, int]:
    """First and last group of rows that each row tile crosses, and how many it can cross at most."""
    tile = builder.arange(-(-builder.q_len // op["row_tile"]), torch.int64)
    first = tile * op["row_tile"] // op["rows"]
    last = ((tile + 1) * op["row_tile"]).clamp(max=builder.q_len).sub(1) // op["rows"]
    return first, last, (op["row_tile"] - 1) // op["rows"] + 2


def _units(builder: Builder, op: Op) -> Tensor:
    if op["mask"] is None and op["indptr"] is None:
        return _units_of_lists(builder, op)
    member = _membership(builder, op)
    if op["row_tile"]:
        first, last, _ = _groups_of_tiles(builder, op)
        groups = member.shape[2]
        total = torch.nn.functional.pad(member.to(torch.int32).cumsum(2), (0, 0, 1, 0))
        member = total[:, :, (last + 1).clamp(max=groups)] > total[:, :, first.clamp(max=groups)]
    unit = builder.arange(member.shape[3])
    listed = torch.where(member, unit, PAD).sort(-1).values
    return listed if listed.shape[-1] else listed.new_full((*listed.shape[:-1], 1), PAD)


def _units_of_lists(builder: Builder, op: Op) -> Tensor:
    units = -(-builder.kv_cap // op["cols"])
    core = 2 if op["rows"] else 1
    index = builder.slot(op["indices"], core)
    index = index if core == 2 else index.unsqueeze(2)
    if op["row_tile"] and op["rows"]:
        first, last, span = _groups_of_tiles(builder, op)
        group = first[:, None] + builder.arange(span, torch.int64)
        crossed = (group <= last[:, None]) & (group < index.shape[2])
        index = index[:, :, group.clamp(max=max(index.shape[2] - 1, 0))]
        index = torch.where(crossed[:, :, None], index, -1).flatten(3)
    valid = (index >= 0) & (index < units)
    return _sorted_unique(index, valid, min(index.shape[-1], units))


def _pack_bits(member: Tensor) -> Tensor:
    """Booleans along the last axis as words of 32 bits."""
    words = -(-member.shape[-1] // 32)
    padded = torch.nn.functional.pad(member, (0, words * 32 - member.shape[-1])).unflatten(-1, (words, 32))
    weights = torch.ones(32, dtype=torch.int64, device=member.device) << torch.arange(32, device=member.device)
    total = (padded * weights).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _bits(builder: Builder, op: Op) -> Tensor:
    return _pack_bits(_membership(builder, op))


def _diagonal_bits(builder: Builder, op: Op) -> Tensor:
    offsets = builder.slot(op["offsets"], 1).long()
    margin = op["margin"]
    size = builder.q_len + builder.kv_cap + 1 + 2 * margin
    shift = builder.per_sequence(builder.kv_len, 2) - builder.per_sequence(builder.q_offset, 2)
    x = offsets.clamp(-_FAR, _FAR) + shift + margin
    target = torch.where((x >= 0) & (x < size), x, size)
    found = torch.zeros((*target.shape[:2], size + 1), dtype=torch.bool, device=builder.device)
    found.scatter_(2, target, torch.ones_like(target, dtype=torch.bool))
    return _pack_bits(found[..., :size]).unsqueeze(2)


def _diagonal_tiles(builder: Builder, op: Op) -> Tensor:
    """Offset o touches columns base - y for y in [o + 1, o + row_tile], base one behind the tile's last position."""
    offsets = builder.slot(op["offsets"], 1).long()
    near = (offsets > -_FAR) & (offsets < _FAR)
    span = (op["row_tile"] - 1) // op["block_n"] + 2
    first = torch.div(offsets, op["block_n"], rounding_mode="floor")
    last = torch.div(offsets + (op["row_tile"] - 1), op["block_n"], rounding_mode="floor")
    tiles = first[..., None] + builder.arange(span, torch.int64)
    valid = near[..., None] & (tiles <= last[..., None])
    values = (-tiles - 1).flatten(2)
    return _sorted_unique(values, valid.flatten(2), values.shape[-1]).unsqueeze(2)


def _touch(builder: Builder, op: Op) -> Tensor:
    """Looks at every pair, a strip of rows at a time: only patterns without a closed form come here."""
    rows, cols = op["rows"], op["cols"]
    groups = -(-builder.q_len // rows) + 1
    variables = builder.variables(op["heads"], 2)
    offset = variables["q_offset"]
    base = torch.div(_tensor(offset, builder.device), rows, rounding_mode="floor")
    j = builder.arange(builder.kv_cap).reshape(1, 1, 1, -1)
    strips = []
    for group in range(groups):
        i = (base + group) * rows + builder.arange(rows).reshape(1, 1, -1, 1)
        pairs = builder.evaluate(op["predicate"], {**variables, "i": i, "r": i - offset, "j": j}, op["heads"], 2)
        pairs = (_tensor(pairs, builder.device) & (j < variables["kv_len"])).any(2)
        pairs = pairs.expand(*pairs.shape[:2], builder.kv_cap)
        padded = torch.nn.functional.pad(pairs, (0, -builder.kv_cap % cols))
        strips.append(padded.unflatten(-1, (-1, cols)).any(-1))
    return _pack_bits(torch.stack(torch.broadcast_tensors(*strips), 2))


def _splits(builder: Builder, op: Op) -> Tensor:
    """Positions of the units that the bounds cut: those any row wants, and inside them those every row wants."""
    tiles = -(-builder.q_len // op["row_tile"])
    heads, unit = op["heads"], op["unit"]
    variables = {**builder.variables(heads, 1), "tile": builder.arange(tiles).reshape(1, 1, -1)}

    def units_before(bound: str, up: bool) -> Tensor:
        column = builder.evaluate(op[bound] - op["base"], variables, heads, 1)
        limit = _OPERATIONS["floordiv"](column + (unit - 1 if up else 0), unit)
        return _tensor(limit, builder.device).to(torch.int32)

    bounds = [("lo", False), ("inner_lo", True), ("inner_hi", False), ("hi", True)]
    limits = [units_before(bound, up) for bound, up in (bounds if op["exact"] else (bounds[0], bounds[3]))]
    limits = [limit if limit.dim() else limit.reshape(1, 1, 1) for limit in limits]
    shape = (*torch.broadcast_shapes(*(limit.shape[:2] for limit in limits)), tiles)
    found = _count_below(builder, op, heads, torch.stack([limit.expand(shape) for limit in limits], -1))
    start, stop = found[..., 0], torch.maximum(found[..., -1], found[..., 0])
    first = last = start
    if op["exact"]:
        first = torch.minimum(torch.maximum(found[..., 1], start), stop)
        last = torch.minimum(found[..., 2], stop)
        enough = (last - first) * unit >= op["block_n"]
        first, last = torch.where(enough, first, start), torch.where(enough, last, start)
    positions: Tensor = torch.stack([start, first, last, stop], -1) * unit
    return positions


def _count_below(builder: Builder, op: Op, heads: str, limits: Tensor) -> Tensor:
    """How many listed units lie below each of `limits` [batch, heads, tiles, n], in the list of their row tile."""
    listed = _Reader(builder, heads, 1).table(op["units"])
    lead = torch.broadcast_shapes(listed.shape[:2], limits.shape[:2])
    tiles, count = limits.shape[2:]
    per_row = op["tiles_per_row"] or tiles
    rows = listed.shape[2]
    # a tile behind the last row of the list exists only beside the rows of the call, where nothing is asked
    padded = torch.nn.functional.pad(limits.expand(*lead, -1, -1), (0, 0, 0, max(0, rows * per_row - tiles)))
    asked = padded[:, :, : rows * per_row].reshape(*lead, rows, per_row * count)
    below = torch.searchsorted(listed.expand(*lead, -1, -1).contiguous(), asked.contiguous(), out_int32=True)
    return below.reshape(*lead, rows * per_row, count)[:, :, :tiles]


_BUILDERS: dict[str, Callable[[Builder, Op], Tensor]] = {
    "constants": _constants,
    "capacity": _capacity,
    "documents": _documents,
    "order": _order,
    "rank": _rank,
    "extent": _extent,
    "units": _units,
    "bits": _bits,
    "diagonal_bits": _diagonal_bits,
    "diagonal_tiles": _diagonal_tiles,
    "touch": _touch,
    "splits": _splits,
}
