"""A long prompt in chunks: each call brings some rows, at their position, and all the keys so far.

python examples/chunked_prefill.py
"""

from __future__ import annotations

import torch

import spgen as sp


def main(length: int = 1500, chunk: int = 400) -> None:
    """Attends to a prompt whole and in chunks; raises AssertionError if the two differ."""
    attend = sp.attention(sp.causal() & (sp.sink(16) | sp.window(300)))
    q, k, v = (torch.randn(1, heads, length, 64) for heads in (4, 4, 4))
    whole = attend(q, k, v)

    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        # the last row stands at the last key, so the position needs no mention
        parts.append(attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-4)

    # a cache with room for more keys: say where the rows stand and how many keys there are
    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        filled = torch.tensor([stop], dtype=torch.int32)
        parts.append(attend(q[:, :, start:stop], k, v, q_offset=start, kv_lengths=filled))
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-4)
    print(f"{length} rows at once and in chunks of {chunk}: the same")


if __name__ == "__main__":
    main()
