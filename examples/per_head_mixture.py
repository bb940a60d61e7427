"""One pattern for each head: heads do different things, and one launch computes them all.

Some heads only look around, some stride through the past, and a few still see everything. With grouped queries, eight
query heads share two key heads here.
"""

from __future__ import annotations

import torch

import spgen as sp
from spgen.reference import attention as oracle


def main(length: int = 1024) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 8, length, 64)
    k, v = (torch.randn(1, 2, length, 64) for _ in range(2))

    local = sp.sink(4) | sp.window(128)
    strided = sp.window(64) | sp.stripe(16, width=2, shift_per_head=2)
    pattern = sp.causal() & sp.per_head([local] * 4 + [strided] * 3 + [sp.dense()])
    out, lse = sp.attention(pattern)(q, k, v, return_lse=True)

    wanted, wanted_lse = oracle(q, k, v, pattern, return_lse=True)
    error = max(float((out - wanted).abs().max()), float((lse - wanted_lse).abs().max()))
    for head, density in enumerate(pattern.mask(length, q_heads=8).float().mean((0, 2, 3)).tolist()):
        print(f"head {head}: {density:6.2%} of the pairs {'#' * round(100 * density)}")
    print(f"error {error:.1e}; kernels compiled: {sp.compile_count()}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
