"""Tiles of a CPU kernel for products with sparse weights: what its schedule says, and the memory that it needs.

Needed at each start, so it imports neither Jinja nor the templates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spgen.errors import UnsupportedError
from spgen.ir.config import Config
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.ir.register_tiles import most_rows, usual_rows
from spgen.target import Target
from spgen.templates.tvm.schedule import DTYPES, Isa, isa_of

VALUES = (*DTYPES, "int8", "int4", "float8_e4m3fn")
WORD = 64  # columns of a word of bits
DOTS = {"blocks": 4, "n_of_m": 8, "bitmap": 8}  # rows of x up to which the features lie in the lanes
_MOST_DOTS = 16
_SAMPLED_ROWS = 128  # of g and x: both then lie in the nearer caches
_MOST_SAMPLED_ROWS = 4096
NEAR = 8192  # fp32 values that the nearest cache keeps
_REGISTERS = 4  # rows of x whose sums share a register tile of dot products


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    A task computes block_m rows of `outputs` columns of y: those of `units` block rows (block columns of transposed
    weights), or that many rows of other storages. It adds up steps of `depth` inputs: a block, or a segment of a row.
    `dots`: the inputs lie in the lanes and the sums are of vectors; otherwise the rows of x lie in the lanes.
    `direct`: weights are used as they lie in memory. `streams`: y may go past the caches, as the caller says.
    """

    lanes: int
    dots: bool
    block_m: int
    block_n: int
    units: int
    outputs: int
    depth: int
    weights: int
    direct: bool
    streams: bool

    @property
    def wide(self) -> int:
        """Outputs as whole vectors."""
        return _whole(self.outputs, self.lanes)

    @property
    def deep(self) -> int:
        """Depth as whole vectors."""
        return _whole(self.depth, self.lanes)

    @property
    def sums(self) -> int:
        """fp32 values of a task's sums for one weight."""
        return self.wide * self.block_m * (self.lanes if self.dots else 1)

    @property
    def panel(self) -> int:
        """fp32 values of a step's weights, where they are not used as they lie in memory."""
        return 0 if self.direct else (self.deep if self.dots else self.wide * self.deep)

    @property
    def scratch(self) -> int:
        """fp32 values of memory for each worker."""
        return self.weights * self.sums + self.panel + (0 if self.dots else self.lanes * self.wide)

    def padded(self, inputs: int) -> int:
        """The width of x as it is staged: whole steps, and vectors that begin at the last input of a step."""
        beyond = self.lanes if self.dots and self.depth % self.lanes else 0
        return _whole(_whole(inputs, self.depth) + beyond, 1 if self.dots else self.lanes)


def tiles_of(kernel: Op, target: Target) -> Tiles:
    """The tiles of a `linear` kernel."""
    isa = isa_of(target)
    r, c = kernel["rows"], kernel["cols"]
    dots = bool(option(kernel, "dots", 0))
    blocks = kernel["storage"] == "blocks"
    if blocks:
        height, depth = (c, r) if kernel["transposed"] else (r, c)
        units = max(1, isa.lanes // height)
        outputs = units * height
    else:
        segment = segment_of(kernel)
        units, outputs, depth = (1, segment, WORD) if kernel["transposed"] else (WORD, WORD, segment)
    return Tiles(
        lanes=isa.lanes, dots=dots, block_m=kernel["block_m"], block_n=kernel["block_n"], units=units, outputs=outputs,
        depth=depth, weights=2 if kernel["gated"] else 1,
        direct=blocks and (dots or (kernel["values"] == "float32" and not kernel["scales"])),
        streams=kernel["dtype"] == "float32" and not dots and outputs % isa.lanes == 0,
    )  # fmt: skip


def segment_of(kernel: Op) -> int:
    """Columns of a row that are expanded at a time: whole words and whole groups."""
    return math.lcm(WORD, kernel["cols"]) if kernel["storage"] == "n_of_m" else WORD


def expands(kernel: Op, isa: Isa) -> bool:
    """Whether full groups are expanded by vectors of bits: int4 only if each vector begins with a byte."""
    if kernel["values"] != "int4":
        return True
    n, m = kernel["rows"], kernel["cols"]
    return bool(isa.lanes % m == 0 and isa.lanes * n // m % 2 == 0)


def slots(kernel: Op, isa: Isa) -> bool:
    """Whether groups that are not full are, too: by a table for the bits of a byte, or of a vector."""
    return kernel["storage"] == "n_of_m" and expands(kernel, isa) and min(isa.lanes, 8) % kernel["cols"] == 0


def apart(isa: Isa) -> bool:
    """Whether groups that are full have a way of their own, an instruction."""
    return isa.permutes == "expand"


def halves(kernel: Op, isa: Isa) -> bool:
    """Whether half of each vector's columns hold values, which then choose from x by AVX-512: zeros cost nothing."""
    n, m = kernel["rows"], kernel["cols"]
    exact = kernel["storage"] == "n_of_m" and isa.lanes % m == 0 and m == 2 * n
    return exact and isa.scalef and bool(option(kernel, "dots", 0))


def picks(kernel: Op, isa: Isa) -> bool:
    """Whether the values of a group pick their rows of x by a table, so that zeros cost nothing."""
    n, m = kernel["rows"], kernel["cols"]
    small = kernel["storage"] == "n_of_m" and m in (2, 4, 8) and 2 * n <= m
    whole = kernel["values"] == "float32" or WORD // m * n % isa.lanes == 0
    return small and whole and not kernel["transposed"] and not option(kernel, "dots", 0)


def linear_tiles(m: int, storage: str, height: int, transposed: bool, target: Target) -> Config:
    """The configuration for `m` rows of x; `height` are the outputs of a block."""
    isa = isa_of(target)
    if not transposed and m <= DOTS[storage]:
        # one output at a time: weights are then read as they lie, which the processor foresees
        return Config(next(rows for rows in (1, 2, 3, 4, 6, 8) if rows >= m), 1, ("dots=1",))
    most = max(1, isa.block_m // isa.lanes)
    # each tile reads the weights, which takes about as long as the products of half a vector
    vectors = min(range(1, most + 1), key=lambda count: (-(-max(m, 1) // (count * isa.lanes)) * (count + 0.5), -count))
    outputs = usual_rows(height if storage == "blocks" else WORD, vectors, isa.registers)
    return Config(vectors * isa.lanes, outputs)


def dot_rows(block_m: int) -> int:
    """Rows of x in a register tile of dot products."""
    return max(rows for rows in range(1, _REGISTERS + 1) if block_m % rows == 0)


def check(kernel: Op, target: Target) -> None:
    """Raises UnsupportedError for what no CPU kernel does."""
    isa = isa_of(target)
    if kernel["dtype"] not in DTYPES:
        raise UnsupportedError("dtype on the CPU", given=kernel["dtype"], allowed=", ".join(DTYPES))
    if kernel["values"] not in VALUES:
        raise UnsupportedError("stored values on the CPU", given=kernel["values"], allowed=", ".join(VALUES))
    dots = option(kernel, "dots", 0)
    if dots and kernel["transposed"]:
        raise UnsupportedError("schedule: dots", given="of a transposed weight", allowed="dots=0")
    unit, most = (1, _MOST_DOTS) if dots else (isa.lanes, 8 * isa.lanes)
    if kernel["block_m"] % unit or not 0 < kernel["block_m"] <= most:
        raise UnsupportedError("schedule: block_m", given=kernel["block_m"], allowed=f"a multiple of {unit} to {most}")


def sampled_tiles() -> Config:
    """The configuration of gradients of stored blocks."""
    return Config(_SAMPLED_ROWS, 1)


def sampled_tile(kernel: Op, target: Target) -> tuple[int, int]:
    """Rows and vectors of the register tile of a `sampled` kernel."""
    isa = isa_of(target)
    most = max(1, isa.block_m // isa.lanes)
    vectors = min(most, -(-kernel["cols"] // isa.lanes))
    return most_rows(vectors, isa.registers), vectors


def sampled_scratch(kernel: Op, target: Target) -> int:
    """fp32 values of memory for each worker: the block's sums, and rows of g and x."""
    lanes = isa_of(target).lanes
    tall, wide = (_whole(kernel[name], lanes) for name in ("rows", "cols"))
    return int(kernel["rows"] * wide + kernel["block_m"] * (tall + wide))


def check_sampled(kernel: Op, target: Target) -> None:
    """Raises UnsupportedError for what no CPU kernel does."""
    if kernel["dtype"] not in DTYPES:
        raise UnsupportedError("dtype on the CPU", given=kernel["dtype"], allowed=", ".join(DTYPES))
    if kernel["values"] not in ("float32", kernel["dtype"]):
        allowed = " or ".join(dict.fromkeys(("float32", kernel["dtype"])))
        raise UnsupportedError("type of the gradient on the CPU", given=kernel["values"], allowed=allowed)
    if not 0 < kernel["block_m"] <= _MOST_SAMPLED_ROWS:
        allowed = f"1 to {_MOST_SAMPLED_ROWS}"
        raise UnsupportedError("schedule: block_m", given=kernel["block_m"], allowed=allowed)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
