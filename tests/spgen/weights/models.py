"""Small models for the tests of layers and training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A gated MLP as models have it, and a projection beside it."""

    def __init__(self, d: int = 48, f: int = 96) -> None:
        super().__init__()
        self.proj = nn.Linear(d, d)
        self.mlp = nn.ModuleDict({
            "gate": nn.Linear(d, f, bias=False), "up": nn.Linear(d, f, bias=False), "down": nn.Linear(f, d),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(x)
        mlp = self.mlp
        hidden: Tensor = nn.functional.silu(mlp["gate"](x)) * mlp["up"](x)
        return x + mlp["down"](hidden)  # type: ignore[no-any-return]


def model(layers: int = 2, d: int = 48, f: int = 96) -> nn.Sequential:
    """`layers` blocks with the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(d, f) for _ in range(layers)))


def batch(m: int = 9, d: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))
