"""Patterns beyond block lists: as spgen says them, as masks of some rows, as FlexAttention says them if it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.bench.blocks import BlockList, Workload
from spgen.patterns import Pattern

# pairs of some rows, bool [H, rows, length], from the rows [rows, 1] and the columns [1, length]
Rows: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One pattern over `work`'s tensors: `pairs` are needed; `flex` makes a BlockMask, None where no block list can."""

    name: str
    work: Workload
    pattern: Pattern
    pairs: int
    rows: Rows
    flex: Callable[[], Any] | None = None

    @property
    def flops(self) -> float:
        """FLOP of the needed pairs."""
        return 4.0 * self.pairs * self.work.head_dim

    def largest_error(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, samples: int = 8) -> float:
        """The largest difference to the oracle, in float64, on rows spread over the whole length."""
        rows = torch.linspace(0, self.work.length - 1, samples, device=out.device).long()
        columns = torch.arange(self.work.length, device=out.device)
        mask = self.rows(rows[:, None], columns[None]).expand(self.work.heads, -1, -1)[None]
        return float((out[:, :, rows].double() - reference.attention(q[:, :, rows], k, v, mask)).abs().max())


def _generator(work: Workload) -> torch.Generator:
    return torch.Generator(work.device).manual_seed(2)


def _distinct(work: Workload, count: int, limit: int, *lead: int) -> Tensor:
    """`count` different numbers below `limit`, ascending, int32 [*lead, count]."""
    chunks = []
    generator = _generator(work)
    for _ in range(lead[0]):  # a row of keys at a time: they are as many as the mask has pairs
        keys = torch.rand((*lead[1:], limit), device=work.device, generator=generator)
        chunks.append(keys.topk(count, dim=-1).indices.sort(-1).values.int())
    return torch.stack(chunks)


def _member(index: Tensor, length: int) -> Tensor:
    """Which numbers below `length` each row of `index` holds, bool [..., length]."""
    found = torch.zeros((*index.shape[:-1], length), dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index.long(), True)


def _everything(work: Workload, function: Callable[..., Tensor]) -> Any:
    """A BlockMask of all causal blocks, each masked by `function`: what is left where no block is empty or full."""
    from torch.nn.attention.flex_attention import BlockMask

    count = work.length // 128
    order = torch.arange(count, dtype=torch.int32, device=work.device)
    number = (order + 1)[None, None].contiguous()
    return BlockMask.from_kv_blocks(
        number, order.expand(1, 1, count, count).contiguous(), BLOCK_SIZE=128, mask_mod=function
    )


def columns(work: Workload, count: int = 2048) -> Case:
    """Some columns of each query head, shared by all rows."""
    chosen = _distinct(work, count, work.length, work.heads)
    member = _member(chosen, work.length)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & member[h, j]

    return Case(
        f"{count} columns a head", work, sp.causal() & sp.columns(chosen[None]),
        int((work.length - chosen.long()).sum()),
        lambda i, j: (j <= i) & member[:, None],
        lambda: _everything(work, keep),
    )  # fmt: skip


def vertical_slash(work: Workload, vertical: int = 1000, bands: int = 95, width: int = 64) -> Case:
    """MInference's pattern: columns and bands of diagonals of each query head."""
    chosen = _distinct(work, vertical, work.length, work.heads)
    starts = _distinct(work, bands, work.length // width, work.heads) * width
    offsets = (starts[..., None] + torch.arange(width, device=work.device, dtype=torch.int32)).flatten(1)
    column, slash = _member(chosen, work.length), _member(offsets, work.length)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (column[h, j] | slash[h, (i - j).abs()])

    before = torch.nn.functional.pad((~slash).long().cumsum(1), (1, 0))  # offsets below that are no slash
    pairs = int((work.length - offsets.long()).sum()) + int(before.gather(1, work.length - chosen.long()).sum())
    return Case(
        f"vertical-slash, {vertical} columns and {bands} bands of {width}", work,
        sp.causal() & sp.vertical_slash(chosen[None], offsets[None]), pairs,
        lambda i, j: (j <= i) & (column[:, None] | slash[:, (i - j).abs()]),
        (lambda: _everything(work, keep)) if work.length <= 2**15 else None,
    )  # fmt: skip


def streaming(work: Workload, window: int = 1024, sink: int = 64) -> Case:
    """A window and a sink, which FlexAttention's own analysis of blocks turns into full and partial ones."""

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < window) | (j < sink))

    def flex() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(keep, None, None, work.length, work.length, device=work.device, _compile=True)

    rows = torch.arange(work.length)
    pairs = (rows + 1).clamp(max=window) + (rows + 1 - window).clamp(0, sink)
    return Case(
        f"window {window} and sink {sink}", work, sp.causal() & (sp.sink(sink) | sp.window(window)),
        work.heads * int(pairs.sum()), lambda i, j: keep(i, i, i, j)[None], flex,
    )  # fmt: skip


def small_blocks(work: Workload, sparsity: float = 0.9) -> Case:
    """Causal blocks of work.block keys by as many rows, listed per query head."""
    listed = BlockList.random(work, sparsity)

    def rows(i: Tensor, j: Tensor) -> Tensor:
        return listed.mask(i[:, 0])[0]

    return Case(
        f"blocks of {work.block}, {sparsity:.0%} left out", work, listed.pattern(),
        int(listed.flops(0.5) / 4 / work.head_dim), rows,
        listed.flex_mask if work.block == 64 else None,
    )  # fmt: skip


def tokens(work: Workload, count: int = 2048, rows: int = 64) -> Case:
    """A list of single keys for every `rows` rows of each key head."""
    groups = work.length // rows
    chosen = _distinct(work, count, work.length, work.kv_heads, groups)
    last = (torch.arange(groups, device=work.device) + 1)[:, None] * rows
    pairs = int((last - chosen).clamp(0, rows).sum()) * (work.heads // work.kv_heads)

    def keep(i: Tensor, j: Tensor) -> Tensor:
        own = _member(chosen[:, i[:, 0] // rows], work.length).repeat_interleave(work.heads // work.kv_heads, 0)
        return (j <= i) & own

    name = f"{count} keys for every {rows} rows" if rows > 1 else f"{count} keys for each row"
    return Case(name, work, sp.causal() & sp.top_k(chosen[None], rows=rows), pairs, keep)


def permuted_keys(work: Workload, sparsity: float = 0.9, sort: int = 0) -> Case:
    """Blocks over keys in another order, within spans of `sort` keys (0: in any order); causal as they were."""
    listed = BlockList.random(work, sparsity)
    generator = _generator(work)
    span = sort or work.length
    order = torch.rand((work.length // span, span), device=work.device, generator=generator).argsort(1)
    order = (order + torch.arange(0, work.length, span, device=work.device)[:, None]).flatten()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(work.length, device=work.device))
    ends = (torch.arange(work.length // work.block, device=work.device) + 1)[:, None] * work.block
    visible = (ends - order).clamp(0, work.block).unflatten(1, (-1, work.block)).sum(-1)  # [row block, block of ranks]
    blocks = sp.block(work.block, mask=listed.keep[None])

    def rows(i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & listed.keep[:, i // work.block, rank[None] // work.block]

    return Case(
        f"blocks of {work.block} over keys permuted {f'within {sort}' if sort else 'freely'}", work,
        sp.causal() & sp.permuted(blocks, k=order.int()), int((listed.keep * visible).sum()), rows,
    )  # fmt: skip
