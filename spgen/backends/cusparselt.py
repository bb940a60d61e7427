"""2:4 weights on the sparse tensor cores of NVIDIA GPUs, through the cuSPARSELt that PyTorch brings.

Where a call's rows are many the hardware's own 2:4 products are the fastest (Mishra et al., "Accelerating Sparse Deep
Neural Networks", 2021). Triton cannot say them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from spgen.backends.derived import Derived
from spgen.target import Target

if TYPE_CHECKING:
    from spgen.weights.compile import Request, Sizes

_MULTIPLE = 32  # of features
_ROWS = 16  # of x
_DTYPES = ("bfloat16", "float16")
_SHARES = ((1, 2), (1, 4), (2, 4))  # of which at most 2 of 4 are stored

_compressed: Derived[Tensor] = Derived()  # the library's form of a weight, by its values
_algorithms: dict[tuple[object, ...], tuple[int, ...]] = {}


def serves(request: Request, sizes: Sizes) -> bool:
    """Whether such products can be had here: y = x W^T (+ bias) of 16-bit values, at most 2 of 4 of them stored."""
    layout = request.layout
    plain = not (request.transposed or request.gated or request.scales) and request.activation == "none"
    stored = layout.kind == "n_of_m" and (layout.rows, layout.cols) in _SHARES
    fits = sizes.n % _MULTIPLE == 0 and sizes.k % _MULTIPLE == 0 and sizes.n > 0 < sizes.k
    return plain and stored and fits and request.values == request.dtype in _DTYPES and is_there(request.target)


@lru_cache(maxsize=8)
def is_there(target: Target) -> bool:
    """Whether PyTorch brings the library and the GPU has sparse tensor cores."""
    if target.kind != "cuda" or not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def compressed(values: Tensor, unpacked: Callable[[], Tensor]) -> Tensor:
    """The library's form of the weight [N, K] with these stored values, kept if they stay the same.

    What is compressed while a graph is captured is compressed again by each of its runs.
    """

    def made() -> Tensor:
        return torch._cslt_compress(unpacked())

    found = _compressed.of([values], made)
    return made() if found is None else found


def product(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [M, K] W^T + bias of a compressed weight, [M, outputs]. The fastest algorithm is searched once per size.

    A search waits for the device: while a graph is captured the library's own choice is taken.
    """
    rows = len(x)
    blank = -rows % _ROWS
    columns = (pad(x, (0, 0, 0, blank)) if blank else x).t()  # a pad of nothing is a copy, too
    key = (x.get_device(), x.dtype, rows, outputs, x.shape[1], bias is not None)
    algorithm = _algorithms.get(key)
    if algorithm is None and not torch.cuda.is_current_stream_capturing():
        algorithm = _algorithms[key] = fastest(weight, columns, bias)
    return multiplied(weight, columns, bias, algorithm or (0,))[:rows]


def fastest(weight: Tensor, columns: Tensor, bias: Tensor | None = None) -> tuple[int, ...]:
    """What the library's search finds for `multiplied`: an algorithm; how many parts it splits sums into, and how."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:  # older versions of PyTorch have it under another name, for the algorithm alone
        return (int(torch._cslt_sparse_mm_search(weight, columns, bias, None, None, True)),)
    algorithm, splits, how, _ = search(weight, columns, bias, None, None, True)
    return algorithm, splits, how


def multiplied(weight: Tensor, columns: Tensor, bias: Tensor | None, algorithm: tuple[int, ...]) -> Tensor:
    """(`weight` `columns`)^T + bias of a compressed weight."""
    return torch._cslt_sparse_mm(weight, columns, bias, None, None, True, *algorithm)
