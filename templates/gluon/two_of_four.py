"""What the Gluon template of 2:4 products on sparse tensor cores needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher. x, values and bits are words of 32 bits there: pairs of 16-bit
values, 8 groups' bits; `k` counts pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.bits import halvings, sides

LINEAR, ARRANGE = "linear", "arrange"
ROWS = 8  # of x in a tile
TILE = 16  # rows of weights
DIRECT = 2  # rows of x, up to which threads read it as it lies
_HALVES = {"bfloat16": "bf16", "float16": "f16"}
WORDS = {"bfloat16": 4, "float16": 4, "float8_e4m3fn": 2, "int8": 2, "int4": 1}


def tiles(kernel: Op) -> int:
    """Tiles of 8 rows of x."""
    return -(-int(kernel["block_m"]) // ROWS)


def entries(kernel: Op) -> tuple[str, ...]:
    """The functions of the rendered module, in the order of their launches."""
    return (LINEAR,) if is_direct(kernel) else (ARRANGE, LINEAR)


def is_direct(kernel: Op) -> bool:
    """Whether threads read x as it lies, which takes as long for each row."""
    return int(kernel["block_m"]) <= DIRECT


def parameters(kernel: Op, entry: str) -> tuple[Parameter, ...]:
    """The arguments of a rendered kernel, in order; tensors first, as they change from call to call."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel, entry))


def _parameters(kernel: Op, entry: str) -> Iterator[tuple[str, str]]:
    if entry == ARRANGE:
        yield from (("x", "*i32"), ("arranged", "*i32"), ("m", "i32"), ("k", "i32"), ("x_m", "i64"))
        return
    yield "x", "*i32"
    for side in sides(kernel):
        yield from ((f"values_{side}", "*i32"), (f"bits_{side}", "*i32"))
        if kernel["scales"]:
            yield f"scales_{side}", "*fp32"
    if kernel["bias"]:
        yield "bias", "data"
    yield from (("y", "data"), ("n", "i32"), ("k", "i32"), ("n_units", "i32"), ("m", "i32"), ("x_m", "i64"))


def shape(kernel: Op) -> tuple[int, int, int]:
    """Row tiles of a warp; warps beside each other on rows, and on columns."""
    warps_n = option(kernel, "warps_n", 1)
    return kernel["block_n"] // (TILE * warps_n), warps_n, option(kernel, "warps", 4) // warps_n


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of two_of_four.py.jinja; its head comment says what they are."""
    row_tiles, warps_n, warps_k = shape(kernel)
    return {
        "text": str(kernel),
        "jit": "gluon.jit",
        "parameters": {entry: parameters(kernel, entry) for entry in entries(kernel)},
        "words": WORDS[kernel["values"]],
        "values": kernel["values"],
        "half": _HALVES[kernel["dtype"]],
        "scales": kernel["scales"],
        "bias": kernel["bias"],
        "activation": kernel["activation"],
        "sides": sides(kernel),
        "tiles": tiles(kernel),
        "direct": is_direct(kernel),
        "row_tiles": row_tiles,
        "warps_n": warps_n,
        "warps_k": warps_k,
        "steps": option(kernel, "steps", 4),
        "halvings": halvings,
        "early": False,
    }
