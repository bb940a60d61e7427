"""Streaming attention: every token sees the first few tokens and its recent past (StreamingLLM's sink + window).

The cost of a token no longer grows with the length of the text. The same operation serves a long prompt, the prompt
in pieces, and one token at a time.
"""

from __future__ import annotations

import torch

import spgen as sp
from spgen.reference import attention as oracle


def main(length: int = 2048, sink: int = 64, window: int = 256) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    pattern = sp.causal() & (sp.sink(sink) | sp.window(window))
    attend = sp.attention(pattern)
    print(f"{pattern}: {float(pattern.mask(length).float().mean()):.1%} of the pairs")

    whole = attend(q, k, v)
    error = float((whole - oracle(q, k, v, pattern)).abs().max())
    print(f"a prompt of {length} tokens: error {error:.1e}")
    assert error < 1e-5

    # the same in pieces: rows take their positions from the keys that are there, the last row being the newest token
    pieces = []
    for stop in range(300, length + 300, 300):
        stop = min(stop, length)
        start = sum(piece.shape[2] for piece in pieces)
        pieces.append(attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
    difference = float((torch.cat(pieces, dim=2) - whole).abs().max())
    print(f"in {len(pieces)} pieces: difference {difference:.1e}")
    assert difference < 1e-5

    last = attend(q[:, :, -1:], k, v)
    print(f"the last token alone: difference {float((last - whole[:, :, -1:]).abs().max()):.1e}")
    assert torch.allclose(last, whole[:, :, -1:], atol=1e-5)


if __name__ == "__main__":
    main()
