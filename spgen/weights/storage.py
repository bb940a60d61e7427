"""How sparse weights lie in memory: blocks, n of m, and bitmaps.

A weight [N, K] maps K features to N. `pack` keeps the values that a mask marks, `Stored.dense` brings them back.

    blocks(r, c)    r x c blocks of which any value is wanted, in the order of their rows: values [count, r, c]. Index:
                    `indptr` [R + 1] and `indices` [count] (the blocks of each block row, and their columns), and
                    `order` [R], the block rows by falling length; then the same by columns: `indptr`, `indices` (block
                    rows), `blocks` (where each block's values are), `order`.
    n_of_m(n, m)    at most n of each m consecutive columns: values [N, G * n], the n places of a group filled from the
                    left, 0 in others; index: `bits` uint8 [N, G * m / 8], bit j % 8 of byte j // 8 says that column j
                    is stored. Rows are padded to a multiple of both 64 and m columns, G groups.
    bitmap()        any values, row by row: values [count + 64], of which the last 64 are padding. Index: `words` int64
                    [N, T], a bit for each of 64 columns, and `offsets` int32 [N, T], where each word's values begin.

Values that are not of a floating-point type of 16 or 32 bits come with scales (float32): blocks have one for each of
their rows [count, r], rows of n_of_m and bitmap one [N]. `int4` values lie two to a byte, the first in the low half.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spgen.errors import DataError, PatternError, ShapeError, SpgenError, UnsupportedError

WORD = 64  # columns to a word of a bitmap
_TEXT = re.compile(r"(blocks|n_of_m)\((\d+), (\d+)\)|bitmap\(\)")
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Layout:
    """A storage's kind, and its numbers: r and c of blocks, n and m, none of a bitmap; prints as in the table above."""

    kind: str
    rows: int = 1
    cols: int = 1

    def __str__(self) -> str:
        return "bitmap()" if self.kind == "bitmap" else f"{self.kind}({self.rows}, {self.cols})"

    @staticmethod
    def read(text: str) -> Layout:
        """The layout that prints as `text`. Raises SpgenError for any other text."""
        match = re.fullmatch(_TEXT, text)
        if match is None:
            raise SpgenError("storage", given=repr(text), allowed="blocks(64, 64), n_of_m(2, 4), bitmap()")
        return Layout("bitmap") if match[1] is None else Layout(match[1], int(match[2]), int(match[3]))

    @property
    def transposed(self) -> Layout:
        """Of the transposed weight; n of m columns become a bitmap."""
        return Layout("blocks", self.cols, self.rows) if self.kind == "blocks" else Layout("bitmap")

    @property
    def padded(self) -> int:
        """Columns are padded to a multiple of this."""
        return math.lcm(WORD, self.cols) if self.kind == "n_of_m" else WORD


@dataclass(frozen=True)
class Stored:
    """A weight's stored values and where they are; see the module's text for the tensors."""

    layout: Layout
    shape: tuple[int, int]
    values: Tensor
    index: tuple[Tensor, ...]
    scales: Tensor | None = None

    def mask(self) -> Tensor:
        """Which values are stored, bool [N, K]: whole blocks, and of n_of_m and bitmap what was marked."""
        *rows, width = self.values.shape
        pairs = self.values.dtype == torch.uint8  # int4, two to a byte
        ones = torch.ones(*rows, width * (1 + pairs), dtype=torch.uint8, device=self.values.device)
        return _unpacked(self, ones).bool()

    def dense(self) -> Tensor:
        """The weight [N, K], zeros where nothing is stored, in the values' type (float32 if they have scales)."""
        return _unpacked(self, self.values if self.scales is None else dequantized(self))

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and index."""
        tensors = [self.values, *self.index, *([] if self.scales is None else [self.scales])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dequantized(stored: Stored) -> Tensor:
    """Stored values times their scales, float32; those of a blank place are anything."""
    assert stored.scales is not None
    values = stored.values
    if values.dtype == torch.uint8:  # int4, two to a byte
        pairs = torch.stack((values & 15, values >> 4), -1).flatten(-2).to(torch.int8)
        values = torch.where(pairs > 7, pairs - 16, pairs)
    values = values.float()
    if stored.layout.kind == "bitmap":
        counts = bits_of(stored.index[0]).flatten(1).sum(1)
        values[: int(counts.sum())] *= torch.repeat_interleave(stored.scales, counts)
        return values
    return values * stored.scales[..., None]


def pack(weight: Tensor, mask: Tensor, layout: Layout) -> Stored:
    """The values of `weight` [N, K] that `mask` (bool [N, K]) marks.

    Blocks hold every wanted value and zeros beside. Raises DataError naming the first group that has more than n of m
    values, ShapeError for tensors that do not agree.
    """
    if weight.dim() != 2 or mask.shape != weight.shape:
        raise ShapeError("mask", given=f"shape {list(mask.shape)}", allowed=f"{list(weight.shape)}, as the weight")
    return _PACKERS[layout.kind](weight, mask, layout)


def _pack_blocks(weight: Tensor, mask: Tensor, layout: Layout) -> Stored:
    r, c = layout.rows, layout.cols
    kept = _tiles(mask, r, c)
    block_row, block_col = kept.flatten(2).any(-1).nonzero(as_tuple=True)
    values = _tiles(weight, r, c)[block_row, block_col] * kept[block_row, block_col]
    shape = (weight.shape[0], weight.shape[1])
    return Stored(layout, shape, values.contiguous(), block_index(block_row, block_col, *kept.shape[:2]))


def block_index(block_row: Tensor, block_col: Tensor, n_rows: int, n_cols: int) -> tuple[Tensor, ...]:
    """The index of blocks at these places, which are in the order of their rows, then columns."""
    back = torch.argsort(block_col * n_rows + block_row)
    by_row = _lists(block_row, n_rows)
    by_col = _lists(block_col[back], n_cols)
    tensors = (by_row, block_col, _by_length(by_row), by_col, block_row[back], back, _by_length(by_col))
    return tuple(tensor.to(torch.int32).contiguous() for tensor in tensors)


def _lists(sorted_places: Tensor, count: int) -> Tensor:
    """Where each place's entries begin, and the end of the last."""
    counts = torch.bincount(sorted_places, minlength=count)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _by_length(indptr: Tensor) -> Tensor:
    return torch.argsort(indptr.diff(), descending=True, stable=True)


def _pack_n_of_m(weight: Tensor, mask: Tensor, layout: Layout) -> Stored:
    n, m = layout.rows, layout.cols
    rows, width = weight.shape
    extra = -width % layout.padded
    groups = (width + extra) // m  # not -1: there may be no rows
    kept = torch.nn.functional.pad(mask, (0, extra)).view(rows, groups, m)
    grouped = torch.nn.functional.pad(weight, (0, extra)).view(rows, groups, m)
    too_many = (kept.sum(-1) > n).nonzero()
    if len(too_many):
        row, group = too_many[0].tolist()
        raise DataError(
            f"weight[{row}, {group * m}:{group * m + m}]", given=f"{int(kept[row, group].sum())} values",
            allowed=f"at most {n} of {m} (n_of_m)", remedy="prune the weight, or leave mask= out to keep the largest",
        )  # fmt: skip
    values = _first(grouped, kept, n)
    bits = kept.view(rows, groups * m // 8, 8).to(torch.uint8) << torch.arange(8, device=mask.device, dtype=torch.uint8)
    return Stored(layout, (rows, width), values.flatten(1).contiguous(), (bits.sum(-1, dtype=torch.uint8),))


def _first(grouped: Tensor, kept: Tensor, n: int) -> Tensor:
    """The `n` entries of each group that are kept, in their order, then zeros."""
    first = torch.argsort(~kept, dim=-1, stable=True)[..., :n]
    return grouped.gather(-1, first) * kept.gather(-1, first)


def _pack_bitmap(weight: Tensor, mask: Tensor, layout: Layout) -> Stored:
    rows, width = weight.shape
    words = -(-width // WORD)
    kept = torch.nn.functional.pad(mask, (0, -width % WORD)).view(rows, words, WORD)
    counts = kept.sum(-1).flatten().cumsum(0)
    if len(counts) and int(counts[-1]) > _MOST - WORD:
        raise ShapeError("weight", given=f"{int(counts[-1])} values", allowed=f"at most {_MOST - WORD} in a bitmap")
    offsets = torch.cat((counts.new_zeros(1), counts))[:-1].view(rows, words).to(torch.int32)
    bits = (kept.long() << torch.arange(WORD, device=mask.device)).sum(-1)
    values = torch.cat((weight[mask], weight.new_zeros(WORD)))
    return Stored(layout, (rows, width), values, (bits, offsets.contiguous()))


_PACKERS = {"blocks": _pack_blocks, "n_of_m": _pack_n_of_m, "bitmap": _pack_bitmap}


def _tiles(matrix: Tensor, r: int, c: int) -> Tensor:
    """[N, K] as [R, C, r, c], padded with zeros."""
    rows, cols = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -cols % c, 0, -rows % r))
    return padded.view(-(-rows // r), r, -(-cols // c), c).transpose(1, 2)


def bits_of(words: Tensor) -> Tensor:
    """Each word's bits, bool [..., bits of a word]."""
    width = 8 * words.element_size()
    return (words[..., None] >> torch.arange(width, device=words.device, dtype=words.dtype) & 1).bool()


def _unpacked(stored: Stored, values: Tensor) -> Tensor:
    """A matrix with these values at the stored places."""
    n, k = stored.shape
    layout = stored.layout
    if layout.kind == "blocks":
        r, c = layout.rows, layout.cols
        matrix = values.new_zeros(-(-n // r), -(-k // c), r, c)
        matrix[block_rows(stored), stored.index[1].long()] = values.view(-1, r, c)
        return matrix.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].contiguous()
    if layout.kind == "bitmap":
        kept = bits_of(stored.index[0]).flatten(1)[:, :k]
        matrix = values.new_zeros(n, k)
        matrix[kept] = values[: values.numel() - WORD]
        return matrix
    groups = -(-k // layout.padded) * layout.padded // layout.cols
    kept = bits_of(stored.index[0]).view(n, groups, layout.cols)
    place = (kept.cumsum(-1) - 1).clamp(min=0)
    return (values.view(n, groups, layout.rows).gather(-1, place) * kept).flatten(1)[:, :k].contiguous()


def taken(stored: Stored, matrix: Tensor) -> Tensor:
    """The entries of a matrix [N, K] at the stored places, as values lie; 0 at places that hold none."""
    n, k = stored.shape
    layout = stored.layout
    if layout.kind == "blocks":
        return _tiles(matrix, layout.rows, layout.cols)[block_rows(stored), stored.index[1].long()].contiguous()
    if layout.kind == "bitmap":
        kept = bits_of(stored.index[0]).flatten(1)[:, :k]
        return torch.cat((matrix[kept], matrix.new_zeros(WORD)))
    kept = bits_of(stored.index[0]).view(n, -1, layout.cols)
    grouped = torch.nn.functional.pad(matrix, (0, kept.shape[1] * layout.cols - k)).view_as(kept)
    return _first(grouped, kept, layout.rows).flatten(1)


def block_rows(stored: Stored) -> Tensor:
    """The block row of each stored block, int64 [count]."""
    lengths = stored.index[0].diff().long()
    rows = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(rows, lengths, output_size=len(stored.values))


QUANTIZED = {"int4": 7.0, "int8": 127.0, "float8_e4m3fn": 448.0}


def quantized(stored: Stored, dtype: str) -> Stored:
    """The same weight with values of fewer bits: "int4" (pairs in a byte), "int8" or "float8_e4m3fn".

    Each row of a block, or each row of the weight, has a scale by which its largest magnitude becomes the type's.
    Raises UnsupportedError for another type, ShapeError for int4 values of which a row has an odd number.
    """
    if dtype not in QUANTIZED or stored.scales is not None:
        given = dtype if stored.scales is None else f"values of {stored.values.dtype}"
        raise UnsupportedError("values", given=given, allowed=f"{', '.join(QUANTIZED)} from floating-point values")
    if stored.layout.kind == "bitmap" and dtype == "int4":
        raise UnsupportedError("values", given="int4 in a bitmap", allowed="int8 or float8_e4m3fn")
    if dtype == "int4" and stored.values.shape[-1] % 2:
        raise ShapeError("values", given=f"{stored.values.shape[-1]} of a row", allowed="an even number for int4")
    rows, values = _rows_of(stored), stored.values.to(torch.float32, copy=True)
    if rows is None:
        peaks = values.abs().amax(-1)
    else:
        values = values[: len(rows)]
        peaks = values.new_zeros(stored.shape[0]).scatter_reduce(0, rows, values.abs(), "amax")
    scales = torch.where(peaks > 0, peaks / QUANTIZED[dtype], torch.ones_like(peaks))
    if rows is None:
        values /= scales[..., None]
    else:
        values = torch.nn.functional.pad(values / scales[rows], (0, WORD))
    return Stored(stored.layout, stored.shape, _rounded(values, dtype), stored.index, scales)


def _rows_of(stored: Stored) -> Tensor | None:
    """The row of each value of a bitmap; None where the values' last axis lies in one row."""
    if stored.layout.kind != "bitmap":
        return None
    counts = bits_of(stored.index[0]).flatten(1).sum(1)
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _rounded(values: Tensor, dtype: str) -> Tensor:
    if dtype == "float8_e4m3fn":
        return values.to(torch.float8_e4m3fn)
    whole = values.round().to(torch.int8)
    if dtype == "int8":
        return whole
    pairs = (whole & 15).to(torch.uint8).unflatten(-1, (-1, 2))
    return torch.bitwise_or(pairs[..., 0], pairs[..., 1] << 4)


def values_dtype(stored: Stored) -> str:
    """The type of the stored values, as kernels name it."""
    return "int4" if stored.values.dtype == torch.uint8 else str(stored.values.dtype).removeprefix("torch.")


def check_layout(layout: Layout) -> None:
    """Raises PatternError for numbers that no storage has."""
    if layout.kind == "n_of_m" and not 1 <= layout.rows <= layout.cols:
        raise PatternError("n_of_m", given=f"{layout.rows} of {layout.cols}", allowed="1 <= n <= m")
    if min(layout.rows, layout.cols) < 1:
        raise PatternError("block", given=f"{layout.rows} x {layout.cols}", allowed="at least 1 x 1")


def layouts(texts: Sequence[str]) -> tuple[Layout, ...]:
    """Several layouts by their texts."""
    return tuple(map(Layout.read, texts))
