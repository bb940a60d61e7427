"""Products with sparse weights on GPUs: what spgen.weights.compile asks of a backend, through Triton."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from spgen.backends import cusparselt, gluon_linear
from spgen.backends.gluon_linear import HopperProduct, group_of, lists_of, order_of
from spgen.backends.triton_bits import BitsProduct, LibraryProduct
from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_linear_schedule import default_config as default_config
from spgen.backends.triton_linear_schedule import sampled_config as sampled_config
from spgen.backends.triton_program import Form, Program
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon.linear import WARPGROUPS, paired
from spgen.templates.triton import linear
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.linear import FINISH, LINEAR, SAMPLED
from spgen.weights.storage import Stored

_VALUES = {**TRITON_TYPES, "int8": "i8", "int4": "u8"}
_Kernel = TypeVar("_Kernel", bound="_Launchable")


class _Launchable(Protocol):
    def __init__(self, kernel: Op, target: Target) -> None: ...


_built: dict[tuple[Op, str, bool], Any] = {}
_lock = threading.Lock()


def build(kernel: Op, target: Target) -> BlockProduct | BitsProduct:
    """The launchable form of a level-3 `linear` kernel; source and binaries are made when they are needed first."""
    if kernel["storage"] == "blocks":
        return _once(BlockProduct, kernel, target)
    library = option(kernel, "cusparselt", 0) and cusparselt.is_there(target)
    return _once(LibraryProduct if library else BitsProduct, kernel, target)


def build_sampled(kernel: Op, target: Target) -> BlockGradient:
    """The launchable form of a level-3 `sampled` kernel."""
    return _once(BlockGradient, kernel, target)


def _once(kind: type[_Kernel], kernel: Op, target: Target) -> _Kernel:
    key = (kernel, target.key, triton_interpreted())
    with _lock:
        if key not in _built:
            _built[key] = kind(kernel, target)
        return cast(_Kernel, _built[key])


def form(kernel: Op, entry: str, parameters: tuple[Parameter, ...]) -> Form:
    """How a function of a linear kernel is compiled."""
    types = {"data": f"*{TRITON_TYPES[kernel['dtype']]}", "values": f"*{_VALUES[kernel['values']]}"}
    vector = VECTOR // ELEMENT_BYTES[kernel["dtype"]]
    return Form(entry, parameters, types, vector, 4 if entry == FINISH else option(kernel, "warps", 4))


def _program(template: str, kernel: Op, target: Target, symbols: Callable[[Op], Any]) -> Program:
    forms = [form(kernel, entry, linear.parameters(kernel, entry)) for entry in linear.entries(kernel)]
    return Program(template, str(kernel), lambda: symbols(kernel), forms, target)


class BlockProduct:
    """y = activation(x W^T + bias) and its kin over stored blocks."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.hopper: HopperProduct | None = None
        if option(kernel, WARPGROUPS, 0):
            if gluon_linear.serves(kernel, target):
                self.hopper = gluon_linear.HopperProduct(kernel, target)
            kernel = gluon_linear.portable(kernel)
        self.kernel = kernel
        self.program = _program("triton/linear.py.jinja", kernel, target, linear.symbols)
        self._shape, self._splits = linear.shape_of(kernel), linear.splits(kernel)

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Write y; shapes, dtypes and devices are the caller's promise (spgen.weights.compile.Backend)."""
        if not y.numel():
            return
        results = [y] if bias is None else [bias, y]
        if self.hopper is not None and self.hopper(x, weights, results):
            return
        tensors = [x]
        for weight in weights:
            scales = [] if weight.scales is None else [weight.scales]
            tensors += [weight.values, *scales, *lists_of(self.kernel, weight)]
        order = order_of(self.kernel, weights[0])
        if linear.is_ordered(self.kernel):
            tensors.append(order)
        m, width = y.shape
        lists, tiles = len(order), -(-m // self.kernel["block_m"])
        numbers = (x.stride(0), x.shape[1], width, m, lists, group_of(self.kernel, x, tiles))
        grid = tiles * -(-lists // self._shape.lists) * self._shape.parts * self._splits
        if self._splits == 1:
            self.program.launch(LINEAR, [*tensors, *results], numbers, grid)
            return
        parts = x.new_empty(len(weights) * self._splits * y.numel(), dtype=torch.float32)
        self.program.launch(LINEAR, [*tensors, parts], numbers, grid)
        rest = (width, y.numel())
        self.program.launch(FINISH, [parts, *results], rest, -(-y.numel() // linear.FINISHED))

    def precompile(self) -> Mapping[str, int]:
        """Bring the binaries of contiguous calls into the cache; what the product's takes."""
        if self.hopper is not None:
            if paired(self.hopper.kernel):  # a first call within a capture has the portable form
                self.program.precompile(LINEAR)
            return self.hopper.program.binary(LINEAR).resources
        return self.program.precompile(LINEAR)


class BlockGradient:
    """g^T x at the places of stored blocks."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.kernel = kernel
        self.program = _program("triton/sampled.py.jinja", kernel, target, linear.sampled_symbols)

    def __call__(self, g: Tensor, x: Tensor, weight: Stored, out: Tensor) -> None:
        """Write the gradients of the stored values; the rows of g and x may lie apart."""
        indptr, indices, *_ = weight.index
        rows, columns, per = linear.sampled_tile(self.kernel)
        tiles = -(-self.kernel["rows"] // rows) * (1 if per > 1 else -(-self.kernel["cols"] // columns))
        lists = len(indptr) - 1
        numbers = (g.stride(0), x.stride(0), g.shape[1], x.shape[1], len(g), lists)
        grid = (len(out) // per + lists) * tiles if out.numel() else 0
        self.program.launch(SAMPLED, [g, x, indptr, indices, out], numbers, grid)
