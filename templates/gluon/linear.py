"""What the Gluon template of products with sparse blocks needs to know about a level-3 kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.linear import LINEAR, stored, weights

WARPGROUPS = "warpgroups"  # the option that asks for this form: those that multiply, beside a warp that brings tiles
ELEMENTS = {"bfloat16": "bfloat16", "float16": "float16"}
LANES = 64  # of a box: 128 bytes, which lie side by side in shared memory
WIDEST = 128  # columns of y that a warpgroup keeps in registers
SLOTS = 2  # tiles that are known at a time
PAIRED = "paired"  # the option by which a tile has the columns of two lists, see spgen/weights/pairs.py


def expresses(kernel: Op) -> bool:
    """Whether this form can serve a kernel: sides of blocks are powers of two from 16 on, values the call's type.

    A warpgroup multiplies 64 rows of x at least.
    """
    sides = (kernel["rows"], kernel["cols"])
    return (
        kernel["storage"] == "blocks"
        and kernel["height"] == "many"
        and kernel["dtype"] in ELEMENTS
        and kernel["values"] == kernel["dtype"]
        and not kernel["scales"]
        and kernel["block_m"] >= 64 * option(kernel, WARPGROUPS, 1)
        and all(side >= 16 and side & (side - 1) == 0 for side in sides)
        and not (paired(kernel) and (kernel["gated"] or not width(kernel) == sides_of(kernel)[0] <= WIDEST // 2))
    )


def paired(kernel: Op) -> bool:
    """Whether lists come by twos, with a block's columns of y each."""
    return bool(option(kernel, PAIRED, 0))


def sides_of(kernel: Op) -> tuple[int, int]:
    """A block's columns of y, and of x."""
    return (kernel["cols"], kernel["rows"]) if kernel["transposed"] else (kernel["rows"], kernel["cols"])


def width(kernel: Op) -> int:
    """Columns of y in a tile."""
    return int(min(sides_of(kernel)[0], kernel["block_n"], WIDEST))


def lanes(kernel: Op) -> int:
    """Columns of x in a box."""
    return min(sides_of(kernel)[1], LANES)


def per(kernel: Op) -> int:
    """Blocks that a step takes."""
    return max(option(kernel, "step", LANES) // lanes(kernel), 1) if lanes(kernel) < LANES else 1


def layout_of(columns: int) -> str:
    """How rows of so many elements of two bytes lie in shared memory, as a tensor descriptor's type says it."""
    return f"NVMMASharedLayout(swizzle_byte_width={min(2 * columns, 128)}, element_bitwidth=16, rank=4)"


def boxes(kernel: Op) -> dict[str, tuple[int, int]]:
    """By descriptor, rows and columns of what it moves at once."""
    one = (lanes(kernel), width(kernel)) if kernel["transposed"] else (width(kernel), lanes(kernel))
    moved = {"x_blocks": (kernel["block_m"], lanes(kernel))}
    moved |= {f"{name}_tiles": one for name in weights(kernel)}
    return moved | {"y_blocks": (kernel["block_m"] // option(kernel, WARPGROUPS, 2), width(kernel))}


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The kernel's arguments, in order."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    yield "x", "data"
    if paired(kernel):
        yield from (
            ("w_values", "values"),
            ("lists_of", "*i32"),
            ("bounds", "*i32"),
            ("columns", "*i32"),
            ("places", "*i32"),
        )
    else:
        for name in weights(kernel):
            yield from stored(kernel, name)
        yield "order", "*i32"
    if kernel["bias"]:
        yield "bias", "data"
    yield from (("y", "data"), ("tickets", "*i32"))
    yield from ((name, "desc") for name in boxes(kernel))
    yield from ((name, "i32") for name in ("width", "m", "lists", "group", "n_tickets"))


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of linear.py.jinja; its head comment says what they are."""
    out, into = sides_of(kernel)
    return {
        "text": str(kernel).splitlines(),
        "parameters": parameters(kernel),
        "weights": weights(kernel),
        "element": ELEMENTS[kernel["dtype"]],
        "block_m": kernel["block_m"],
        "warpgroups": option(kernel, WARPGROUPS, 2),
        "stages": option(kernel, "stages", 3),
        "slots": SLOTS,
        "out": out,
        "into": into,
        "width": width(kernel),
        "lanes": lanes(kernel),
        "per": per(kernel),
        "paired": paired(kernel),
        "pieces": max(into // LANES, 1),
        "parts": out // width(kernel),
        "entry": LINEAR,
        **{name: kernel[name] for name in ("transposed", "gated", "bias", "activation")},
    }
