"""Keys that belong together lie far apart: sort them, take whole blocks of the sorted order, stay causal in the text.

Tokens speak of a few topics, mixed through the text, and attend to their own topic. In the order of the text no block
is worth more than another; in the order of the topics a few blocks hold nearly all of the attention. `permuted` moves
the blocks into that order, and `causal()`, outside of it, still means the order of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

import spgen as sp
from spgen.reference import attention as oracle

ROWS, COLS = 64, 64


def main(length: int = 1024, topics: int = 8, heads: int = 2, per_row: int = 4) -> None:
    """Compares blocks of the sorted order with blocks of the text's; raises AssertionError if sorting does not help."""
    torch.manual_seed(0)
    topic = torch.randint(topics, (length,))
    direction = torch.nn.functional.normalize(torch.randn(topics, 64), dim=-1)
    q, k = (12 * direction[topic] + torch.randn(1, heads, length, 64) for _ in range(2))
    v = torch.randn(1, heads, length, 64)
    weights = (q @ k.mT / 8).masked_fill(sp.causal().mask(length).logical_not(), -torch.inf).softmax(-1)

    order = topic.argsort(stable=True).int()  # originals by rank: all of topic 0, then all of topic 1, …
    by_text = sp.causal() & sp.block(ROWS, COLS, indices=heaviest(weights, per_row))
    sorted_weights = weights[..., order, :][..., order]
    blocks = sp.block(ROWS, COLS, indices=heaviest(sorted_weights, per_row))
    by_topic = sp.causal() & sp.permuted(blocks, q=order, k=order)

    kept = {}
    for name, pattern in (("blocks of the text", by_text), ("blocks of the topics", by_topic)):
        out = sp.attention(pattern)(q, k, v)
        error = float((out - oracle(q, k, v, pattern)).abs().max())
        mask = pattern.mask(length, q_heads=heads)
        kept[name] = float((weights * mask).sum(-1).mean())
        share = float(mask.float().mean())
        print(f"{name}: {share:.1%} of the pairs, {kept[name]:.0%} of the attention, error {error:.0e}")
        assert error < 5e-5  # scores are large here
    print(f"the blocks, in the order of the topics\n{sp.show(blocks, length, q_heads=heads)}")
    assert kept["blocks of the topics"] > 0.95
    assert kept["blocks of the text"] < 0.8


def heaviest(weights: Tensor, count: int) -> Tensor:
    """The `count` blocks of each block of rows that hold most of the attention, int32 [1, heads, R, count]."""
    sums = weights.unflatten(-1, (-1, COLS)).sum(-1).unflatten(-2, (-1, ROWS)).sum(-2)
    return sums.topk(count).indices.int()


if __name__ == "__main__":
    main()
