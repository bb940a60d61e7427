"""Pictures of patterns: in a terminal, in a notebook, in a file.

print(show(causal() & (sink(4) | window(16)), 64))
show(pattern, 4096, q_heads=8, heads=True, tiles=True).save("pattern.svg")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from spgen.compile import refuse_selections
from spgen.data import check_shapes
from spgen.drawing import figure, terminal
from spgen.drawing.colours import segment_colour
from spgen.drawing.subject import Subject, Tiling, call_text
from spgen.errors import DtypeError, ShapeError, ToolchainError
from spgen.patterns import Pattern

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from spgen.drawing.walk import Run

T = TypeVar("T")
_WIDEST = 100  # characters, in a wider terminal too: a picture should fit on the screen


@dataclass(frozen=True, eq=False)
class Picture:
    """A drawn pattern. `print` and notebooks show it; `save` writes it to a file.

    A cell that stands for many pairs is the darker (in colour, the brighter) the more of them the pattern holds. With
    tiles its colour or letter is that of the segment which walks it, strong (a capital) where the tile runs without a
    mask.
    """

    subject: Subject

    @property
    def heads(self) -> tuple[int, ...]:
        """The query heads that are drawn."""
        return self.subject.heads

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows and keys of the call."""
        return self.subject.q_len, self.subject.kv_len

    @property
    def tiled(self) -> bool:
        """Whether the kernel's tiles are drawn."""
        return self.subject.tiling is not None

    @cached_property
    def segments(self) -> Mapping[str, tuple[int, int]]:
        """(whole, masked) tiles of each segment over the heads drawn, by the segment's name; empty without tiles."""
        walk = self.subject.walk
        if walk is None:
            return {}
        counts = walk.counts(self.subject.sequence, self.heads)
        return {segment["name"]: count for segment, count in zip(walk.segments, counts, strict=True)}

    def source(self, segment: str) -> str:
        """Where a segment's columns come from: range, list or gather."""
        return self.subject.walk.sources[segment] if self.subject.walk else ""

    def colour(self, segment: str) -> tuple[float, float, float]:
        """The colour of a segment's tiles, red, green and blue from 0 to 1."""
        return segment_colour(list(self.segments).index(segment))

    def density(self, rows: int, cols: int) -> tuple[Tensor, bool]:
        """Shares of the pairs in rows x cols cells, float [heads, rows, cols], and whether rows were sampled."""
        if (rows, cols) not in self.subject.known:
            self.subject.known[rows, cols] = self.subject.density(rows, cols)
        return self.subject.known[rows, cols]

    def visited(self, rows: int, cols: int) -> Tensor:
        """Shares of the pairs that the kernel computes, float [segments, 2, heads, rows, cols]: masked, then whole."""
        return self.subject.visited(rows, cols)

    def runs(self, head: int) -> Iterator[Run]:
        """What the kernel walks for a head; nothing without tiles."""
        walk = self.subject.walk
        return iter(()) if walk is None else walk.runs(self.subject.sequence, (head,))

    def title(self, number: int) -> str:
        """What stands above the picture of the n-th head drawn."""
        return f"head {self.heads[number]}" if self.subject.q_heads > 1 else ""

    def headline(self, rows: int, cols: int) -> list[str]:
        """The pattern, and how much of the call it holds (for cells of this many rows and columns)."""
        density, sampled = self.density(rows, cols)
        heights = self.subject.edges(self.lengths[0], rows).diff()
        area = heights[:, None] * self.subject.edges(self.lengths[1], cols).diff()  # cells differ in size by one
        share = float((density * area).sum() / (area.sum() * len(self.heads)).clamp(min=1))
        about = "about " if sampled else ""
        tiles = ""
        if self.subject.walk:
            kernel = self.subject.walk.kernel
            tiles = f", in tiles of {kernel['block_m']} x {kernel['block_n']}"
        return [repr(self.subject.pattern), f"{call_text(self.subject)}: {about}{share:.1%} of the pairs{tiles}"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as .png, .svg or .pdf; raises ToolchainError where matplotlib is missing."""
        figure.save(self, Path(path))

    def __str__(self) -> str:
        return terminal.plain(self, _width())

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = min(options.max_width, _WIDEST)
        yield terminal.plain_text(self, width) if console.color_system is None else terminal.coloured(self, width)

    def _repr_png_(self) -> bytes | None:
        return self._rendered("png")

    def _repr_svg_(self) -> str | None:
        content = self._rendered("svg")
        return None if content is None else content.decode()

    def _rendered(self, kind: str) -> bytes | None:
        try:
            return figure.render(self, kind)
        except ToolchainError:
            return None  # a notebook then shows the text


def _width() -> int:
    return max(8, min(shutil.get_terminal_size().columns, _WIDEST))


def show(
    pattern: Pattern,
    q_len: int = 64,
    kv_len: int | None = None,
    *,
    q_heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    q_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    head: int = 0,
    heads: bool = False,
    sequence: int = 0,
    tiles: bool | tuple[int, int] = False,
    **tiling: Any,
) -> Picture:
    """A picture of `pattern` in a call of `q_len` rows and `kv_len` keys, as `pattern.mask` takes them.

    Drawn is one `head`, or with `heads` each of the `q_heads`; of a batch one `sequence`. With `tiles` the tiles that
    the compiled kernel walks are drawn, taken from its lowering: at the target's default tile size, or at (rows, keys).
    `target`, `dtype`, `head_dim` and `value_dim` say for which kernel (default: cpu, float32, 64, 64).
    The mask comes from the oracle; of a large call it is looked up on some rows of each cell.
    Raises the errors of `pattern.mask`, those of compiling with `tiles`, and ShapeError for a head or sequence that is
    not there.
    """
    if not isinstance(pattern, Pattern):
        raise DtypeError("pattern", given=type(pattern).__name__, allowed="a pattern such as sp.causal()")
    kv_len = q_len if kv_len is None else kv_len
    kv_heads = q_heads if kv_heads is None else kv_heads
    for name, value, count in (("head", head, q_heads), ("sequence", sequence, batch)):
        if not 0 <= value < count:
            raise ShapeError(name, given=value, allowed=f"0 to {count - 1}")
    if kv_heads < 1 or q_heads % kv_heads:
        raise ShapeError("kv_heads", given=kv_heads, allowed=f"a divisor of the {q_heads} query heads")
    check_shapes(
        pattern.node, pattern.data, q_len=q_len, kv_len=kv_len, q_heads=q_heads, kv_heads=kv_heads, batch=batch
    )
    refuse_selections(pattern.node)
    chosen = tuple(range(q_heads)) if heads else (head,)
    own = Tiling(**tiling, size=None if isinstance(tiles, bool) else tiles) if tiles else None
    subject = Subject(
        pattern, q_len, kv_len, q_heads, kv_heads, batch, _on_cpu(q_offset), _on_cpu(kv_lengths), sequence, chosen, own
    )  # fmt: skip
    _ = subject.walk  # lowered now: an error belongs here, not where the picture is printed
    return Picture(subject)


def _on_cpu(value: T) -> T:
    return value.cpu() if isinstance(value, Tensor) else value  # type: ignore[return-value]


__all__ = ["Picture", "show"]
