"""Products with sparse blocks on Hopper through Gluon: a warp that brings tiles, warpgroups that multiply."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from spgen.backends.derived import Derived
from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_launch import Call, driver
from spgen.backends.triton_program import Form, Program
from spgen.ir.kernel import KERNEL, option
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon import linear
from spgen.templates.triton.linear import weights as names_of
from spgen.weights.pairs import Pairs, pairs_of
from spgen.weights.storage import Stored

_MANY_CALLS = 4096
_X_BYTES = 16 * 2**20  # of x that row tiles take together
_OWN_OPTIONS = (linear.WARPGROUPS, linear.PAIRED, "stages")
_pairs: Derived[Pairs] = Derived()  # by the columns of a weight's lists


def serves(kernel: Op, target: Target) -> bool:
    """Whether a kernel asks for this form, and the target has it."""
    asks = option(kernel, linear.WARPGROUPS, 0) > 0
    return asks and target.arch == "sm_90" and not triton_interpreted() and linear.expresses(kernel)


def portable(kernel: Op) -> Op:
    """The same kernel for plain Triton."""
    kept = [text for text in kernel["options"] if text.partition("=")[0] not in _OWN_OPTIONS]
    changed = {**dict(kernel.attrs), "block_m": 128, "options": (*kept, "warps=8", "stages=3")}
    return KERNEL.make("linear", **changed)


def form(kernel: Op) -> Form:
    """How the kernel is compiled."""
    dtype = TRITON_TYPES[kernel["dtype"]]
    boxes = {
        name: f"tensordesc<{dtype}[1, 1, {rows}, {columns}],{linear.layout_of(columns)}>"
        for name, (rows, columns) in linear.boxes(kernel).items()
    }
    types = {"data": f"*{dtype}", "values": f"*{dtype}"}
    return Form("linear", linear.parameters(kernel), types, VECTOR // ELEMENT_BYTES[kernel["dtype"]], boxes=boxes)


def group_of(kernel: Op, x: Tensor, tiles: int) -> int:
    """Row tiles that come together: their rows of x fit into the cache that all share."""
    fitting = _X_BYTES // max(kernel["block_m"] * x.shape[1] * x.element_size(), 1)
    return max(min(option(kernel, "group", fitting), tiles), 1)


def lists_of(kernel: Op, weight: Stored) -> tuple[Tensor, ...]:
    """Where lists begin, their columns, and where their blocks are, if not in the lists' order."""
    indptr, columns, _, back_indptr, back_columns, blocks, _ = weight.index
    return (back_indptr, back_columns, blocks) if kernel["transposed"] else (indptr, columns)


def order_of(kernel: Op, weight: Stored) -> Tensor:
    """Lists by falling length."""
    return weight.index[6 if kernel["transposed"] else 2]


class HopperProduct:
    """The launches that tensor maps can express."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.kernel = kernel
        self.program = Program(
            "gluon/linear.py.jinja", str(kernel), lambda: linear.symbols(kernel), [form(kernel)], target
        )
        self._calls: dict[tuple[Any, ...], Call | None] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, weights: Sequence[Stored], rest: Sequence[Tensor]) -> bool:
        """Launch; `rest` are the bias, if there is one, and y. False where tensor maps cannot express it.

        Lists by twos are made at a weight's first call, which waits for the device: not while a graph is captured.
        """
        y = rest[-1]
        if linear.paired(self.kernel):
            (weight,) = weights
            pairs = self._pairs(weight) if _shows(x, weights, y) else None
            if pairs is None:
                return False
            index = [pairs.lists, pairs.bounds, pairs.columns, pairs.places]
            tensors = [x, weight.values, *index, *rest]
            lists = len(pairs.lists)
        else:
            stored = [one for weight in weights for one in (weight.values, *lists_of(self.kernel, weight))]
            order = order_of(self.kernel, weights[0])
            tensors, lists = [x, *stored, order, *rest], len(order)
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (x.get_device(), x.shape, x.stride(0), y.shape, lists, *[len(weight.values) for weight in weights])
        with self._lock:
            if key not in self._calls:
                if len(self._calls) >= _MANY_CALLS:
                    self._calls.clear()
                self._calls[key] = self._prepared(x, weights, y, lists)
            call = self._calls[key]
        if call is None or any(pointer % VECTOR for pointer in pointers):
            return False
        call(pointers)
        return True

    def _pairs(self, weight: Stored) -> Pairs | None:
        indptr, columns, *places = lists_of(self.kernel, weight)
        per = linear.per(self.kernel)
        make = partial(pairs_of, indptr, columns, places[0] if places else None, per)
        return _pairs.of([columns, indptr, *places], make, per)

    def _prepared(self, x: Tensor, weights: Sequence[Stored], y: Tensor, lists: int) -> Call | None:
        if not _shows(x, weights, y):
            return None
        m, width = y.shape
        out, tiles = linear.sides_of(self.kernel)[0], -(-m // self.kernel["block_m"])
        tickets = tiles * lists * (out // linear.width(self.kernel))
        places = {parameter.name: place for place, parameter in enumerate(linear.parameters(self.kernel))}
        shown = [(places["x"], x[None, None])]
        for name, weight in zip(names_of(self.kernel), weights, strict=True):
            shown.append((places[f"{name}_values"], weight.values[None]))
        shown.append((places["y"], y[None, None]))
        return self.program.map("linear", shown, (width, m, lists, group_of(self.kernel, x, tiles), tickets), tickets)


def _shows(x: Tensor, weights: Sequence[Stored], y: Tensor) -> bool:
    """Whether tensor maps can show the tensors: none is empty, rows begin at multiples of 16 bytes."""
    if not (all(weight.values.numel() for weight in weights) and x.numel() and driver().has_tensor_maps):
        return False
    return not (x.stride(0) * x.element_size() % VECTOR or y.shape[1] * y.element_size() % VECTOR)
