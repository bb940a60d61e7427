"""What is drawn: a pattern in a call, some of its heads, and how the compiler tiles it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from spgen.compile import Lowered, is_packed, lower, lowered
from spgen.drawing.walk import Walk
from spgen.ir.config import Config
from spgen.passes.schedule import Call
from spgen.patterns import Pattern
from spgen.reference import mask
from spgen.sequences import Sequences
from spgen.target import Target
from spgen.tuned import Sizes, request_for

_STRIP = 2**22  # looked up at once
_ALL_PAIRS = 4 * _STRIP  # of a larger call some rows of each cell are looked up
_SEED = 0


@dataclass(frozen=True)
class Tiling:
    """How the pattern is lowered: for which target, element type and head dims; a tile size other than its default."""

    target: str = "cpu"
    dtype: str = "float32"
    head_dim: int = 64
    value_dim: int = 64
    size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A pattern in a call of [batch, q_heads, q_len] rows and [batch, kv_heads, kv_len] keys.

    Drawn are `heads` of sequence `sequence`; with `tiling` also what the kernel walks.
    """

    pattern: Pattern
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    batch: int
    q_offset: int | Tensor | None
    kv_lengths: Tensor | None
    sequence: int
    heads: tuple[int, ...]
    tiling: Tiling | None
    known: dict[tuple[int, int], tuple[Tensor, bool]] = field(default_factory=dict, repr=False)  # density by cells

    def edges(self, length: int, cells: int) -> Tensor:
        """Where each of `cells` cells starts along `length`, and the end: integers [cells + 1]."""
        return torch.arange(cells + 1) * length // max(cells, 1)

    def density(self, rows: int, cols: int) -> tuple[Tensor, bool]:
        """Shares of the pairs in each cell, float [heads, rows, cols], and whether rows were sampled.

        All keys are looked at; of a large call some rows of each cell, chosen at random with a fixed seed.
        """
        if not self.q_len or not self.kv_len:
            return torch.zeros(len(self.heads), rows, cols), False
        edges, columns = self.edges(self.q_len, rows), self.edges(self.kv_len, cols)
        a_row = self.batch * self.q_heads * self.kv_len
        each = max(1, _ALL_PAIRS // (a_row * rows))
        generator = torch.Generator().manual_seed(_SEED)
        asked, sizes, sampled = [], [], False
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            count = min(each, stop - start)
            # one in each of `count` strata: a regular step would meet stripes always or never
            strata = torch.arange(count + 1) * (stop - start) // count
            inside = (torch.rand(count, generator=generator) * (strata[1:] - strata[:-1])).long()
            asked.append(start + strata[:-1] + inside)
            sizes.append(count)
            sampled |= count < stop - start
        counts = self._counts(torch.cat(asked), columns)
        cells = torch.stack([part.sum(1) for part in counts.split(sizes, 1)], 1)
        area = torch.tensor(sizes)[:, None] * (columns[1:] - columns[:-1])
        return cells / area, sampled

    def _counts(self, rows: Tensor, columns: Tensor) -> Tensor:
        """How many keys of each column of cells each row holds, float64 [heads, rows, cols]."""
        step = max(1, _STRIP // (self.batch * self.q_heads * self.kv_len))
        parts = []
        for some in rows.split(step):
            found = mask(
                self.pattern, self.q_len, self.kv_len, q_heads=self.q_heads, kv_heads=self.kv_heads, batch=self.batch,
                q_offset=self.q_offset, kv_lengths=self.kv_lengths, device="cpu", rows=some,
            )[self.sequence, list(self.heads)]  # fmt: skip
            total = torch.nn.functional.pad(found.cumsum(-1), (1, 0))
            parts.append(total[..., columns[1:]] - total[..., columns[:-1]])
        return torch.cat(parts, 1).double()

    @cached_property
    def walk(self) -> Walk | None:
        """What the kernel walks."""
        if self.tiling is None:
            return None
        sequences = Sequences(
            self.batch, self.q_len, self.kv_len, torch.device("cpu"), self.q_offset, self.kv_lengths
        )  # fmt: skip
        return Walk(self._lowered(self.tiling), self.pattern, sequences, self.q_heads, self.kv_heads)

    def _lowered(self, tiling: Tiling) -> Lowered:
        mode = "default" if self.q_offset is None else "scalar" if isinstance(self.q_offset, int) else "tensor"
        call = Call(
            tiling.dtype, tiling.head_dim, tiling.value_dim, q_offset=mode, kv_lengths=self.kv_lengths is not None
        )
        text, target = repr(self.pattern), Target.of(tiling.target)

        sizes = Sizes(self.batch, self.q_len, self.kv_len, tuple(tensor.shape for tensor in self.pattern.data))
        request = request_for(text, call, self.q_heads, self.kv_heads, target, sizes)
        if tiling.size is None:
            return lowered(request)
        packed = is_packed(text, self.q_heads, self.kv_heads, self.q_len, tiling.size[0])
        return lower(replace(request, packed=packed), Config(*tiling.size))

    def visited(self, rows: int, cols: int) -> Tensor:
        """Shares of the pairs of each cell that the kernel computes, float [segments, 2, heads, rows, cols].

        The second axis tells masked tiles (0) from whole ones (1).
        """
        assert self.walk is not None
        return self.walk.raster(self.sequence, self.heads, self.edges(self.q_len, rows), self.edges(self.kv_len, cols))


def call_text(subject: Subject) -> str:
    """The call in words."""
    batch = f"{subject.batch} sequences of " if subject.batch > 1 else ""
    return f"{batch}{subject.q_len:,} rows x {subject.kv_len:,} keys"
