"""Products with n-of-m and bitmap weights on GPUs, as spgen.backends.triton_linear asks for them.

| option | meaning |
|---|---|
| `warps` | of a program |
| `cores` | 1: few rows times 2:4 weights by sparse tensor cores, straight from the stored form |
| `warps_n`, `steps` | of those: warps beside each other on rows of weights; chunks of columns on their way |
| `warpgroups` | on Hopper: up to 256 rows times 2:4 weights that threads expand, 64 rows of them a warpgroup |
| `stages`, `x_stages`, `together`, `shares` | of those: see templates/gluon/expanded.py.jinja |
| `programs` | 2, of those: registers for two programs of one warpgroup and two shares to a multiprocessor |
| `splits` | 1, of those: programs share the tiles' steps evenly, for weights of few rows |
| `walk`, `words` | few rows times bitmaps: see spgen/backends/gluon_walk.py |
| `cusparselt` | 1: many rows times 2:4 weights, by that library |
| `dense` | 1: the weight is unpacked first |

Up to 4 rows of x are multiplied as weights come, up to 8 by bitmaps of which little is stored, value by value; up to
64, on Hopper up to 256, by tensor cores if the storage is 2:4. All other products unpack the weight, to a workspace
[N, K] of x's dtype, and leave the rest to cuBLAS: tiles that were unpacked in shared memory for Triton's `dot` took
three times as long, at any number of rows. Values of fewer bits are unpacked exactly and the sums scaled, but for
transposed products, whose weights are rounded to x's dtype after scaling. Expanded float8 values stay float8, int4
becomes it, and up to 64 rows of x become two parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from spgen.backends import cusparselt, gluon_bits, gluon_walk
from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_program import Form, Program
from spgen.ir.config import Config
from spgen.ir.kernel import KERNEL, option
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon import two_of_four, walk
from spgen.templates.gluon.linear import WARPGROUPS
from spgen.templates.triton import bits
from spgen.templates.triton.bits import LINEAR, UNIT, UNPACK
from spgen.weights.compile import FEW
from spgen.weights.storage import Layout, Stored

if TYPE_CHECKING:
    from spgen.weights.compile import Request, Sizes

VALUES = {**TRITON_TYPES, "int8": "i8", "int4": "u8"}
_DENSE = Config(128, 128, ("dense=1",))
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
        self._expanded: gluon_bits.ExpandedProduct | None = None
        if option(kernel, WARPGROUPS, 0):
            if gluon_bits.serves(kernel, target):
                self._expanded = gluon_bits.ExpandedProduct(kernel, target)
            kernel = _portable(kernel)
        self.kernel, self.target = kernel, target
        self._cores = bool(option(kernel, "cores", 0))
        self._walks = bool(option(kernel, "walk", 0))
        self._unpacks = bits.entry_of(kernel) == UNPACK
        if self._walks:
            forms, template, symbols = [gluon_walk.form(kernel)], "gluon/walk.py.jinja", walk.symbols
        elif self._cores:
            forms = [_cores_form(kernel, entry) for entry in two_of_four.entries(kernel)]
            template, symbols = "gluon/two_of_four.py.jinja", two_of_four.symbols
        else:
            forms = [form(kernel, bits.entry_of(kernel))]
            template, symbols = "triton/bits.py.jinja", bits.symbols
        self.program = Program(template, str(kernel), lambda: symbols(kernel), forms, target)

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Write y; shapes, dtypes and devices are the caller's promise (spgen.weights.compile.Backend)."""
        if not y.numel():
            return
        if self._expanded is not None or self._cores:
            x = x if _in_words(x) else x.clone(memory_format=torch.contiguous_format)
        if self._expanded is not None and self._expanded(x, weights, bias, y):
            return
        if self._cores:
            self._by_cores(x, weights, bias, y)
        elif self._walks:
            self._walked(x, weights, bias, y)
        elif self._unpacks:
            self._unpacked_first(x, weights, bias, y)
        else:
            numbers = (y.shape[1], x.shape[1], _units(weights[0]), len(y), x.stride(0))
            grid = -(-y.shape[1] // self.kernel["block_n"])
            self.program.launch(LINEAR, _all(x, weights, bias, y), numbers, grid)

    def precompile(self) -> Mapping[str, int]:
        """Bring the binaries of aligned calls into the cache; what the product's takes."""
        if self._expanded is not None:
            return self._expanded.precompile()
        return self.program.precompile(next(reversed(self.program.forms)))

    def _walked(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Few rows times bitmaps, value by value; no more rows at once than the kernel was made for."""
        stored = [one for weight in weights for one in gluon_walk.tensors(weight)]
        rows, (n, k) = self.kernel["block_m"], (y.shape[1], x.shape[1])
        for some, out in zip(x.split(rows), y.split(rows), strict=True):
            tensors = [some, *stored, *([] if bias is None else [bias]), out]
            self.program.launch(LINEAR, tensors, (n, k, len(out), x.stride(0)), -(-n // walk.rows(self.kernel)))

    def _by_cores(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Few rows times 2:4 weights by sparse tensor cores; all tensors are taken as words of 32 bits."""
        m, n = y.shape
        tiles, units = two_of_four.tiles(self.kernel), _units(weights[0])
        pairs, row = x.shape[1] // 2, x.stride(0) // 2
        if not two_of_four.is_direct(self.kernel):
            words = x.new_empty(units * tiles * two_of_four.ROWS * UNIT)
            self.program.launch(two_of_four.ARRANGE, [x, words], (m, pairs, row), units // UNIT * tiles)
            x = words
        numbers = (n, pairs, units, m, row)
        self.program.launch(LINEAR, _all(x, weights, bias, y), numbers, -(-n // self.kernel["block_n"]))

    def _unpacked_first(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Products with dense matrices: with nothing to be done to their sums but a bias, by cuBLAS alone."""
        kernel, activation = self.kernel, self.kernel["activation"]
        matrices = [self.unpacked(weight, x) for weight in weights]
        sides = matrices if kernel["transposed"] else [matrix.t() for matrix in matrices]
        scaled = kernel["scales"] and bits.serves(kernel) and not kernel["transposed"]
        if activation == "none" and len(sides) == 1 and not scaled:
            torch.mm(x, sides[0], out=y) if bias is None else torch.addmm(bias, x, sides[0], out=y)
            return
        sums = [_product(x, side) for side in sides]
        if scaled:
            for one, weight in zip(sums, weights, strict=True):
                assert weight.scales is not None
                one *= weight.scales
        total, *others = sums
        if bias is not None:
            total += bias
        total = _ACTIVATIONS[activation](total)
        y.copy_(total * others[0] if others else total)

    def unpacked(self, weight: Stored, x: Tensor) -> Tensor:
        """The weight [N, K] in x's dtype; see the module's text for scales."""
        if not bits.serves(self.kernel):
            return weight.dense().to(x.dtype)
        n, k = weight.shape
        units = _units(weight)
        matrix = torch.empty(n, k, dtype=x.dtype, device=x.device)
        grid = n * -(-units // bits.UNPACK_UNITS)
        self.program.launch(UNPACK, [*_tensors(weight, bits.is_scaled(self.kernel)), matrix], (n, k, units), grid)
        return matrix


class LibraryProduct(BitsProduct):
    """y = x W^T + bias over 2:4 weights by cuSPARSELt, whose form of a weight is kept."""

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Write y."""
        y.copy_(self.result(x, weights, bias))

    def result(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None) -> Tensor:
        """A new y."""
        (weight,) = weights
        form = cusparselt.compressed(weight.values, partial(self.unpacked, weight, x))
        return cusparselt.product(x.contiguous(), form, bias, weight.shape[0])


def _portable(kernel: Op) -> Op:
    """The same kernel for weights that tensor maps do not express, and for other GPUs."""
    config = _cores_config(min(kernel["block_m"], FEW)) if kernel["height"] == "few" else _DENSE
    changed = {"block_m": config.block_m, "block_n": config.block_n, "options": config.options}
    attributes: dict[str, Any] = {**dict(kernel.attrs), **changed}
    return KERNEL.make("linear", **attributes)


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
    early = entry == LINEAR and not two_of_four.is_direct(kernel)
    return Form(entry, two_of_four.parameters(kernel, entry), types, 1, warps, early=early)


def _in_words(x: Tensor) -> bool:
    """Whether each pair of x's columns is a word of 32 bits."""
    return x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0


def _all(x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> list[Tensor]:
    stored = [one for weight in weights for one in _tensors(weight)]
    return [x, *stored, y] if bias is None else [x, *stored, bias, y]


def _tensors(weight: Stored, scaled: bool = True) -> list[Tensor]:
    bits_of, *offsets = weight.index
    scales = [] if weight.scales is None or not scaled else [weight.scales]
    return [weight.values, bits_of.view(torch.uint8), *offsets, *scales]


def _units(weight: Stored) -> int:
    """Units of a row, whose last ones are padding."""
    padded = weight.layout.padded
    return -(-weight.shape[1] // padded) * padded // UNIT


def default_config(request: Request, sizes: Sizes) -> Config:
    """Always a legal choice."""
    if _has_cores(request, sizes):
        expanded = gluon_bits.default_config(request, sizes, cusparselt.serves(request, sizes))
        if expanded is not None:
            return expanded
        if sizes.height == "few":
            return _cores_config(max(sizes.m, 1))
    walked = gluon_walk.default_config(request, sizes)
    if walked is not None:
        return walked
    if sizes.height == "many" and cusparselt.serves(request, sizes):
        return Config(128, 128, ("cusparselt=1",))
    if sizes.m > _ONE_BY_ONE:
        return _DENSE
    return Config(bits.padded(max(sizes.m, 1)), 4 if request.gated or sizes.m > 2 else 8, ("warps=4",))


def _has_cores(request: Request, sizes: Sizes) -> bool:
    """Whether sparse tensor cores take a call of few rows; quantised values are widened as compute capability 9 can."""
    half = request.dtype in ("bfloat16", "float16")
    values = request.values == request.dtype or (request.scales and request.dtype == "bfloat16")
    stored = request.layout == Layout("n_of_m", 2, 4) and half and values
    if not stored or request.transposed or sizes.k % 2 or request.target.kind != "cuda" or triton_interpreted():
        return False
    return int(request.target.arch.removeprefix("sm_")) >= (90 if request.scales else 80)


def _cores_config(m: int) -> Config:
    """Measured on an H200, 4096 features to 14336."""
    rows = m if m <= two_of_four.DIRECT else -(-m // two_of_four.ROWS) * two_of_four.ROWS
    if rows <= two_of_four.DIRECT:
        return Config(rows, 16, ("cores=1", "warps=4", "steps=2"))
    if rows <= 8:
        return Config(rows, 16, ("cores=1", "warps=2", "steps=4"))
    if rows <= 16:
        return Config(rows, 32, ("cores=1", "warps=4", "steps=2"))
    if rows <= 32:
        return Config(rows, 32, ("cores=1", "warps=4", "steps=1"))
    return Config(rows, 64, ("cores=1", "warps=4", "warps_n=2", "steps=1"))
