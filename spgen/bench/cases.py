"""Patterns over a workload: as spgen says them, and as the peers that can say them.

Each maker takes a workload of any sizes and draws its index data at random, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.bench.blocks import BlockList
from spgen.bench.peers import Contender
from spgen.bench.workloads import Workload
from spgen.patterns import Pattern

# pairs of some rows, bool [H, rows, length], from the rows [rows, 1] and the columns [1, length]
Rows: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_FLEX_BLOCK = 128
_STRIP = 256  # rows of a mask that are looked up at a time


@dataclass(frozen=True)
class Problem:
    """A pattern over `work`'s tensors.

    `pairs` are needed, over all query heads and sequences; `touched` counts the keys of all key heads and sequences
    that any row needs. `rows` is the mask of some rows: that of `pattern.mask`, which it must equal, would not fit into
    memory at these lengths. `flex` makes a BlockMask, None where no list of its blocks can say the pattern. `blocks`,
    or `columns` and `offsets` (int32 [heads, n]), are the index data for peers that take them.
    """

    work: Workload
    pattern: Pattern
    pairs: int
    touched: int
    rows: Rows
    flex: Callable[[], Any] | None = None
    blocks: BlockList | None = None
    columns: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def density(self) -> float:
        """The share of the causal pairs."""
        return self.pairs / self.work.causal_pairs

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Contender:
        """The kernel that spgen compiles."""
        attend = sp.attention(self.pattern)
        return Contender(
            lambda plan: attend(q, k, v, plan=plan), partial(attend.plan, q, k), lambda: attend(q, k, v)
        )  # fmt: skip

    @property
    def flops(self) -> int:
        """FLOP of the needed pairs: a multiply-add for each element of q k^T and of the weights times v."""
        return 4 * self.pairs * self.work.head_dim

    @property
    def bytes(self) -> int:
        """What must be moved at least: q and the output, the touched keys and values, the pattern's index data."""
        work = self.work
        rows = 2 * work.batch * work.heads * work.length + 2 * self.touched
        return rows * work.head_dim * work.dtype.itemsize + sum(tensor.nbytes for tensor in self.pattern.data)

    def mask(self, rows: Tensor) -> Tensor:
        """The pairs of some rows, bool [1, heads, rows, length]."""
        columns = torch.arange(self.work.length, device=rows.device)
        return self.rows(rows[:, None], columns[None]).expand(self.work.heads, -1, -1)[None]

    def whole_mask(self) -> Tensor:
        """The pairs of all rows."""
        rows = torch.arange(self.work.length, device=self.work.device)
        return torch.cat([self.mask(some) for some in rows.split(_STRIP)], dim=2)

    def largest_error(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, samples: int = 8) -> float:
        """The largest difference to the oracle, in float64, on rows spread over the whole length."""
        rows = torch.linspace(0, self.work.length - 1, samples, device=out.device).long()
        wanted = reference.attention(q[:, :, rows], k, v, self.mask(rows))
        return float((out[:, :, rows].double() - wanted).abs().max())


def _everything(work: Workload, function: Callable[..., Tensor]) -> Any:
    """A BlockMask of all causal blocks, each masked by `function`: what is left where no block is empty or full."""
    from torch.nn.attention.flex_attention import BlockMask

    count = -(-work.length // _FLEX_BLOCK)
    order = torch.arange(count, dtype=torch.int32, device=work.device)
    number = (order + 1)[None, None].contiguous()
    return BlockMask.from_kv_blocks(
        number, order.expand(1, 1, count, count).contiguous(), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=function
    )


def _distinct(work: Workload, count: int, limit: int, *lead: int) -> Tensor:
    """`count` different numbers below `limit`, ascending, int32 [*lead, count]."""
    generator = torch.Generator(work.device).manual_seed(2)
    chunks = []
    for _ in range(lead[0]):  # a row of keys at a time: they are as many as the mask has pairs
        keys = torch.rand((*lead[1:], limit), device=work.device, generator=generator)
        chunks.append(keys.topk(count, dim=-1).indices.sort(-1).values.int())
    return torch.stack(chunks)


def _member(index: Tensor, length: int) -> Tensor:
    """Which numbers below `length` each row of `index` holds, bool [..., length]."""
    found = torch.zeros((*index.shape[:-1], length), dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index.long(), True)


def _of_groups(work: Workload, by_head: Tensor) -> int:
    """Keys of all key heads and sequences, of bool [heads, length] by query head."""
    return work.batch * int(by_head.unflatten(0, (work.kv_heads, work.group)).any(1).sum())


def block_list(work: Workload, size: int = 128, sparsity: float = 0.9) -> Problem:
    """Causal blocks of `size` x `size`, listed for each query head; FlexAttention's own kernel has blocks from 64."""
    blocks = BlockList.random(work, size, sparsity)
    # its CPU kernel takes any block
    flex = blocks.flex_mask if size >= 64 or work.device == "cpu" else None
    touched = work.batch * work.kv_heads * work.length
    return Problem(work, blocks.pattern(), blocks.pairs, touched, blocks.rows, flex, blocks)


def columns(work: Workload, count: int = 2048) -> Problem:
    """Some columns of each query head, shared by all rows."""
    chosen = _distinct(work, count, work.length, work.heads)
    member = _member(chosen, work.length)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & member[h, j]

    return Problem(
        work, sp.causal() & sp.columns(chosen[None]), work.batch * int((work.length - chosen.long()).sum()),
        _of_groups(work, member), lambda i, j: (j <= i) & member[:, None], lambda: _everything(work, keep),
    )  # fmt: skip


def _bands(work: Workload, bands: int, width: int) -> Tensor:
    """Bands of `width` neighbouring offsets of each query head, int32 [heads, bands * width]."""
    starts = _distinct(work, bands, work.length // width, work.heads) * width
    return (starts[..., None] + torch.arange(width, device=work.device, dtype=torch.int32)).flatten(1)


def diagonals(work: Workload, bands: int = 16, width: int = 64) -> Problem:
    """Bands of neighbouring diagonals of each query head."""
    offsets = _bands(work, bands, width)
    slash = _member(offsets, work.length)
    keys = torch.arange(work.length, device=work.device)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & slash[h, (i - j).abs()]

    return Problem(
        work, sp.causal() & sp.diagonals(offsets[None]), work.batch * int((work.length - offsets.long()).sum()),
        _of_groups(work, keys < work.length - offsets.amin(1, keepdim=True)),
        lambda i, j: (j <= i) & slash[:, (i - j).abs()], lambda: _everything(work, keep),
    )  # fmt: skip


def vertical_slash(work: Workload, vertical: int = 1000, bands: int = 95, width: int = 64) -> Problem:
    """MInference's pattern (Jiang et al. 2024): columns and bands of diagonals of each query head."""
    chosen, offsets = _distinct(work, vertical, work.length, work.heads), _bands(work, bands, width)
    column, slash = _member(chosen, work.length), _member(offsets, work.length)
    keys = torch.arange(work.length, device=work.device)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (column[h, j] | slash[h, (i - j).abs()])

    before = torch.nn.functional.pad((~slash).long().cumsum(1), (1, 0))  # offsets below that are no slash
    pairs = int((work.length - offsets.long()).sum()) + int(before.gather(1, work.length - chosen.long()).sum())
    return Problem(
        work, sp.causal() & sp.vertical_slash(chosen[None], offsets[None]), work.batch * pairs,
        _of_groups(work, column | (keys < work.length - offsets.amin(1, keepdim=True))),
        lambda i, j: (j <= i) & (column[:, None] | slash[:, (i - j).abs()]),
        (lambda: _everything(work, keep)) if work.length <= 2**15 else None,  # beyond it takes seconds a call
        columns=chosen, offsets=offsets,
    )  # fmt: skip


def streaming(work: Workload, window: int = 1024, sink: int = 64) -> Problem:
    """A window and a sink, which FlexAttention's own analysis of blocks turns into full and partial ones."""

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < window) | (j < sink))

    def flex() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        make = create_block_mask if work.device == "cpu" else torch.compile(create_block_mask)
        return make(keep, None, None, work.length, work.length, device=work.device)

    rows = torch.arange(work.length)
    pairs = (rows + 1).clamp(max=window) + (rows + 1 - window).clamp(0, sink)
    return Problem(
        work, sp.causal() & (sp.sink(sink) | sp.window(window)), work.batch * work.heads * int(pairs.sum()),
        work.batch * work.kv_heads * work.length, lambda i, j: keep(i, i, i, j)[None], flex,
    )  # fmt: skip


def tokens(work: Workload, count: int = 2048, rows: int = 64) -> Problem:
    """A list of single keys for every `rows` rows of each key head."""
    groups = -(-work.length // rows)
    chosen = _distinct(work, count, work.length, work.kv_heads, groups)
    ends = ((torch.arange(groups, device=work.device) + 1) * rows).clamp(max=work.length)[:, None]
    heights = ends - torch.arange(groups, device=work.device)[:, None] * rows
    pairs = int(torch.minimum((ends - chosen).clamp(min=0), heights).sum()) * work.group
    seen = torch.where(chosen < ends, chosen, work.length).flatten(1)
    touched = _member(seen, work.length + 1)[:, : work.length].sum()

    def keep(i: Tensor, j: Tensor) -> Tensor:
        own = _member(chosen[:, i[:, 0] // rows], work.length)
        return (j <= i) & own.repeat_interleave(work.group, 0)

    return Problem(
        work, sp.causal() & sp.top_k(chosen[None], rows=rows), work.batch * pairs, work.batch * int(touched), keep
    )  # fmt: skip


def permuted_keys(work: Workload, size: int = 128, sparsity: float = 0.9, sort: int = 0) -> Problem:
    """Blocks over keys in another order, within spans of `sort` keys (0: in any order); causal as they were.

    `size` and `sort` divide the length.
    """
    keep = BlockList.random(work, size, sparsity).keep
    generator = torch.Generator(work.device).manual_seed(2)
    span = sort or work.length
    order = torch.rand((work.length // span, span), device=work.device, generator=generator).argsort(1)
    order = (order + torch.arange(0, work.length, span, device=work.device)[:, None]).flatten()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(work.length, device=work.device))
    ends = (torch.arange(work.length // size, device=work.device) + 1)[:, None] * size
    visible = (ends - order).clamp(0, size).unflatten(1, (-1, size)).sum(-1)  # [row block, block of ranks]
    last_row = (keep * ends).amax(1).repeat_interleave(size, 1)  # [heads, rank]: the end of the last rows that list it
    return Problem(
        work, sp.causal() & sp.permuted(sp.block(size, mask=keep[None]), k=order.int()),
        work.batch * int((keep * visible).sum()), _of_groups(work, last_row > order),
        lambda i, j: (j <= i) & keep[:, i // size, rank[None] // size],
    )  # fmt: skip
