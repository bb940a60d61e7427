"""Products with n-of-m and bitmap weights on GPUs, as spgen.backends.triton_linear asks for them.

| option | meaning |
|---|---|
| `units` | columns of a step, by eights |
| `stages` | steps on their way |
| `warps` | of a program |
| `splits` | shares of the columns, whose sums the last program to arrive adds up |
| `dense` | 1: the weight is unpacked first |
| `cusparselt` | 1: by the sparse tensor cores |

Up to 4 rows of x are multiplied as weights come, more by the matrix units, from tiles that are unpacked in the
kernel. Where rows are very many the weight is unpacked once, to a workspace [N, K] of x's dtype, and multiplied by
cuBLAS. Transposed products always are, and those with groups that no tile holds (`bits.serves`); a weight with scales
is then rounded to x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from spgen.backends import cusparselt
from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_counters import arrivals
from spgen.backends.triton_program import Form, Program
from spgen.ir.config import Config
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.gluon import two_of_four
from spgen.templates.triton import bits
from spgen.templates.triton.attention import SMALLEST_TILE
from spgen.templates.triton.bits import LINEAR, UNIT, UNPACK, padded
from spgen.weights.storage import Stored

if TYPE_CHECKING:
    from spgen.weights.compile import Request, Sizes

VALUES = {**TRITON_TYPES, "int8": "i8", "int4": "u8"}
_UNPACK_FROM = 2048  # rows of x, from which unpacking first was faster
_LIBRARY_FROM = 256  # and cuSPARSELt
_ONE_BY_ONE = 4  # rows of x that are multiplied as weights come
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class BitsProduct:
    """y = activation(x W^T + bias) and its kin over n-of-m or bitmap weights."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.kernel, self.target = kernel, target
        self._unpacks = bool(option(kernel, "dense", 0)) or not bits.serves(kernel) or kernel["transposed"]
        self._library = bool(option(kernel, "cusparselt", 0)) and cusparselt.is_there(target)
        self._splits = bits.splits(kernel)
        self._cores = bool(option(kernel, "cores", 0))
        if self._cores:
            forms = [_cores_form(kernel, entry) for entry in two_of_four.entries(kernel)]
            source = "gluon/two_of_four.py.jinja"
            self.cores = Program(source, str(kernel), lambda: two_of_four.symbols(kernel), forms, target)
        self.program = Program(
            "triton/bits.py.jinja", str(kernel), lambda: bits.symbols(kernel),
            [form(kernel, entry) for entry in bits.ENTRIES], target,
        )  # fmt: skip

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Write y; shapes, dtypes and devices are the caller's promise (spgen.weights.compile.Backend)."""
        if not y.numel():
            return
        if self._cores and _in_words(x):
            self._by_cores(x, weights, bias, y)
        elif self._library:
            self._by_library(x, weights[0], bias, y)
        elif self._unpacks:
            self._unpacked_first(x, weights, bias, y)
        else:
            self._by_tiles(x, weights, bias, y)

    def _by_tiles(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        kernel, (m, n) = self.kernel, y.shape
        tensors = [x, *(one for weight in weights for one in _tensors(weight)), *([] if bias is None else [bias]), y]
        grid = -(-n // kernel["block_n"])
        if bits.multiplies(kernel):
            grid *= -(-m // bits.lanes(kernel)) * self._splits
        if self._splits > 1:
            tile = kernel["block_n"] * bits.lanes(kernel) * len(weights)
            tensors += [x.new_empty(grid * tile, dtype=torch.float32), arrivals(x, grid // self._splits)]
        numbers = (n, x.shape[1], _units(weights[0]), m, x.stride(0))
        self.program.launch(LINEAR, tensors, numbers, grid)

    def _by_cores(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Few rows times 2:4 weights by sparse tensor cores; all tensors are taken as words of 32 bits."""
        m, n = y.shape
        tiles, units = two_of_four.tiles(self.kernel), _units(weights[0])
        pairs, row = x.shape[1] // 2, x.stride(0) // 2
        if not two_of_four.is_direct(self.kernel):
            words = x.new_empty(units * tiles * two_of_four.ROWS * UNIT)
            self.cores.launch(two_of_four.ARRANGE, [x, words], (m, pairs, row), units // UNIT * tiles)
            x = words
        tensors = [x, *(one for weight in weights for one in _tensors(weight)), *([] if bias is None else [bias]), y]
        self.cores.launch(LINEAR, tensors, (n, pairs, units, m, row), -(-n // self.kernel["block_n"]))

    def _by_library(self, x: Tensor, weight: Stored, bias: Tensor | None, y: Tensor) -> None:
        """2:4 products by cuSPARSELt, whose form of the weight is made at the first call."""
        form = cusparselt.known(weight.values)
        if form is None:
            form = cusparselt.compressed(weight.values, self.unpacked(weight, x))
        cusparselt.multiply(x.contiguous(), form, bias, y)

    def _unpacked_first(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Products with dense matrices: with nothing to be done to their sums but a bias, by cuBLAS alone."""
        activation = self.kernel["activation"]
        matrices = [self.unpacked(weight, x) for weight in weights]
        sides = matrices if self.kernel["transposed"] else [matrix.t() for matrix in matrices]
        if activation == "none" and len(sides) == 1:
            torch.mm(x, sides[0], out=y) if bias is None else torch.addmm(bias, x, sides[0], out=y)
            return
        total, *others = [_product(x, side) for side in sides]
        if bias is not None:
            total += bias
        total = _ACTIVATIONS[activation](total)
        y.copy_(total * others[0] if others else total)

    def unpacked(self, weight: Stored, x: Tensor) -> Tensor:
        """The weight [N, K] in x's dtype."""
        if not bits.serves(self.kernel):
            return weight.dense().to(x.dtype)
        n, k = weight.shape
        units = _units(weight)
        matrix = torch.empty(n, k, dtype=x.dtype, device=x.device)
        grid = n * -(-units // bits.UNPACK_UNITS)
        self.program.launch(UNPACK, [*_tensors(weight), matrix], (n, k, units), grid)
        return matrix


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """In float32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, matrix, out_dtype=torch.float32)
    return x.float() @ matrix.float()


def form(kernel: Op, entry: str) -> Form:
    """How a function is compiled."""
    types = {"data": f"*{TRITON_TYPES[kernel['dtype']]}", "values": f"*{VALUES[kernel['values']]}", "*u8": "*u8"}
    vector = VECTOR // ELEMENT_BYTES[kernel["dtype"]]
    return Form(entry, bits.parameters(kernel, entry), types, vector, option(kernel, "warps", 4))


def _cores_form(kernel: Op, entry: str) -> Form:
    types = {"data": f"*{TRITON_TYPES[kernel['dtype']]}"}
    warps = option(kernel, "warps", 4) if entry == LINEAR else 4
    return Form(entry, two_of_four.parameters(kernel, entry), types, 1, warps)


def _in_words(x: Tensor) -> bool:
    """Whether each pair of x's columns is a word of 32 bits."""
    return x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0


def _tensors(weight: Stored) -> list[Tensor]:
    stored, *offsets = weight.index
    return [weight.values, stored.view(torch.uint8), *offsets, *([] if weight.scales is None else [weight.scales])]


def _units(weight: Stored) -> int:
    """Units of a row, whose last ones are padding."""
    padded = weight.layout.padded
    return -(-weight.shape[1] // padded) * padded // UNIT


def default_config(request: Request, sizes: Sizes) -> Config:
    """Always a legal choice."""
    m, cores = max(sizes.m, 1), max(request.target.cores, 1)
    wide = request.dtype == "float32"
    if m > _LIBRARY_FROM and cusparselt.serves(request, sizes):
        return Config(128, 128, ("cusparselt=1",))
    plain = not (request.gated or request.scales) and request.activation == "none"
    if m > _UNPACK_FROM and plain:
        return Config(128, 128, ("dense=1",))
    if m <= _ONE_BY_ONE:
        rows = 4 if request.gated or m > 2 else 8
        warps = 1 if sizes.n >= 8 * rows * cores else 4
        return Config(padded(m), rows, (f"warps={warps}",))
    if sizes.height == "few":
        splits = min(padded(-(-4 * cores * 64 // max(sizes.n, 1))), 16)
        return Config(padded(m, SMALLEST_TILE), 64, ("units=8", "warps=4", "stages=3", f"splits={splits}"))
    return Config(64 if wide else 128, 64 if wide else 128, ("units=8", "warps=8", "stages=3"))
