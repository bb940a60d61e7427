"""Causal block lists, as spgen, FlexAttention and dense masks say them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.patterns import Pattern


@dataclass(frozen=True)
class Workload:
    """Attention over random causal blocks: sizes, type and device."""

    heads: int
    kv_heads: int
    length: int
    head_dim: int
    block: int
    dtype: torch.dtype
    device: str
    batch: int = 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v."""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(heads: int) -> Tensor:
            shape = (self.batch, heads, self.length, self.head_dim)
            return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

        return random(self.heads), random(self.kv_heads), random(self.kv_heads)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j  # one function for all masks, so that FlexAttention compiles once


@dataclass(frozen=True)
class BlockList:
    """Which blocks are kept, bool [heads, n, n]: the diagonal, and of those below it a random share."""

    work: Workload
    keep: Tensor

    @staticmethod
    def random(work: Workload, sparsity: float) -> BlockList:
        """Each block below the diagonal is left out with probability `sparsity`."""
        count = -(-work.length // work.block)
        generator = torch.Generator(work.device).manual_seed(1)
        draw = torch.rand((work.heads, count, count), device=work.device, generator=generator)
        diagonal = torch.eye(count, dtype=torch.bool, device=work.device)
        return BlockList(work, (draw >= sparsity).tril(-1) | diagonal)

    def pattern(self) -> Pattern:
        """The list of kept blocks of each row block, as indices padded with -1."""
        count = int(self.keep.sum(-1).max())
        order = torch.argsort(~self.keep, dim=-1, stable=True)[..., :count]
        indices = torch.where(self.keep.gather(-1, order), order, -1).to(torch.int32)
        return sp.causal() & sp.block(self.work.block, indices=indices[None])

    def flops(self, diagonal: float) -> float:
        """FLOP of the kept pairs; `diagonal` is the share of a diagonal block that counts (0.5: what is needed)."""
        on_diagonal = self.keep.shape[0] * self.keep.shape[1]
        blocks = int(self.keep.sum()) - on_diagonal + diagonal * on_diagonal
        return 4 * self.work.batch * blocks * self.work.block**2 * self.work.head_dim

    def flex_mask(self) -> Any:
        """The same pairs as a FlexAttention BlockMask, whole blocks and diagonal blocks apart."""
        from torch.nn.attention.flex_attention import BlockMask

        heads, count, _ = self.keep.shape
        below = self.keep.tril(-1)
        full = torch.argsort(~below, dim=-1, stable=True).to(torch.int32)[None]
        ones = torch.ones((1, heads, count), dtype=torch.int32, device=self.keep.device)
        own = torch.arange(count, dtype=torch.int32, device=self.keep.device)[:, None]
        partial = torch.cat([own, own.new_zeros(count, count - 1)], dim=1).expand(1, heads, count, count)
        return BlockMask.from_kv_blocks(
            ones, partial.contiguous(), below.sum(-1, dtype=torch.int32)[None], full, BLOCK_SIZE=self.work.block,
            mask_mod=_causal,
        )  # fmt: skip

    def mask(self, rows: Tensor) -> Tensor:
        """The dense mask of some rows, bool [1, heads, rows, length]."""
        work = self.work
        columns = torch.arange(work.length, device=self.keep.device)
        kept = self.keep[:, rows // work.block].repeat_interleave(work.block, dim=-1)[..., : work.length]
        return (kept & (columns <= rows[:, None]))[None]

    def largest_error(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, samples: int = 32) -> float:
        """The largest difference to the oracle, in float64, on rows spread over the whole length."""
        rows = torch.linspace(0, self.work.length - 1, samples, device=out.device).long()
        wanted = reference.attention(q[:, :, rows], k, v, self.mask(rows))
        return float((out[:, :, rows].double() - wanted).abs().max())
