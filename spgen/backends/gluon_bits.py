"""Products with 2:4 weights on Hopper through Gluon: tensor maps bring stored weights, threads expand them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spgen.backends.triton_compile import TRITON_TYPES, VECTOR
from spgen.backends.triton_launch import Call, driver
from spgen.backends.triton_program import Form, Program
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon import expanded
from spgen.templates.gluon.linear import WARPGROUPS
from spgen.templates.gluon.two_of_four import ARRANGE, LINEAR
from spgen.templates.triton.bits import sides
from spgen.weights.storage import Stored

_MANY_CALLS = 4096


def serves(kernel: Op, target: Target) -> bool:
    """Whether a kernel asks for this form, and the target has it."""
    asks = option(kernel, WARPGROUPS, 0) > 0
    return asks and target.arch == "sm_90" and not triton_interpreted() and expanded.expresses(kernel)


def forms(kernel: Op) -> tuple[Form, ...]:
    """How the functions are compiled."""
    types = {"data": f"*{TRITON_TYPES[kernel['dtype']]}"}
    boxes = {}
    for name, (rows, columns) in expanded.shown(kernel).items():
        element, item = (TRITON_TYPES[kernel["dtype"]], 2) if name == "arranged_tiles" else ("i32", 4)
        layout = f"NVMMASharedLayout(swizzle_byte_width={columns * item}, element_bitwidth={8 * item}, rank=4)"
        boxes[name] = f"tensordesc<{element}[1, 1, {rows}, {columns}],{layout}>"
    return (
        Form(ARRANGE, expanded.parameters(kernel, ARRANGE), types, 1),
        Form(LINEAR, expanded.parameters(kernel, LINEAR), types, 1, boxes=boxes, registers=expanded.cap(kernel)),
    )


class ExpandedProduct:
    """The launches that tensor maps can express."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.kernel = kernel
        self.program = Program(
            "gluon/expanded.py.jinja", str(kernel), lambda: expanded.symbols(kernel), forms(kernel), target
        )
        self._calls: dict[tuple[Any, ...], Call | None] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> bool:
        """Write y; x has pairs of columns in words of 32 bits. False where tensor maps do not express the weights."""
        m, k = x.shape
        steps = -(-k // expanded.STEP)
        arranged = x.new_empty(m, steps * expanded.STEP)
        tensors = [arranged, *_stored(weights), *([] if bias is None else [bias]), y]
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (x.get_device(), m, k, y.shape[1])
        with self._lock:
            if key not in self._calls:
                if len(self._calls) >= _MANY_CALLS:
                    self._calls.clear()
                self._calls[key] = self._prepared(arranged, weights, y, steps)
            call = self._calls[key]
        if call is None or any(pointer % VECTOR for pointer in pointers):
            return False
        programs = m * -(-steps // expanded.ARRANGED)
        self.program.launch(ARRANGE, [x, arranged], (k // 2, steps, x.stride(0) // 2), programs)
        call(pointers)
        return True

    def precompile(self) -> Mapping[str, int]:
        """Bring the binaries of aligned calls into the cache; what the product's takes."""
        return self.program.precompile(LINEAR)

    def _prepared(self, arranged: Tensor, weights: Sequence[Stored], y: Tensor, steps: int) -> Call | None:
        if not driver().has_tensor_maps:
            return None
        m, n = y.shape
        places = {one.name: place for place, one in enumerate(expanded.parameters(self.kernel, LINEAR))}
        shown = []
        for side, weight in zip(sides(self.kernel), weights, strict=True):
            shown.append((places[f"values_{side}"], _words(weight.values)))
            shown.append((places[f"bits_{side}"], _words(weight.index[0])))
        shown.append((places["arranged"], arranged[None, None]))
        grid = -(-n // expanded.rows(self.kernel)) * -(-m // self.kernel["block_m"])
        return self.program.map(LINEAR, shown, (n, steps, m), grid, draws=False)


def _stored(weights: Sequence[Stored]) -> list[Tensor]:
    return [
        one
        for weight in weights
        for one in (weight.values, weight.index[0], *([] if weight.scales is None else [weight.scales]))
    ]


def _words(matrix: Tensor) -> Tensor:
    """A matrix as words of 32 bits, with the four axes of a tensor map."""
    return matrix.view(torch.int32)[None, None]
