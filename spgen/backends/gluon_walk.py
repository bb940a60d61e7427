"""Products of few rows of x with bitmap weights on NVIDIA GPUs: threads walk from one stored value to the next.

| option | meaning |
|---|---|
| `walk` | 1: this form |
| `warps` | of a program; each has its own rows of weights |
| `words` | words of a row whose columns of x lie in shared memory at a time |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_program import Form
from spgen.ir.config import Config
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.templates.gluon import walk
from spgen.templates.triton.bits import LINEAR, padded
from spgen.weights.storage import Stored

if TYPE_CHECKING:
    from spgen.weights.compile import Request, Sizes

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# the share of stored values up to which this is the fastest form, by rows of x
_SHARES = {1: 0.45, 2: 0.35, 4: 0.35, 8: 0.15}


def default_config(request: Request, sizes: Sizes) -> Config | None:
    """For calls that are best walked; None for others. Measured on an H200, 4096 features to 14336."""
    rows = padded(max(sizes.m, 1))
    if request.layout.kind != "bitmap" or request.transposed or rows not in _SHARES:
        return None
    if request.target.kind != "cuda" or triton_interpreted():
        return None
    if sizes.stored > _SHARES[rows] * (1 + request.gated) * sizes.n * sizes.k:
        return None
    if rows > 4:
        return Config(rows, 32, ("walk=1", "warps=16", "words=32"))
    return Config(rows, 16, ("walk=1", "warps=16", "words=64"))


def form(kernel: Op) -> Form:
    """How the function is compiled."""
    types = {"data": f"*{TRITON_TYPES[kernel['dtype']]}", "values": f"*i{8 * walk.SIZES[kernel['values']]}"}
    vector = VECTOR // ELEMENT_BYTES[kernel["dtype"]]
    return Form(LINEAR, walk.parameters(kernel), types, vector, option(kernel, "warps", 16))


def tensors(weight: Stored) -> list[Tensor]:
    """What the function takes of a weight: values are integers of their size."""
    values = weight.values.view(_INTEGERS[weight.values.element_size()])
    return [values, *weight.index, *([] if weight.scales is None else [weight.scales])]
