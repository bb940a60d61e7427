"""Expressions over tables, evaluated on tensors: what planning computes bounds with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spgen.sequences import Value


@lru_cache(maxsize=256)
def constant_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Per-head constants as a table."""
    return torch.tensor(values, dtype=torch.int32, device=device).reshape(1, -1, 1, 1)


@dataclass(frozen=True)
class Reader:
    """Table reads with the meaning that expressions give them: -1, false and 0 outside.

    `tables` are [batch or 1, heads, rows, columns], `kinds` says whose heads ("one", "kv", "q"). Results are
    [batch, heads of `heads`, ...] with `axes` axes behind the head's; `b` is the sequence at each place.
    """

    tables: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    heads: str
    axes: int
    b: Tensor
    q_heads: int
    kv_heads: int

    @property
    def operations(self) -> dict[str, Callable[..., Any]]:
        """All operations of expressions."""
        return {
            **OPERATIONS, "heads": self.heads_of, "load": self.load, "bit": self.bit, "word": self.word,
            "count_le": self.count_le,
        }  # fmt: skip

    def heads_of(self, *values: int) -> Tensor:
        """Per-head constants along the head axis."""
        per_head = constant_table(values, self.b.device).reshape(1, -1, *(1,) * self.axes)
        repeat = self.q_heads // len(values) if self.heads == "q" else 1
        return per_head.repeat_interleave(repeat, 1)

    def table(self, name: str) -> Tensor:
        """The table with its head axis at the granularity of the result."""
        table = self.tables[name]
        if self.heads == "q" and self.kinds[name] == "kv" and table.shape[1] > 1:
            return table.repeat_interleave(self.q_heads // self.kv_heads, 1)
        return table

    def flat(self, name: str, row: Value) -> tuple[Tensor, Tensor, Tensor, int]:
        """(flat table, offset of each row, whether the row exists, columns) for rows of shape [batch, heads, ...]."""
        table = self.table(name)
        batches, heads, rows, columns = table.shape
        h = torch.arange(heads, device=table.device).reshape(1, -1, *(1,) * self.axes)
        # what is read from a table that all sequences share is shared as well
        b = self.b.clamp(0, batches - 1).to(torch.int64) if batches > 1 else self.b.new_zeros((1,) * self.b.dim())
        row = as_tensor(row, table.device)
        inside = (row >= 0) & (row < rows)
        start = ((b * heads + h) * rows + row.clamp(0, max(rows - 1, 0))) * columns
        return table.reshape(-1), start, inside, columns

    def load(self, name: str, row: Value, col: Value) -> Tensor:
        """The integer at [row, col]."""
        flat, start, inside, columns = self.flat(name, row)
        col = as_tensor(col, self.b.device)
        inside = inside & (col >= 0) & (col < columns)
        if flat.numel() == 0:
            return torch.full_like(start + col, -1)
        return torch.where(inside, flat[start + col.clamp(0, columns - 1)], -1)

    def _words(self, name: str, row: Value, at: Tensor) -> Tensor:
        flat, start, inside, columns = self.flat(name, row)
        inside = inside & (at >= 0) & (at < columns)
        if flat.numel() == 0:
            return torch.zeros_like(start + at)
        return torch.where(inside, flat[start + at.clamp(0, columns - 1)].to(torch.int64) & 0xFFFFFFFF, 0)

    def bit(self, name: str, row: Value, x: Value) -> Tensor:
        """Bit `x` of a row."""
        x = as_tensor(x, self.b.device)
        return ((self._words(name, row, x >> 5) >> (x & 31)) & 1) == 1

    def word(self, name: str, row: Value, x: Value) -> Tensor:
        """The 32 bits from bit `x` on."""
        x = as_tensor(x, self.b.device)
        low, high = (self._words(name, row, (x >> 5) + n) for n in range(2))
        return (((high << 32) | low) >> (x & 31)).to(torch.int32)

    def count_le(self, name: str, row: Value, x: Value) -> Tensor:
        """Binary search, a step at a time for all entries at once."""
        flat, start, inside, columns = self.flat(name, row)
        x = as_tensor(x, self.b.device)
        low = torch.zeros_like(start + x)
        if flat.numel() == 0:
            return low
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
        return operation(as_tensor(a, device), as_tensor(b, device))

    return apply


def _select(condition: Value, a: Value, b: Value) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    device = condition.device
    return torch.where(condition, as_tensor(a, device), as_tensor(b, device))


def _not(a: Value) -> Any:
    return (not a) if isinstance(a, bool) else ~a


def as_tensor(value: Value, device: torch.device) -> Tensor:
    """`value` on the device; a number is filled in there, since a copy from the host could not be captured."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


OPERATIONS: dict[str, Callable[..., Any]] = {
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
