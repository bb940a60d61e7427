"""What the Gluon template that walks bitmaps needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher. Stored values are integers of their size there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.bits import sides

LANES = 32
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}  # bytes of a stored value


def rows(kernel: Op) -> int:
    """Rows of weights that a program takes: as many for each warp."""
    warps = option(kernel, "warps", 16)
    return -(-int(kernel["block_n"]) // warps) * warps


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The arguments in order; tensors first, as they change from call to call."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    yield "x", "data"
    for side in sides(kernel):
        yield from ((f"values_{side}", "values"), (f"words_{side}", "*i64"), (f"offsets_{side}", "*i32"))
        if kernel["scales"]:
            yield f"scales_{side}", "*fp32"
    if kernel["bias"]:
        yield "bias", "data"
    yield from (("y", "data"), ("n", "i32"), ("k", "size"), ("m", "i32"), ("x_m", "step"))


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of walk.py.jinja; its head comment says what they are."""
    warps = option(kernel, "warps", 16)
    staged = max(option(kernel, "words", 64), LANES)
    places = product(range(staged // LANES), range(rows(kernel) // warps), sides(kernel))
    return {
        "text": str(kernel),
        "jit": "gluon.jit",
        "parameters": parameters(kernel),
        "values": kernel["values"],
        "size": SIZES[kernel["values"]],
        "scales": kernel["scales"],
        "bias": kernel["bias"],
        "activation": kernel["activation"],
        "sides": sides(kernel),
        "block_m": kernel["block_m"],
        "warps": warps,
        "rows": rows(kernel) // warps,
        "staged": staged,
        "parts": [(*place, "_".join(map(str, place))) for place in places],
    }
