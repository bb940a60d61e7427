"""Causal block lists, as spgen, FlexAttention and the block-sparse peers say them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen.bench.workloads import Workload
from spgen.patterns import Pattern


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j  # one function for all masks, so that FlexAttention compiles once


@dataclass(frozen=True)
class BlockList:
    """Which blocks of `size` x `size` are kept, bool [heads, n, n]: the diagonal, and of those below it a share."""

    work: Workload
    size: int
    keep: Tensor

    @staticmethod
    def random(work: Workload, size: int, sparsity: float) -> BlockList:
        """Each block below the diagonal is left out with probability `sparsity`."""
        count = -(-work.length // size)
        generator = torch.Generator(work.device).manual_seed(1)
        draw = torch.rand((work.heads, count, count), device=work.device, generator=generator)
        diagonal = torch.eye(count, dtype=torch.bool, device=work.device)
        return BlockList(work, size, (draw >= sparsity).tril(-1) | diagonal)

    @property
    def pairs(self) -> int:
        """How many pairs are kept, of a diagonal block those that are causal."""
        count = self.keep.shape[-1]
        heights = torch.full((count,), self.size, device=self.keep.device)
        heights[-1] = self.work.length - (count - 1) * self.size
        below = (self.keep.tril(-1).sum((0, 2)) * heights).sum() * self.size  # only a diagonal block can be narrower
        diagonal = (heights * (heights + 1) // 2).sum() * self.work.heads
        return self.work.batch * int(below + diagonal)

    def rows(self, i: Tensor, j: Tensor) -> Tensor:
        """The pairs of rows i [rows, 1] and columns j [1, length], bool [heads, rows, length]."""
        return self.keep[:, i // self.size, j // self.size] & (j <= i)

    def listed(self) -> Tensor:
        """The kept blocks of each row block, ascending and padded with -1, int32 [heads, n, longest list]."""
        count = int(self.keep.sum(-1).max())
        order = torch.argsort(~self.keep, dim=-1, stable=True)[..., :count]
        return torch.where(self.keep.gather(-1, order), order, -1).to(torch.int32)

    def pattern(self) -> Pattern:
        """The lists as a pattern."""
        return sp.causal() & sp.block(self.size, indices=self.listed()[None])

    def counted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole blocks and diagonal blocks apart, as counts int32 [1, heads, n] and lists int32 [1, heads, n, n].

        Returned are the counts and lists of the diagonal blocks, then those of the whole ones.
        """
        heads, count, _ = self.keep.shape
        below = self.keep.tril(-1)
        whole = torch.argsort(~below, dim=-1, stable=True).to(torch.int32)[None]
        ones = torch.ones((1, heads, count), dtype=torch.int32, device=self.keep.device)
        own = torch.arange(count, dtype=torch.int32, device=self.keep.device)[:, None]
        diagonal = torch.cat([own, own.new_zeros(count, count - 1)], dim=1).expand(1, heads, count, count)
        return ones, diagonal.contiguous(), below.sum(-1, dtype=torch.int32)[None], whole

    def flex_mask(self) -> Any:
        """The same pairs as a FlexAttention BlockMask."""
        from torch.nn.attention.flex_attention import BlockMask

        partial_count, partial, whole_count, whole = self.counted()
        return BlockMask.from_kv_blocks(
            partial_count, partial, whole_count, whole, BLOCK_SIZE=self.size, mask_mod=_causal
        )
