"""The tables of a level-2 program, computed on the device of the call without reading anything back.

Each builder takes the table's operation and returns an int32 tensor [batch or 1, heads, rows, columns]. Sizes follow
from shapes alone, so a plan can be made inside a CUDA graph; values that contradict themselves are dropped, never
followed: the kernels see lists inside the range of the keys, ascending, without repeats, padded with 2^31 - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spgen.ir.expr import Expr, evaluate
from spgen.ir.node import Op
from spgen.ir.tiles import PAD, table_ops
from spgen.sequences import Sequences, Tiles, Value
from spgen.table_reader import OPERATIONS, Reader, as_tensor, constant_table

_FAR = 2**30  # beyond every position, with room to add


@dataclass
class Builder:
    """What a call gives its tables: its sequences, heads, and the pattern's tensors in slot order."""

    data: Sequence[Tensor]
    sequences: Sequences
    q_heads: int
    kv_heads: int
    tables: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the tables are made."""
        return self.sequences.device

    def build(self, program: Op) -> list[Tensor]:
        """The program's tables, in its order."""
        for op in table_ops(program):
            self.tables[op["name"]] = self.make(op)
            self.heads[op["name"]] = op["heads"]
        return [self.tables[op["name"]] for op in table_ops(program)]

    def make(self, op: Op) -> Tensor:
        """One table; those that it reads are made."""
        return _BUILDERS[op.kind](self, op).to(torch.int32).contiguous()

    def slot(self, slot: Any, core: int) -> Tensor:
        """The tensor of `slot` as [batch or 1, heads, ...] with `core` axes behind the head's."""
        tensor: Tensor = self.data[slot.index]
        return tensor[(None,) * (core + 2 - tensor.dim())]

    def arange(self, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """0, 1, … on the device."""
        return self.sequences.arange(count, dtype)

    def variables(self, heads: str, axes: int, tiles: Tiles | None = None) -> dict[str, Value]:
        """The program's scalars as tensors [B, heads, *axes more], or ints; those of `tiles` if they are given."""
        scalars = self.sequences.variables(axes + 1) if tiles is None else tiles.with_axes(axes - 1)
        found: dict[str, Value] = {
            **scalars, "n_heads": self.q_heads, "group": self.q_heads // self.kv_heads,
        }  # fmt: skip
        ones = (1,) * axes
        if heads == "q":
            found["h"] = self.arange(self.q_heads).reshape(1, -1, *ones)
            found["hk"] = found["h"] // (self.q_heads // self.kv_heads)
        elif heads == "kv":
            found["hk"] = self.arange(self.kv_heads).reshape(1, -1, *ones)
        return found

    def reader(self, variables: Mapping[str, Value], heads: str, axes: int) -> Reader:
        """Reads the tables at the places of `variables`."""
        b = variables["b"]
        assert isinstance(b, Tensor)
        return Reader(self.tables, self.heads, heads, axes, b, self.q_heads, self.kv_heads)

    def evaluate(self, node: Expr, variables: Mapping[str, Value], heads: str, axes: int) -> Any:
        """`node` over tensors [batch, heads, ...] with `axes` axes behind the head's."""
        return evaluate(node, variables, self.reader(variables, heads, axes).operations)


def _constants(builder: Builder, op: Op) -> Tensor:
    return constant_table(op["values"], builder.device)


def _capacity(builder: Builder, op: Op) -> Tensor:
    keys = builder.data[op["order"].index].shape[-1]
    return torch.full((1, 1, 1, 1), keys, dtype=torch.int32, device=builder.device)


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
    return torch.where((order >= 0) & (order < order.shape[2]), order, -1).unsqueeze(2)


def _rank(builder: Builder, op: Op) -> Tensor:
    order = _order(builder, op).squeeze(2).long()
    length = order.shape[2]
    rank = order.new_full((*order.shape[:2], length + 1), -1)
    target = torch.where(order < 0, length, order)
    rank.scatter_(2, target, builder.arange(order.shape[2], torch.int64).expand_as(order))
    return rank[:, :, :length].unsqueeze(2)


def _extent(builder: Builder, op: Op) -> Tensor:
    """Smallest and largest row of each row tile; a tile without valid rows is empty (largest below smallest)."""
    order = builder.slot(op["order"], 1).to(torch.int32)
    tiles = builder.sequences.tiles(op["row_tile"])
    tiled = _at_sequences(
        builder, order, tiles, tiles.number[..., None] * op["row_tile"] + builder.arange(op["row_tile"])
    )
    q_len = tiles.with_axes(1)["q_len"]
    invalid = (tiled < 0) | (tiled >= q_len)
    return torch.stack([torch.where(invalid, _FAR, tiled).amin(-1), torch.where(invalid, -1, tiled).amax(-1)], -1)


def _at_sequences(builder: Builder, lists: Tensor, tiles: Tiles, at: Tensor) -> Tensor:
    """Rows `at` [1, 1, tiles, n] of `lists` [B or 1, heads, rows, ...]: [B, heads, tiles, n, ...], -1 outside."""
    rows = lists.shape[2]
    inside = (at >= 0) & (at < rows)
    index = at.clamp(0, max(rows - 1, 0)).to(torch.int64)
    if rows == 0:
        return lists.new_full((*lists.shape[:2], *at.shape[2:], *lists.shape[3:]), -1)
    if builder.sequences.packed:
        b = tiles.sequence.clamp(0, lists.shape[0] - 1).to(torch.int64).reshape(-1, 1)
        found = lists[b, :, index[0, 0]]  # [tiles, n, heads, ...]
        found = found.movedim(2, 0)[None]
    else:
        found = lists[:, :, index[0, 0]]
    inside = inside.reshape(*inside.shape, *(1,) * (lists.dim() - 3))
    return torch.where(inside, found, -1)


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
    units = -(-builder.sequences.kv_len // op["cols"])
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


def _groups_of_tiles(builder: Builder, op: Op) -> tuple[Tiles, Tensor, Tensor]:
    """The row tiles, and the groups of rows that each can cross at most [1, 1, tiles, n]; with: which it crosses."""
    tiles = builder.sequences.tiles(op["row_tile"])
    number = tiles.number[..., None]
    span = (op["row_tile"] - 1) // op["rows"] + 2
    group = number * op["row_tile"] // op["rows"] + builder.arange(span)
    stop = torch.minimum((number + 1) * op["row_tile"], as_tensor(tiles.with_axes(1)["q_len"], builder.device))
    return tiles, group, group * op["rows"] < stop


def _units(builder: Builder, op: Op) -> Tensor:
    if op["mask"] is None and op["indptr"] is None:
        return _units_of_lists(builder, op)
    member = _membership(builder, op)
    if op["row_tile"]:
        tiles, group, crossed = _groups_of_tiles(builder, op)
        found = _at_sequences(builder, member.to(torch.int8), tiles, group) > 0
        member = (found & crossed[..., None]).any(3)
    unit = builder.arange(member.shape[3])
    listed = torch.where(member, unit, PAD).sort(-1).values
    return listed if listed.shape[-1] else listed.new_full((*listed.shape[:-1], 1), PAD)


def _units_of_lists(builder: Builder, op: Op) -> Tensor:
    units = -(-builder.sequences.kv_len // op["cols"])
    core = 2 if op["rows"] else 1
    index = builder.slot(op["indices"], core)
    index = index if core == 2 else index.unsqueeze(2)
    if op["row_tile"] and op["rows"]:
        tiles, group, crossed = _groups_of_tiles(builder, op)
        index = torch.where(crossed[..., None], _at_sequences(builder, index, tiles, group), -1).flatten(3)
    valid = (index >= 0) & (index < units)
    return _sorted_unique(index, valid, min(index.shape[-1], units))


def _pack_bits(member: Tensor) -> Tensor:
    """Booleans along the last axis as words of 32 bits."""
    words = -(-member.shape[-1] // 32)
    padded = torch.nn.functional.pad(member, (0, words * 32 - member.shape[-1])).unflatten(-1, (words, 32))
    weights = torch.ones(32, dtype=torch.int64, device=member.device) << torch.arange(32, device=member.device)
    return _signed((padded * weights).sum(-1))


def _signed(words: Tensor) -> Tensor:
    """Words of 32 bits as int32."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _bits(builder: Builder, op: Op) -> Tensor:
    member = _membership(builder, op)
    return _pack_bits(member.transpose(2, 3) if op["by_unit"] else member)


def _groups(builder: Builder, op: Op) -> Tensor:
    """Entries (unit, group) in ascending order: each unit's place in the union, and its groups as bits."""
    tiles, group, crossed = _groups_of_tiles(builder, op)
    span, words = group.shape[3], op["words"]
    first = group[..., :1]
    if op["indptr"] is not None:
        member = _at_sequences(builder, _membership(builder, op).to(torch.int8), tiles, group) > 0
        bits = _pack_bits((member & crossed[..., None]).transpose(3, 4))  # [..., units, words]
        listed = _units(builder, op)
        at = listed.clamp(max=max(bits.shape[3] - 1, 0)).long()[..., None].expand(*listed.shape, words)
        found = bits[..., :words].gather(3, at) if bits.shape[3] else listed.new_zeros(at.shape)
        return torch.where(listed[..., None] < PAD, found, 0).flatten(3)
    units = -(-builder.sequences.kv_len // op["cols"])
    index = _at_sequences(builder, builder.slot(op["indices"], 2).long(), tiles, group)
    valid = crossed[..., None] & (index >= 0) & (index < units)
    entry = torch.where(valid, index * span + (group - first)[..., None], 2**62).flatten(3).sort(-1).values
    before = torch.nn.functional.pad(entry, (1, 0), value=-1)[..., :-1]
    new = (entry != before) & (entry < 2**62)
    unit, own = entry // span, entry % span
    place = ((unit != before // span) & new).cumsum(-1) - 1
    total = entry.new_zeros((*entry.shape[:-1], max(min(entry.shape[-1], units), 1) * words + 1))
    target = torch.where(new, place * words + own // 32, total.shape[-1] - 1)
    total.scatter_add_(-1, target, torch.where(new, 1 << (own % 32), 0))
    return _signed(total[..., :-1])


def _offsets(builder: Builder, op: Op) -> Tensor:
    """The offsets; what is not between `low` and `high` lies beyond every position."""
    offsets = builder.slot(op["offsets"], 1).long()
    if op["low"] is not None:
        offsets = torch.where(offsets < op["low"], _FAR, offsets)
    return offsets if op["high"] is None else torch.where(offsets >= op["high"], _FAR, offsets)


def _diagonal_bits(builder: Builder, op: Op) -> Tensor:
    """Bit `offset - q_offset + keys + margin`; in a packed batch each sequence's bits follow those before it."""
    offsets = _offsets(builder, op)
    margin, sequences = op["margin"], builder.sequences
    scalars = sequences.variables(2)
    ranks = None if op["order"] is None else builder.data[op["order"].index].shape[-1]
    keys = scalars["kv_len"] if ranks is None else ranks
    reach = as_tensor(scalars["q_len"] + keys + 1 + 2 * margin, builder.device)
    x = offsets.clamp(-_FAR, _FAR) + (keys - scalars["q_offset"] + margin)
    valid = (x >= 0) & (x < reach)
    size = sequences.q_len + (sequences.kv_len if ranks is None else ranks) + 1 + 2 * margin
    if sequences.packed:
        b = scalars["b"]
        size += (sequences.batch - 1) * ((ranks or 0) + 1 + 2 * margin)
        x = x + scalars["q_start"] + (scalars["k_start"] if ranks is None else b * ranks) + b * (1 + 2 * margin)
    target = torch.where(valid, x, size)
    if sequences.packed:
        target = target.expand(sequences.batch, -1, -1).transpose(0, 1).flatten(1)[None]
    found = torch.zeros((*target.shape[:2], size + 1), dtype=torch.bool, device=builder.device)
    found.scatter_(2, target, torch.ones_like(target, dtype=torch.bool))
    return _pack_bits(found[..., :size]).unsqueeze(2)


def _diagonal_runs(builder: Builder, op: Op) -> Tensor:
    """Offset o sweeps the columns [-o - row_tile, -o), base one behind the tile's last position.

    Runs are unions of intervals that touch. The c-th tile of a run is brought in by the interval that needs it first.
    """
    offsets = _offsets(builder, op)
    rows, cols = op["row_tile"], op["block_n"]
    near = (offsets > -_FAR) & (offsets < _FAR)
    low = _sorted_unique(-offsets - rows, near, offsets.shape[-1]).long()
    exists = low < PAD
    before = torch.nn.functional.pad(low, (1, 0), value=-(2**40))[..., :-1]
    opens = low > before + rows
    start = torch.where(opens, low, -(2**40)).cummax(-1).values
    closes = torch.nn.functional.pad(opens | ~exists, (0, 1), value=True)[..., 1:]
    end = torch.where(closes, low + rows, 2**40).flip(-1).cummin(-1).values.flip(-1)
    needed = (low - start + rows + cols - 1) // cols  # tiles of the run up to this interval
    had = torch.where(opens, 0, torch.nn.functional.pad(needed, (1, 0))[..., :-1])
    number = had[..., None] + builder.arange(-(-rows // cols), torch.int64)
    valid = exists[..., None] & (number < needed[..., None])
    found = torch.where(valid, start[..., None] + number * cols, PAD).flatten(2)
    ascending, order = found.sort(-1)
    if op["part"] == "starts":
        return ascending.unsqueeze(2)
    ends = end[..., None].expand(*end.shape, valid.shape[-1]).flatten(2)
    return torch.where(ascending < PAD, ends.gather(-1, order), PAD).unsqueeze(2)


def _touch(builder: Builder, op: Op) -> Tensor:
    """Looks at every pair, a strip of rows at a time: only patterns without a closed form come here."""
    rows, cols, keys = op["rows"], op["cols"], builder.sequences.kv_len
    groups = builder.sequences.groups(rows)
    j = builder.arange(keys).reshape(1, 1, 1, -1)
    strips = []
    for number in range(groups.count):
        strip = Tiles(1, {name: _column(value, number) for name, value in groups.variables.items()})
        variables = builder.variables(op["heads"], 2, strip)
        offset, kv_len = variables["q_offset"], variables["kv_len"]
        base = torch.div(as_tensor(offset, builder.device), rows, rounding_mode="floor")
        i = (base + variables["tile"]) * rows + builder.arange(rows).reshape(1, 1, -1, 1)
        pairs = builder.evaluate(op["predicate"], {**variables, "i": i, "r": i - offset, "j": j}, op["heads"], 2)
        pairs = (as_tensor(pairs, builder.device) & (j < kv_len)).any(2)
        pairs = pairs.expand(*pairs.shape[:2], keys)
        padded = torch.nn.functional.pad(pairs, (0, -keys % cols))
        strips.append(padded.unflatten(-1, (-1, cols)).any(-1))
    return _pack_bits(torch.stack(torch.broadcast_tensors(*strips), 2))


def _column(value: Value, number: int) -> Value:
    """Entry `number` of a value per tile."""
    if not isinstance(value, Tensor) or value.shape[-1] == 1:
        return value
    return value[..., number : number + 1]


def _splits(builder: Builder, op: Op) -> Tensor:
    """Positions of the units that the bounds cut: those any row wants, and inside them those every row wants."""
    heads, unit = op["heads"], op["unit"]
    tiles = builder.sequences.tiles(op["row_tile"])
    variables = builder.variables(heads, 1, tiles)

    def units_before(bound: str, up: bool) -> Tensor:
        limit = builder.evaluate(op[bound] - op["base"], variables, heads, 1)
        if op["starts"]:
            limit = limit if up else limit - (unit - 1)
        else:
            limit = OPERATIONS["floordiv"](limit + (unit - 1 if up else 0), unit)
        return as_tensor(limit, builder.device).to(torch.int32)

    bounds = [("lo", False), ("inner_lo", True), ("inner_hi", False), ("hi", True)]
    limits = [units_before(bound, up) for bound, up in (bounds if op["exact"] else (bounds[0], bounds[3]))]
    limits = [limit if limit.dim() else limit.reshape(1, 1, 1) for limit in limits]
    shape = (*torch.broadcast_shapes(*(limit.shape[:2] for limit in limits)), tiles.count)
    asked = torch.stack([limit.expand(shape) for limit in limits], -1)
    found = _count_below(builder, op, heads, asked, tiles)
    start, stop = found[..., 0], torch.maximum(found[..., -1], found[..., 0])
    first = last = start
    if op["exact"]:
        first = torch.minimum(torch.maximum(found[..., 1], start), stop)
        last = torch.minimum(found[..., 2], stop)
        enough = (last - first) * unit >= op["block_n"]
        first, last = torch.where(enough, first, start), torch.where(enough, last, start)
    positions: Tensor = torch.stack([start, first, last, stop], -1) * unit
    return positions


def _count_below(builder: Builder, op: Op, heads: str, limits: Tensor, tiles: Tiles) -> Tensor:
    """How many listed units lie below each of `limits` [batch, heads, tiles, n], in the list of their row tile."""
    variables = builder.variables(heads, 2, tiles)
    if builder.sequences.packed:
        by_slot = op["units_by_tile"]
        row = (
            builder.arange(tiles.count).reshape(1, 1, -1, 1)
            if by_slot
            else variables["tile"] // max(op["tiles_per_row"], 1)
        )
        reader = builder.reader(variables, heads, 2)
        return reader.count_le(op["units"], row if op["tiles_per_row"] else 0, limits - 1)
    listed = builder.reader(variables, heads, 2).table(op["units"])
    lead = torch.broadcast_shapes(listed.shape[:2], limits.shape[:2])
    count = limits.shape[3]
    per_row = op["tiles_per_row"] or tiles.count
    rows = listed.shape[2]
    # a tile behind the last row of the list exists only beside the rows of the call, where nothing is asked
    padded = torch.nn.functional.pad(limits.expand(*lead, -1, -1), (0, 0, 0, max(0, rows * per_row - tiles.count)))
    asked = padded[:, :, : rows * per_row].reshape(*lead, rows, per_row * count)
    below = torch.searchsorted(listed.expand(*lead, -1, -1).contiguous(), asked.contiguous(), out_int32=True)
    return below.reshape(*lead, rows * per_row, count)[:, :, : tiles.count]


_BUILDERS: dict[str, Callable[[Builder, Op], Tensor]] = {
    "constants": _constants,
    "capacity": _capacity,
    "documents": _documents,
    "order": _order,
    "rank": _rank,
    "extent": _extent,
    "units": _units,
    "bits": _bits,
    "groups": _groups,
    "diagonal_bits": _diagonal_bits,
    "diagonal_runs": _diagonal_runs,
    "touch": _touch,
    "splits": _splits,
}
