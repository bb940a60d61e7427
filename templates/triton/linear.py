"""What the Triton template of products with sparse blocks needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton.attention import Parameter

LINEAR, FINISH, SAMPLED = "linear", "finish", "sampled"
FINISHED = 1024  # results of a program that adds up parts
SEARCHED = 1024  # block rows among which a program looks for its own at once
SMALLEST_TILE = 16  # of a matrix product, on either side
SMALLEST_ROWS = 8  # of x, where a tile's transpose is computed
_SMALLEST_PACKED = 32  # columns of x for pairs of int4, of which Triton 3.6 gives each of four lanes eight
_NEAR = 8


def padded(count: int, least: int = 1) -> int:
    """The power of two that holds a count."""
    return max(1 << (count - 1).bit_length(), least)


@dataclass(frozen=True)
class Shape:
    """How a kernel's tiles lie over the blocks.

    A block has `out` columns of y and takes `into` columns of x, which lie in `lanes`; a step takes `step` lanes: `per`
    blocks, or one of `pieces` of a block. A program makes `block_n` of a list's columns of y, one of `parts`; or, if
    blocks have few rows (`narrow`), those of `lists` lists.
    """

    out: int
    into: int
    block_n: int
    step: int
    narrow: bool

    @property
    def lanes(self) -> int:
        """Lanes for a block's columns of x."""
        return padded(self.into)

    @property
    def per(self) -> int:
        """Blocks in a step."""
        return max(self.step // self.lanes, 1)

    @property
    def pieces(self) -> int:
        """Steps in a block."""
        return max(-(-self.into // self.step), 1)

    @property
    def parts(self) -> int:
        """Programs that share a list."""
        return 1 if self.narrow else -(-self.out // self.block_n)

    @property
    def near(self) -> int:
        """Neighbouring columns of a block whose products a thread adds up: those of one load of 16 bytes."""
        return min(self.lanes, _NEAR)

    @property
    def lists(self) -> int:
        """Lists that a program serves."""
        return self.block_n // padded(self.out) if self.narrow else 1


def is_narrow(kernel: Op) -> bool:
    """Whether blocks have too few rows for matrix products, and x has few, too: products are added up one by one."""
    return kernel["height"] == "few" and not kernel["transposed"] and kernel["rows"] < SMALLEST_TILE


def is_summed(kernel: Op) -> bool:
    """Whether the products of a list are added up one by one, for each of a few rows of x."""
    few = kernel["height"] == "few" and not kernel["transposed"] and not is_narrow(kernel)
    return bool(few and kernel["block_m"] < SMALLEST_ROWS)


def is_turned(kernel: Op) -> bool:
    """Whether a tile of y is computed as its transpose: there matrix products take as few as eight rows of x."""
    few = kernel["height"] == "few" and not is_narrow(kernel) and not is_summed(kernel)
    return bool(few and kernel["block_m"] < SMALLEST_TILE)


def is_packed(values: str, transposed: bool) -> bool:
    """Whether both int4 values of a byte are unpacked together."""
    return values == "int4" and not transposed


def least_step(values: str, transposed: bool) -> int:
    """The fewest columns of x in a step: with fewer, lanes would hold the same ones, and sum them twice."""
    return _SMALLEST_PACKED if is_packed(values, transposed) else SMALLEST_TILE


def is_ordered(kernel: Op) -> bool:
    """Whether long lists come first. With few rows of x all programs run at the same time: to look up is to wait."""
    return kernel["height"] == "many" or is_narrow(kernel)


def shape_of(kernel: Op) -> Shape:
    """The tiles of a `linear` kernel."""
    out, into = kernel["rows"], kernel["cols"]
    if kernel["transposed"]:
        out, into = into, out
    narrow = is_narrow(kernel)
    block_n = max(kernel["block_n"], padded(out)) if narrow else min(kernel["block_n"], padded(out, SMALLEST_TILE))
    step = padded(option(kernel, "step", 64), least_step(kernel["values"], kernel["transposed"]))
    return Shape(out, into, block_n, step, narrow)


def splits(kernel: Op) -> int:
    """Programs that share the blocks of a list, and whose sums are added up by another kernel."""
    return option(kernel, "splits", 1)


def entries(kernel: Op) -> tuple[str, ...]:
    """The functions of the rendered module, in the order of their launches."""
    if kernel.kind == SAMPLED:
        return (SAMPLED,)
    return (LINEAR, FINISH) if splits(kernel) > 1 else (LINEAR,)


def weights(kernel: Op) -> tuple[str, ...]:
    """The weights' names, before their tensors'."""
    return ("gate", "up") if kernel["gated"] else ("w",)


def parameters(kernel: Op, entry: str) -> tuple[Parameter, ...]:
    """A function's arguments, in order; see spgen.backends.triton_program.Form for their types.

    "data" are tensors of the kernel's dtype, "values" of what is stored.
    """
    named = {LINEAR: _linear, FINISH: _finish, SAMPLED: _sampled}[entry]
    return tuple(Parameter(name, kind) for name, kind in named(kernel))


def stored(kernel: Op, name: str) -> Iterator[tuple[str, str]]:
    """The tensors of one weight."""
    yield f"{name}_values", "values"
    if kernel["scales"]:
        yield f"{name}_scales", "*fp32"
    yield from ((f"{name}_indptr", "*i32"), (f"{name}_indices", "*i32"))
    if kernel["transposed"]:
        yield f"{name}_blocks", "*i32"


def _linear(kernel: Op) -> Iterator[tuple[str, str]]:
    yield "x", "data"
    for name in weights(kernel):
        yield from stored(kernel, name)
    if is_ordered(kernel):
        yield "order", "*i32"
    if splits(kernel) > 1:
        yield "parts", "*fp32"
    else:
        yield from _results(kernel)
    yield from (("x_step", "step"), ("depth", "size"), ("width", "i32"), ("m", "i32"), ("lists", "i32"))
    yield "group", "i32"


def _results(kernel: Op) -> Iterator[tuple[str, str]]:
    if kernel["bias"]:
        yield "bias", "data"
    yield "y", "data"


def _finish(kernel: Op) -> Iterator[tuple[str, str]]:
    yield "parts", "*fp32"
    yield from _results(kernel)
    yield from (("width", "i32"), ("results", "i64"))


def _sampled(kernel: Op) -> Iterator[tuple[str, str]]:
    yield from (("g", "data"), ("x", "data"), ("indptr", "*i32"), ("indices", "*i32"), ("out", "values"))
    yield from (("g_step", "step"), ("x_step", "step"), ("width", "size"), ("depth", "size"), ("m", "i32"))
    yield "lists", "i32"


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of linear.py.jinja; its head comment says what they are."""
    shape = shape_of(kernel)
    return {
        "text": str(kernel).splitlines(),
        "parameters": {entry: parameters(kernel, entry) for entry in entries(kernel)},
        "stored": {name: [one for one, _ in stored(kernel, name)] for name in weights(kernel)},
        "shape": shape,
        "block_m": kernel["block_m"],
        "splits": splits(kernel),
        "few": kernel["height"] == "few",
        "ordered": is_ordered(kernel),
        "summed": is_summed(kernel),
        "turned": is_turned(kernel),
        "packed": is_packed(kernel["values"], kernel["transposed"]),
        "stages": option(kernel, "stages", 2),
        "finished": FINISHED,
        "precision": precision(kernel),
        **{name: kernel[name] for name in (
            "rows", "cols", "values", "scales", "transposed", "gated", "bias", "activation", "dtype",
        )},
    }  # fmt: skip


def precision(kernel: Op) -> str:
    """Of products of float32: "tf32x3" or "ieee"."""
    return "tf32x3" if option(kernel, "tf32x3", 0) else "ieee"


def sampled_tile(kernel: Op) -> tuple[int, int, int]:
    """Rows and columns of a tile of a `sampled` kernel, and the blocks that lie side by side in it."""
    columns = padded(option(kernel, "columns", 128), SMALLEST_TILE)
    per = max(columns // padded(kernel["cols"]), 1)
    return min(option(kernel, "rows", 128), padded(kernel["rows"], SMALLEST_TILE)), columns, per


def sampled_symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of sampled.py.jinja; its head comment says what they are."""
    tile_rows, tile_columns, per = sampled_tile(kernel)
    return {
        "text": str(kernel).splitlines(),
        "parameters": {SAMPLED: parameters(kernel, SAMPLED)},
        "block_m": kernel["block_m"],
        "rows": kernel["rows"],
        "cols": kernel["cols"],
        "tile_rows": tile_rows,
        "tile_columns": tile_columns,
        "per": per,
        "lanes": padded(kernel["cols"]),
        "row_parts": -(-kernel["rows"] // tile_rows),
        "column_parts": -(-kernel["cols"] // tile_columns) if per == 1 else 1,
        "searched": SEARCHED,
        "stages": option(kernel, "stages", 2),
        "precision": precision(kernel),
        "dtype": kernel["dtype"],
    }
