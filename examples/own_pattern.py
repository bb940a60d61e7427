"""A pattern of one's own: any predicate of integers becomes a kernel.

The function is called once, on symbols; what it closes over becomes a constant. Tokens of an image, row by row, see
their neighbours in two dimensions; then, everything behind them on the same row or column.
"""

from __future__ import annotations

import torch

import spgen as sp
from spgen.reference import attention as oracle


def main(width: int = 24, height: int = 20, radius: int = 3) -> None:
    near = sp.where(
        lambda i, j: (abs(i // width - j // width) <= radius) & (abs(i % width - j % width) <= radius)
    )  # fmt: skip
    cross = sp.where(lambda i, j: (i // width == j // width) | (i % width == j % width))

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, width * height, 32) for _ in range(3))
    for name, pattern in (("neighbours", near), ("cross", sp.causal() & cross), ("both", near | cross)):
        out = sp.attention(pattern)(q, k, v)
        error = float((out - oracle(q, k, v, pattern)).abs().max())
        mask = pattern.mask(width * height)[0, 0]
        print(f"{name}: {float(mask.float().mean()):.1%} of the pairs, error {error:.1e}")
        print(drawn(mask[width * (height // 2) + width // 3], width))
        assert error < 1e-5


def drawn(row: torch.Tensor, width: int) -> str:
    """What one token sees, as a picture."""
    return "\n".join("  " + "".join(".#"[int(seen)] for seen in line) for line in row.reshape(-1, width))


if __name__ == "__main__":
    main()
