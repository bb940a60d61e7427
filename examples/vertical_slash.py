"""Vertical-slash attention (MInference): a few keys that everyone sees, and a few distances that always matter.

The indices are given here: estimated from the attention of the last queries, as the paper does, on the dense scores of
just those rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

import spgen as sp
from spgen.reference import attention as oracle


def main(length: int = 1024, vertical: int = 32, slash: int = 96) -> None:
    q, k, v = structured(length)
    columns, offsets = estimate(q, k, vertical, slash)
    pattern = sp.causal() & sp.vertical_slash(columns, offsets)
    out = sp.attention(pattern)(q, k, v)

    error = float((out - oracle(q, k, v, pattern)).abs().max())
    dense = oracle(q, k, v, sp.causal())
    missed = float((out - dense).norm() / dense.norm())
    density = float(pattern.mask(length, q_heads=q.shape[1]).float().mean())
    print(f"{pattern}\n{density:.1%} of the pairs; error {error:.1e}; {missed:.1%} away from dense attention")
    assert error < 5e-5  # scores are large here
    assert missed < 0.3


def structured(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose attention has the shape: some keys are heavy, and near keys resemble the query."""
    torch.manual_seed(0)
    drift = torch.randn(1, 4, length, 64).cumsum(2)
    near = torch.nn.functional.normalize(drift - torch.nn.functional.pad(drift, (0, 0, 16, 0))[:, :, :length], dim=-1)
    heavy = torch.zeros(length).index_fill_(0, torch.randperm(length)[: length // 64], 4.0)
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q, k = 8 * near + 8 * direction, 8 * near + 2 * heavy[:, None] * direction
    return q, k, torch.randn(1, 4, length, 64)


def estimate(q: Tensor, k: Tensor, vertical: int, slash: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    """The heaviest columns and diagonals of the last `rows` queries, int32 [1, heads, count] each."""
    length = k.shape[2]
    scores = q[:, :, -rows:] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    i, j = torch.arange(length - rows, length)[:, None], torch.arange(length)
    weights = scores.masked_fill(j > i, -torch.inf).softmax(-1)
    by_offset = torch.zeros(*weights.shape[:2], length)
    by_offset.scatter_add_(2, (i - j).clamp(min=0).expand_as(weights).flatten(2), weights.flatten(2))
    return weights.sum(2).topk(vertical).indices.int(), by_offset.topk(slash).indices.int()


if __name__ == "__main__":
    main()
