"""What tiling is done for, and the tables that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spgen.ir import expr
from spgen.ir.expr import Expr, var
from spgen.ir.node import Op, Slot
from spgen.ir.tiles import TILES

TILE, B, Q_START = map(var, ("tile", "b", "q_start"))


@dataclass(frozen=True)
class Shape:
    """What tiling must know: heads, the rows of a row tile (per head), the tile's sides, and if batches are packed.

    Where keys are walked in order, tiles begin at multiples of `align`.
    """

    q_heads: int
    kv_heads: int
    row_tile: int
    block_m: int
    block_n: int
    cu_seqlens: bool = False
    align: int = 1

    @property
    def slot(self) -> Expr:
        """The row of this row tile in tables that have one for each."""
        return Q_START // self.row_tile + B + 1 + TILE if self.cu_seqlens else TILE


def core_rank(op: Op) -> int:
    """The axes of an operation's data behind batch and head."""
    return 2 if op.kind == "listed" and op["rows"] and op["indptr"] is None else 1


class ProgramTables:
    """The tables of a program: one per distinct content, named by what they hold."""

    def __init__(self, slots: Sequence[Slot], shape: Shape) -> None:
        self.slots, self.shape = {slot.index: slot for slot in slots}, shape
        self.ops: dict[str, Op] = {}
        self._names: dict[Op, str] = {}

    def heads_of(self, slot: Slot, core: int) -> str:
        """Whose axis the heads of `slot` are, a tensor with `core` axes behind batch and head."""
        dims = slot.dims[:-core]
        return self.heads_for(int(dims[-1])) if dims else "one"

    def heads_for(self, count: int) -> str:
        """Whose axis one of `count` heads is."""
        if count == self.shape.kv_heads:
            return "kv" if count > 1 or self.shape.q_heads > 1 else "one"
        return "one" if count == 1 else "q"

    def widest(self, names: frozenset[str], *expressions: Expr) -> str:
        """The head axis of something computed from these tables."""
        kinds = {self.ops[name]["heads"] for name in names}
        if any("h" in expr.free_variables(e) for e in expressions):
            kinds.add("q")
        return next((kind for kind in ("q", "kv") if kind in kinds), "one")

    def add(self, kind: str, base: str, heads: str, /, **attrs: Any) -> str:
        """The name of the table with this content."""
        content = TILES.make(kind, name="", heads=heads, **attrs)
        if content not in self._names:
            name = base if base not in self.ops else f"{base}_{len(self.ops)}"
            self._names[content] = name
            self.ops[name] = TILES.make(kind, name=name, heads=heads, **attrs)
        return self._names[content]

    def order(self, slot: Slot, axis: str, inverse: bool = False) -> str:
        """The table of a permutation or of its inverse."""
        kind = "rank" if inverse else "order"
        return self.add(kind, f"{kind}_{slot.index}", self.heads_of(slot, 1), order=slot, axis=axis)

    def resolve(self, node: Expr) -> Expr:
        """`node` with per-head constants and document bounds read from tables."""
        done: dict[Expr, Expr] = {}
        for current in expr.walk(node):
            if current.op == "heads":
                done[current] = self._constants([arg.args[0] for arg in current.args])
                continue
            for name in expr.tables(current) if current.op in ("load", "count_le", "bit") else ():
                self._documents(name)
            done[current] = expr.rebuild(current, [done[child] for child in expr.operands(current)])
        return done[node]

    def _constants(self, values: list[int]) -> Expr:
        base = f"constants_{sum(op.kind == 'constants' for op in self.ops.values())}"
        name = self.add("constants", base, self.heads_for(len(values)), values=tuple(values))
        return expr.load(name, 0, 0)

    def _documents(self, name: str) -> None:
        prefix, _, number = name.rpartition("_")
        if prefix.startswith("document_"):
            slot = self.slots[int(number)]
            self.add("documents", name, "one", cu_seqlens=slot, part=prefix.removeprefix("document_"))
