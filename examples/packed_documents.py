"""Packed documents: many texts in one row, none sees another, and no padding is computed.

Bidirectional for encoders; with `causal()` for decoders. The boundaries are data: the next batch brings others, and
the compiled kernel stays.
"""

from __future__ import annotations

import torch

import spgen as sp


def main(heads: int = 4, head_dim: int = 32) -> None:
    torch.manual_seed(0)
    for lengths in ([700, 3, 48, 1, 290], [5, 5, 900]):
        q, k, v = (torch.randn(1, heads, sum(lengths), head_dim) for _ in range(3))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        pattern = sp.documents(cu_seqlens)
        encoded = sp.attention(pattern)(q, k, v)
        decoded = sp.attention(sp.causal() & pattern)(q, k, v)

        padded = len(lengths) * max(lengths) ** 2
        print(f"{len(lengths)} documents, {sum(lengths)} tokens: {sum(n * n for n in lengths)} pairs, padded {padded}")
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            alone = [x[:, :, start:stop] for x in (q, k, v)]
            check(encoded[:, :, start:stop], *alone, is_causal=False)
            check(decoded[:, :, start:stop], *alone, is_causal=True)
    print(f"each document is what it is alone; kernels compiled: {sp.compile_count()}")


def check(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> None:
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert torch.allclose(out, wanted, atol=1e-5)


if __name__ == "__main__":
    main()
