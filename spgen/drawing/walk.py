"""What a kernel walks: the runs of its level-3 segments, evaluated on the tables that a call builds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spgen.compile import Lowered
from spgen.ir.expr import Expr, free_variables, tables
from spgen.ir.kernel import parts
from spgen.ir.node import Op
from spgen.ir.tiles import segments
from spgen.patterns import Pattern
from spgen.sequences import Sequences
from spgen.tables import Builder

_MOST_TILES = 256  # of a longer call some row tiles are walked, evenly spread


@dataclass(frozen=True)
class Run:
    """One segment in one row tile of one head: keys [positions] by position, -1 where there is none.

    `rows` are the call's rows of the tile; tile `n` of the run holds the positions where `tile` is n, and `whole` says
    which positions lie in tiles without a mask. `contiguous`: the keys of a tile follow each other.
    """

    head: int
    segment: int
    rows: Tensor
    keys: Tensor
    tile: Tensor
    whole: Tensor
    contiguous: bool


class Walk:
    """The tiles that the kernel of a call visits."""

    def __init__(self, levels: Lowered, pattern: Pattern, sequences: Sequences, q_heads: int, kv_heads: int) -> None:
        self.levels, self.sequences = levels, sequences
        self.kernel, self.program = levels.kernel, levels.program
        self.segments = parts(self.kernel, "segment")
        self.block_n = int(self.kernel["block_n"])
        self.sources = {op["name"]: str(op["source"]) for op in segments(self.program)}
        self._heads = "kv" if levels.pack > 1 else "q"
        self._group = q_heads // kv_heads if levels.pack > 1 else 1
        self._builder = Builder(pattern.to("cpu").data, sequences, q_heads, kv_heads)
        self._builder.build(self.program)
        self._tiles = sequences.tiles(self.program["row_tile"])
        self.tile_count = self._tiles.count
        self._env = self._builder.variables(self._heads, 1, self._tiles)
        for let in parts(self.kernel, "let"):
            if let["per"] == "program":
                self._env[let["name"]] = self._value(let["value"], self._env)
        heads = kv_heads if levels.pack > 1 else q_heads
        self._shape = (sequences.batch, heads, self.tile_count)
        self._bounds = [self._bounds_of(segment) for segment in self.segments]

    def counts(self, sequence: int, heads: Sequence[int]) -> list[tuple[int, int]]:
        """(whole, masked) tiles of each segment, over all row tiles of these query heads."""
        own = sorted({head // self._group for head in heads})
        found = []
        for bounds in self._bounds:
            start, first, last, stop = bounds[:, sequence, own]
            full = (last - first) // self.block_n
            behind = first + full * self.block_n
            masked = -(-(first - start) // self.block_n) - (-(stop - behind) // self.block_n)
            found.append((int(full.sum()), int(masked.sum())))
        return found

    def runs(self, sequence: int, heads: Sequence[int]) -> Iterator[Run]:
        """Every run that is not empty, of all row tiles or, of a long call, of some."""
        step = -(-self.tile_count // _MOST_TILES)
        for tile in range(0, self.tile_count, max(step, 1)):
            rows = self.rows(sequence, heads, tile)
            for number, segment in enumerate(self.segments):
                yield from self._runs_of(sequence, heads, tile, number, segment, rows)

    def rows(self, sequence: int, heads: Sequence[int], tile: int) -> dict[int, Tensor]:
        """The call's rows in a row tile, for each head."""
        s = tile * int(self.program["row_tile"]) + torch.arange(int(self.program["row_tile"]))
        s = s[s < self.sequences.q_len]
        if self.program["row"] is None:
            return dict.fromkeys(heads, s)
        found = torch.as_tensor(self._value(self.program["row"], {**self._at(tile), "s": s.reshape(1, 1, -1)}))
        found = found.expand(*self._shape[:2], len(s))
        rows = {head: found[sequence, head // self._group] for head in heads}
        return {head: own[(own >= 0) & (own < self.sequences.q_len)] for head, own in rows.items()}

    def raster(self, sequence: int, heads: Sequence[int], row_edges: Tensor, col_edges: Tensor) -> Tensor:
        """Shares of the pairs of each cell that are computed, float [segments, 2, heads, rows, cols].

        The second axis tells masked tiles (0) from whole ones (1).
        """
        rows, cols = len(row_edges) - 1, len(col_edges) - 1
        alike = self._alike(sequence, heads)
        if len(alike) < len(heads):  # each kind of head once
            found = self.raster(sequence, list(alike), row_edges, col_edges)
            number = {head: n for n, like in enumerate(alike.values()) for head in like}
            return found[:, :, [number[head] for head in heads]]
        found = torch.zeros(len(self.segments), 2, len(heads), rows, cols, dtype=torch.float64)
        walked = torch.zeros(len(heads), rows, dtype=torch.float64)
        place = {head: n for n, head in enumerate(heads)}
        row_cell = torch.bucketize(torch.arange(int(row_edges[-1])), row_edges[1:], right=True)
        col_cell = torch.bucketize(torch.arange(int(col_edges[-1])), col_edges[1:], right=True)
        step = -(-self.tile_count // _MOST_TILES)
        for tile in range(0, self.tile_count, max(step, 1)):
            for head, own in self.rows(sequence, heads, tile).items():
                walked[place[head]] += torch.bincount(row_cell[own], minlength=rows)
        for run in self.runs(sequence, heads):
            height = torch.bincount(row_cell[run.rows], minlength=rows).double()
            for kind in (0, 1):
                keys = run.keys[(run.whole == bool(kind)) & (run.keys >= 0)]
                width = torch.bincount(col_cell[keys], minlength=cols).double()
                found[run.segment, kind, place[run.head]] += height[:, None] * width
        area = walked[..., None] * (col_edges[1:] - col_edges[:-1])
        return torch.where(area > 0, found / area.clamp(min=1), 0)

    def _alike(self, sequence: int, heads: Sequence[int]) -> dict[int, list[int]]:
        """The heads that walk the same, by the first of them: equal bounds, and columns that do not tell them apart."""
        group = self._builder.q_heads // self._builder.kv_heads
        given = self._read_by_columns()
        names = {name for node in given for name in tables(node)}
        kinds = {self._builder.heads[name] for name in names} | {
            {"h": "q", "hk": "kv"}[name] for node in given for name in free_variables(node) & {"h", "hk"}
        }
        found: dict[Any, list[int]] = {}
        for head in heads:
            own = head if "q" in kinds else head // group if "kv" in kinds else 0
            bounds = torch.stack(self._bounds)[:, :, sequence, head // self._group] if self._bounds else torch.zeros(0)
            found.setdefault((own, bounds.numpy().tobytes()), []).append(head)
        return {like[0]: like for like in found.values()}

    def _read_by_columns(self) -> list[Expr]:
        """What columns, keys and rows are computed from, lets included."""
        nodes = [node for one in self.segments for node in (one["column"], one["key"])] + [self.program["row"]]
        given = [node for node in nodes if node is not None]
        lets = {let["name"]: let["value"] for let in parts(self.kernel, "let")}
        for node in given:  # grows meanwhile
            given += [lets.pop(name) for name in free_variables(node) & set(lets)]
        return given

    def _value(self, node: Expr, env: Any) -> Any:
        return self._builder.evaluate(node, env, self._heads, 1)

    def _bounds_of(self, segment: Op) -> Tensor:
        """start, full_start, full_stop and stop of every run, int64 [4, batch, heads, tiles]."""
        nodes = [segment[name] for name in ("start", "full_start", "full_stop", "stop")]
        nodes = [segment["start"] if node is None else node for node in nodes]  # no tile is whole
        values = [torch.as_tensor(self._value(node, self._env)).long() for node in nodes]
        return torch.stack([value.expand(self._shape) for value in values])

    def _at(self, tile: int) -> dict[str, Any]:
        """The program's scalars in one row tile."""
        return {
            name: value[..., tile : tile + 1]
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == self.tile_count
            else value
            for name, value in self._env.items()
        }

    def _runs_of(
        self, sequence: int, heads: Sequence[int], tile: int, number: int, segment: Op, rows: dict[int, Tensor]
    ) -> Iterator[Run]:
        bounds = self._bounds[number][:, sequence, :, tile]
        asked = sorted({head // self._group for head in heads})
        begun = bounds[:, asked][:, bounds[0, asked] < bounds[3, asked]]  # an empty run begins anywhere
        if not begun.numel():
            return
        low, high = int(begun[0].min()), int(begun[3].max())
        keys = self._keys(segment, tile, torch.arange(low, high))[sequence]
        for head in heads:
            start, first, last, stop = bounds[:, head // self._group].tolist()
            if start < stop:
                own = keys[head // self._group, start - low : stop - low]
                at, whole = self._cut(torch.arange(start, stop), start, first, last)
                yield Run(head, number, rows[head], own, at, whole, segment["contiguous"] and segment["key"] is None)

    def _keys(self, segment: Op, tile: int, positions: Tensor) -> Tensor:
        """The key at each position, [batch, heads, positions]; -1 where there is none."""
        env = {**self._at(tile), "p": positions.int().reshape(1, 1, -1)}
        env["c"] = self._value(segment["column"], env)
        found = torch.as_tensor(env["c"] if segment["key"] is None else self._value(segment["key"], env)).long()
        found = found.expand(*self._shape[:2], len(positions))
        length = torch.as_tensor(env["kv_len"])
        return torch.where((found >= 0) & (found < length), found, -1)

    def _cut(self, p: Tensor, start: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The tile of each position in its run, and whether it is whole: masked, whole, masked again."""
        n = self.block_n
        behind = first + (last - first) // n * n
        left, full = -(-(first - start) // n), (last - first) // n
        at = torch.where(p < first, (p - start) // n, torch.where(p < behind, left + (p - first) // n, 0))
        at = torch.where(p >= behind, left + full + (p - behind) // n, at)
        return at, (p >= first) & (p < behind)
