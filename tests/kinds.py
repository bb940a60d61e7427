"""One pattern of every kind, with data that hold what users' data hold: -1, repeats, any order, beyond the end.

They fit calls of LENGTH rows and keys with 4 query heads and 2 key heads.
"""

from __future__ import annotations

import torch

import spgen as sp
from spgen.patterns import Pattern

LENGTH = 150


def _kinds() -> dict[str, Pattern]:
    generator = torch.Generator().manual_seed(0)

    def mask(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.4

    def index(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(-2, high, shape, generator=generator)

    streaming = sp.causal() & (sp.sink(7) | sp.window(30))
    return {
        "dense": sp.dense(),
        "streaming": streaming,
        "stripes": sp.causal() & sp.stripe(5, 2, offset=3, cols=3, shift_per_head=1),
        "relative stripes": sp.causal() & sp.stripe(5, 2, cols=3, relative=True),
        "blocks": sp.causal() & sp.block(64, mask=mask(4, 3, 3)),
        "odd blocks": sp.block(7, 9, mask=mask(4, 22, 17)),
        "lists": sp.causal() & sp.block(32, 16, indices=index(11, 1, 2, 5, 6)),
        "vertical and slash": sp.causal() & sp.vertical_slash(index(160, 4, 20), index(160, 2, 6)),
        "tokens": sp.causal() & sp.top_k(index(160, 4, LENGTH, 5)),
        "documents": sp.documents(torch.tensor([0, 5, 5, 70, 140])),
        "mixture": sp.per_head([streaming, sp.causal() & sp.window(9), sp.dense(), sp.stripe(3)]),
        "permuted": sp.causal()
        & sp.permuted(sp.block(16, mask=mask(2, 10, 10)), k=torch.randperm(LENGTH, generator=generator)),
        "permuted rows": sp.causal()
        & sp.permuted(
            sp.window(9), q=torch.randperm(LENGTH, generator=generator), k=torch.randperm(LENGTH, generator=generator)
        ),
        "everything": (sp.block(16, mask=mask(10, 10)) | sp.columns(index(LENGTH, 9)) | sp.window(3))
        - sp.diagonals(torch.tensor([0, 4])),
    }


KINDS = _kinds()
