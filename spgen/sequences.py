"""The sequences of a call, and what the program's scalars are for each of them, on the device.

An ordinary batch has one row of tiles for each sequence. In a packed batch sequences lie one behind the other, and
only the device knows where: row tiles are numbered by slots (see ir/kernel.py), as many as could be needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = "Tensor | int | bool"


@dataclass(frozen=True)
class Tiles:
    """The rows of a table that has one for each row tile: `variables` are the program's scalars there.

    They are tensors [B, 1, count] ([1, 1, count] in a packed batch) or shapes that broadcast to it, or ints.
    """

    count: int
    variables: dict[str, Value]

    def with_axes(self, axes: int) -> dict[str, Value]:
        """The variables with `axes` more axes of size 1."""
        ones = (1,) * axes
        return {
            name: value.reshape(*value.shape, *ones) if isinstance(value, Tensor) else value
            for name, value in self.variables.items()
        }

    @property
    def sequence(self) -> Tensor:
        """The number of each tile's sequence, -1 and N included."""
        found = self.variables["b"]
        assert isinstance(found, Tensor)
        return found

    @property
    def number(self) -> Tensor:
        """The number of each tile in its sequence."""
        found = self.variables["tile"]
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class Sequences:
    """Lengths and offsets: `q_len` and `kv_len` are those of the tensors (all rows and keys of a packed batch).

    `kv_lengths` and `q_offset` as in a call; `cu_q` and `cu_k` are the boundaries of a packed batch.
    """

    batch: int
    q_len: int
    kv_len: int
    device: torch.device
    q_offset: int | Tensor | None = None
    kv_lengths: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether sequences lie one behind the other."""
        return self.cu_q is not None

    def arange(self, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """0, 1, … on the device."""
        return torch.arange(count, device=self.device, dtype=dtype)

    def scalars(self) -> dict[str, Value]:
        """The program's scalars: ints, or tensors [B]."""
        keys: Value = self.kv_len
        rows: Value = self.q_len
        found: dict[str, Value] = {"b": self.arange(self.batch)}
        if self.cu_q is not None and self.cu_k is not None:
            cu_q, cu_k = _clamped(self.cu_q, self.q_len), _clamped(self.cu_k, self.kv_len)
            rows, keys = cu_q[1:] - cu_q[:-1], (cu_k[1:] - cu_k[:-1]).clamp(min=0)
            found |= {"q_start": cu_q[:-1], "k_start": cu_k[:-1]}
        else:
            found |= {"q_start": 0, "k_start": 0}
        if self.kv_lengths is not None:
            lengths = self.kv_lengths.to(torch.int32).clamp(min=0)
            keys = torch.minimum(lengths, keys) if isinstance(keys, Tensor) else lengths.clamp(max=keys)
        offset: Value = keys - rows if self.q_offset is None else self.q_offset
        if isinstance(offset, Tensor):
            offset = offset.to(torch.int32)
        return {**found, "q_len": rows, "kv_len": keys, "q_offset": offset}

    def variables(self, axes: int) -> dict[str, Value]:
        """The scalars with `axes` axes behind the sequences'."""
        return {
            name: value.reshape(-1, *(1,) * axes) if isinstance(value, Tensor) else value
            for name, value in self.scalars().items()
        }

    def tiles(self, row_tile: int) -> Tiles:
        """The row tiles of `row_tile` rows; what lies outside all sequences has tiles too (sequences -1 and N)."""
        if self.cu_q is None:
            count = -(-self.q_len // row_tile)
            tile = self.arange(count).reshape(1, 1, -1)
            return Tiles(count, {**self.variables(2), "tile": tile})
        bounds = torch.cat([self.cu_q.new_zeros(1), self.cu_q, self.cu_q.new_full((1,), self.q_len)])
        bounds = _clamped(bounds, self.q_len)
        starts = bounds[:-1] // row_tile + self.arange(self.batch + 2)
        count = self.q_len // row_tile + self.batch + 2
        slot = self.arange(count)
        at = torch.searchsorted(starts, slot, right=True) - 1
        around = {
            name: _with_neighbours(value) if isinstance(value, Tensor) else value
            for name, value in self.scalars().items()
        }
        around |= {"b": self.arange(self.batch + 2) - 1, "q_start": bounds[:-1], "q_len": bounds[1:] - bounds[:-1]}
        found = {
            name: value[at].reshape(1, 1, -1) if isinstance(value, Tensor) else value for name, value in around.items()
        }
        return Tiles(count, {**found, "tile": (slot - starts[at]).reshape(1, 1, -1)})

    def groups(self, rows: int) -> Tiles:
        """Groups of `rows` positions, counted from the one of row 0: one more than rows could fill."""
        if self.cu_q is None:
            count = -(-self.q_len // rows) + 1
            return Tiles(count, {**self.variables(2), "tile": self.arange(count).reshape(1, 1, -1)})
        scalars = self.scalars()
        start = scalars["q_start"]
        assert isinstance(start, Tensor)
        starts = start // rows + 2 * self.arange(self.batch)
        count = self.q_len // rows + 2 * self.batch + 1
        slot = self.arange(count)
        at = (torch.searchsorted(starts, slot, right=True) - 1).clamp(min=0)
        found = {
            name: value[at].reshape(1, 1, -1) if isinstance(value, Tensor) else value for name, value in scalars.items()
        }
        return Tiles(count, {**found, "tile": (slot - starts[at]).reshape(1, 1, -1)})


def _clamped(boundaries: Tensor, length: int) -> Tensor:
    return boundaries.to(torch.int32).clamp(0, length)


def _with_neighbours(value: Tensor) -> Tensor:
    """Values of sequences -1 … N: none has keys outside the batch, and so no other value matters there."""
    return torch.nn.functional.pad(value, (1, 1))
