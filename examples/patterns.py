"""Patterns are values: composed with | & - ~, printed, compared, drawn. Nothing is compiled here.

python examples/patterns.py
"""

from __future__ import annotations

import torch

import spgen as sp


def main() -> None:
    """Prints a few patterns with their pictures."""
    blocks = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    shown = {
        "the first tokens and a window": sp.causal() & (sp.sink(2) | sp.window(4)),
        "shifted stripes and a window": sp.causal() & (sp.stripe(4, offset=1) | sp.window(3)),
        "blocks from a mask": sp.causal() & sp.block(4, mask=blocks),
        "columns and diagonals": sp.causal() & sp.vertical_slash([0, 5], [0, 7]),
        "everything but": sp.causal() - sp.columns([3, 4, 5]),
        "any predicate": sp.where(lambda i, j: (i // 4 == j // 4) | (j % 8 == 0)),
        "whole tiles that a pattern touches": sp.cover(sp.causal() & sp.window(2), 4, 2),
    }
    for title, pattern in shown.items():
        print(f"{title}\n{sp.show(pattern, 16)}\n")

    # the text reads back, and equality is structure: which tensors are bound does not matter
    listed = shown["blocks from a mask"]
    assert sp.pattern(repr(listed), *listed.data) == listed
    assert sp.columns([1, 2]) == sp.columns([7, 8, 9])
    assert sp.window(4) != sp.window(5)


if __name__ == "__main__":
    main()
