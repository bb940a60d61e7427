"""Products with 2:4 weights on Hopper through Gluon: tensor maps bring stored weights, threads expand them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_counters import arrivals
from spgen.backends.triton_launch import Call, driver
from spgen.backends.triton_program import Form, Program
from spgen.ir.config import Config
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon import expanded, two_of_four
from spgen.templates.gluon.linear import WARPGROUPS
from spgen.templates.gluon.two_of_four import ARRANGE, LINEAR
from spgen.templates.triton.bits import padded, sides
from spgen.weights.storage import WORD, Stored

if TYPE_CHECKING:
    from spgen.weights.compile import Request, Sizes

_MANY_CALLS = 4096
_LEAST_ROWS, _MOST_ROWS = 8, 256  # of x in a tile
_DOUBLED, _SHARED = 16, 64  # columns of sums: two programs to a multiprocessor; two warpgroups to a row of weights
_NEAR = 32  # rows of x of which eight quarters on their way are enough
# what sharing tiles costs, in steps of a program; rows of x that cost another; a step of a program without its twin
_SHARING, _SHARED_ROWS, _ALONE = 3, 8, 0.6
_NARROW = 32  # rows of weights to a multiprocessor, too few for `mma.sp` on one row of x


def default_config(request: Request, sizes: Sizes, has_library: bool) -> Config | None:
    """For calls that are best expanded, on Hopper; None for others. Measured on an H200.

    Two programs of one warpgroup share a multiprocessor while their sums leave room. Beyond 128 rows a library's
    product, where the call has one, is faster.
    """
    if request.target.arch != "sm_90" or not 0 < sizes.m <= (_MOST_ROWS // 2 if has_library else _MOST_ROWS):
        return None
    if -(-sizes.k // WORD) % 2:  # rows of bits end within 16 bytes, which no tensor map expresses
        return None
    weights = 1 + request.gated
    parts = expanded.parts_of_x(request.values, padded(sizes.m, _LEAST_ROWS) * weights)
    rows = min(padded(sizes.m, _LEAST_ROWS // parts), _MOST_ROWS // weights)
    sums = rows * weights
    widened = request.scales and parts == 1
    doubled = sums <= _DOUBLED and not request.gated and not widened
    tile, slots = expanded.TILE * (2 - doubled), max(request.target.cores, 1) * (1 + doubled)
    tiles, steps = -(-sizes.n // tile) * -(-sizes.m // rows), -(-sizes.k // (expanded.STEP * parts))
    alone = _ALONE if doubled and tiles <= slots // 2 else 1
    splits = steps * -(-tiles // slots) * alone > steps * tiles / slots + _SHARING + sums / _SHARED_ROWS
    direct = two_of_four.DIRECT if widened else 1 if parts == 1 else 0  # rows of x for `mma.sp`
    if sizes.m <= direct and not (splits and sizes.n <= _NARROW * request.target.cores):
        return None
    if doubled:
        options = [f"{WARPGROUPS}=1", "shares=2", "stages=2", "together=2", f"x_stages={4 * parts}", "programs=2"]
    elif widened or request.gated:
        shares = 2 if sums <= _SHARED and parts == 1 else 1
        options = [f"{WARPGROUPS}=2", f"shares={shares}", f"stages={2 if widened else 3}"]
    else:
        stages, together = 2 if parts > 1 or splits else 3, 2 if sums <= _SHARED else 1
        options = [f"{WARPGROUPS}=2", f"stages={stages}", f"together={together}"]
        options += ["x_stages=8"] if rows <= _NEAR else []
    return Config(rows, 128, (*options, f"{expanded.SPLITS}=1") if splits else tuple(options))


def serves(kernel: Op, target: Target) -> bool:
    """Whether a kernel asks for this form, and the target has it."""
    asks = option(kernel, WARPGROUPS, 0) > 0
    return asks and target.arch == "sm_90" and not triton_interpreted() and expanded.expresses(kernel)


def forms(kernel: Op) -> tuple[Form, ...]:
    """How the functions are compiled."""
    taken = expanded.taken(kernel)
    types = {"data": f"*{TRITON_TYPES[kernel['dtype']]}", "x": f"*{TRITON_TYPES[taken]}"}
    boxes = {}
    for name, (rows, columns) in expanded.shown(kernel).items():
        element, item = (TRITON_TYPES[taken], ELEMENT_BYTES[taken]) if name == "arranged_tiles" else ("i32", 4)
        layout = f"NVMMASharedLayout(swizzle_byte_width={columns * item}, element_bitwidth={8 * item}, rank=4)"
        boxes[name] = f"tensordesc<{element}[1, 1, {rows}, {columns}],{layout}>"
    return (
        Form(
            ARRANGE,
            expanded.parameters(kernel, ARRANGE),
            types,
            VECTOR // 2,
            expanded.arranging_warps(kernel),
            early=True,
        ),
        Form(
            LINEAR,
            expanded.parameters(kernel, LINEAR),
            types,
            1,
            boxes=boxes,
            registers=expanded.cap(kernel),
            early=True,
        ),
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
        width, parts = expanded.step(self.kernel), expanded.parts(self.kernel)
        steps = -(-k // width)
        arranged = x.new_empty(m * parts, steps * width, dtype=getattr(torch, expanded.taken(self.kernel)))
        made = [arranged] if parts == 1 else [arranged, x.new_empty(m, dtype=torch.float32)]
        tensors = [*made, *_stored(weights), *([] if bias is None else [bias]), y, *self._shared(x, y, steps)]
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
        if parts == 1:
            programs = m * -(-steps // expanded.ARRANGED)
            self.program.launch(ARRANGE, [x, arranged], (k // 2, steps, x.stride(0) // 2), programs)
        else:
            self.program.launch(ARRANGE, [x, *made], (k, steps, x.stride(0)), m)
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
        return self.program.map(LINEAR, shown, (n, steps, m), self._programs(m, n, steps), draws=False)

    def _programs(self, m: int, n: int, steps: int) -> int:
        """One to a tile, or as many as fit the GPU, which share the tiles' steps."""
        tiles = self._tiles(m, n)
        if not option(self.kernel, expanded.SPLITS, 0):
            return tiles
        return min(max(self.program.target.cores, 1) * expanded.programs(self.kernel), tiles * steps)

    def _tiles(self, m: int, n: int) -> int:
        return -(-n // expanded.rows(self.kernel)) * -(-m // int(self.kernel["block_m"]))

    def _shared(self, x: Tensor, y: Tensor, steps: int) -> list[Tensor]:
        """Where programs leave shares of sums, and counters, if they share tiles."""
        if not option(self.kernel, expanded.SPLITS, 0):
            return []
        (m, n), rows = y.shape, expanded.rows(self.kernel)
        cells = 2 * self._programs(m, n, steps) * len(sides(self.kernel)) * rows * int(self.kernel["block_m"])
        counters = self._tiles(m, n) * rows // expanded.TILE * expanded.APART
        return [x.new_empty(cells, dtype=torch.float32), arrivals(x, counters)]


def _stored(weights: Sequence[Stored]) -> list[Tensor]:
    return [
        one
        for weight in weights
        for one in (weight.values, weight.index[0], *([] if weight.scales is None else [weight.scales]))
    ]


def _words(matrix: Tensor) -> Tensor:
    """A matrix as words of 32 bits, with the four axes of a tensor map."""
    return matrix.view(torch.int32)[None, None]
