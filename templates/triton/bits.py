"""What the Triton template of products with n-of-m and bitmap weights needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton.attention import Parameter

LINEAR, UNPACK = "linear", "unpack"
UNIT = 8  # columns that a byte of bits speaks of; all tiles count in them
UNPACK_UNITS = 256  # of a row that a program of `unpack` writes
_WIDTHS = (2, 4, 8, 16, 32, 64)  # of groups that units hold whole, or that hold whole units in a word
_CHAIN = 4  # values of a group that are chosen by comparison; of more, each is read where it lies


def padded(count: int, least: int = 1) -> int:
    """The power of two that holds a count."""
    return max(1 << (count - 1).bit_length(), least)


def serves(kernel: Op) -> bool:
    """Whether the template reads this storage: groups of a power of two columns up to 64, and bitmaps."""
    return kernel["storage"] == "bitmap" or (kernel["storage"] == "n_of_m" and kernel["cols"] in _WIDTHS)


def entry_of(kernel: Op) -> str:
    """The one function of the rendered module, as products of many rows have tiles that `linear` must not take."""
    unpacks = kernel["transposed"] or option(kernel, "dense", 0) or option(kernel, "cusparselt", 0)
    return UNPACK if unpacks or not serves(kernel) else LINEAR


def is_scaled(kernel: Op) -> bool:
    """Whether `unpack` multiplies by the scales; those of y's columns are left to the products' sums."""
    return bool(kernel["scales"] and kernel["transposed"])


def values_of_unit(kernel: Op) -> int:
    """How many values a unit's groups have room for; 0 where they are read one by one."""
    n, m = kernel["rows"], kernel["cols"]
    if kernel["storage"] == "bitmap" or m > UNIT or n > _CHAIN or n & (n - 1):
        return 0
    room = n * UNIT // m
    return room if kernel["values"] != "int4" or room > 1 else 0


def parameters(kernel: Op, entry: str) -> tuple[Parameter, ...]:
    """The arguments of a rendered kernel, in order; types are those of attention's, and pointers to "values".

    Tensors first: they change from call to call.
    """
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel, entry))


def _parameters(kernel: Op, entry: str) -> Iterator[tuple[str, str]]:
    if entry == LINEAR:
        yield "x", "data"
    for side in sides(kernel) if entry == LINEAR else (0,):
        yield f"values_{side}", "values"
        yield from ((name, kind) for name, kind in _index(kernel, side))
        if kernel["scales"] if entry == LINEAR else is_scaled(kernel):
            yield f"scales_{side}", "*fp32"
    if entry == LINEAR and kernel["bias"]:
        yield "bias", "data"
    yield "y", "data"
    yield from (("n", "i32"), ("k", "size"), ("n_units", "size"))
    if entry == LINEAR:
        yield from (("m", "i32"), ("x_m", "step"))


def _index(kernel: Op, side: int) -> Iterator[tuple[str, str]]:
    yield f"bits_{side}", "*u8"
    if kernel["storage"] == "bitmap":
        yield f"offsets_{side}", "*i32"


def sides(kernel: Op) -> tuple[int, ...]:
    """The weights: gate and up, or one."""
    return (0, 1) if kernel["gated"] else (0,)


def halvings(count: int) -> tuple[list[tuple[str, int, str, str]], list[str]]:
    """How a tile whose last axis has `count` places falls into planes: steps (tile, places left, even, odd), and names.

    A step parts even from odd places, so names come in another order than they are made.
    """
    steps, known = [], {(0, 1): "tile"}
    while len(known) < count:
        stride = len(known)
        for (first, _), name in list(known.items()):
            even, odd = f"tile_{first}_{2 * stride}", f"tile_{first + stride}_{2 * stride}"
            steps.append((name, count // stride // 2, even, odd))
            del known[first, stride]
            known |= {(first, 2 * stride): even, (first + stride, 2 * stride): odd}
    return steps, [known[first, count] for first in range(count)]


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of bits.py.jinja; its head comment says what they are."""
    warps = option(kernel, "warps", 4)
    bitmap = kernel["storage"] == "bitmap"
    return {
        "text": str(kernel),
        "jit": "triton.jit",
        "entry": entry_of(kernel),
        "parameters": parameters(kernel, entry_of(kernel)),
        "bitmap": bitmap,
        "n": kernel["rows"],
        "group": 64 if bitmap else kernel["cols"],
        "room": values_of_unit(kernel),
        "nibbles": kernel["values"] == "int4",
        "scales": kernel["scales"],
        "bias": kernel["bias"],
        "activation": kernel["activation"],
        "sides": sides(kernel),
        "block_m": kernel["block_m"],
        "block_n": kernel["block_n"],
        "units": 32 * warps,
        "halvings": halvings,
        "unpack_units": UNPACK_UNITS,
        "scaled": is_scaled(kernel),
    }
