"""The tensors that a case is measured on: sizes, type and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """Attention of `length` rows on as many keys: q [batch, heads, length, head_dim], k and v with `kv_heads`."""

    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    device: str
    batch: int = 1

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.kv_heads

    @property
    def causal_pairs(self) -> int:
        """Pairs (row, key) of all query heads, keys not after their row."""
        return self.batch * self.heads * self.length * (self.length + 1) // 2

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v, the same each time."""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(heads: int) -> Tensor:
            shape = (self.batch, heads, self.length, self.head_dim)
            return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

        return random(self.heads), random(self.kv_heads), random(self.kv_heads)

    def record(self) -> dict[str, Any]:
        """What a result says of it; where it ran is the result's hardware."""
        return {
            "batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "length": self.length,
            "head_dim": self.head_dim, "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


def llama3_8b(length: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Workload:
    """A prompt of `length` tokens through a layer of Llama 3 8B: 32 query heads on 8 key heads of 128."""
    return Workload(heads=32, kv_heads=8, length=length, head_dim=128, dtype=dtype, device=device)


def eight_heads(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Workload:
    """Eight heads of 64: what a small encoder or decoder computes on a CPU."""
    return Workload(heads=8, kv_heads=8, length=length, head_dim=64, dtype=dtype, device=device)


def short(length: int) -> str:
    """A length as people say it: 32K, or the number."""
    return f"{length // 1024}K" if length and length % 1024 == 0 else str(length)
