"""What the Gluon template of 2:4 products that expand weights in registers needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher. Values and bits are words of 32 bits; `k` counts pairs of columns.
Where x comes in parts of float8 (`parts_of_x`), `k` counts columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spgen.ir.kernel import FLOAT8, option
from spgen.ir.node import Op
from spgen.templates.gluon.linear import ELEMENTS, WARPGROUPS
from spgen.templates.gluon.two_of_four import ARRANGE, LINEAR, WORDS
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.bits import halvings, sides

ENTRIES = (ARRANGE, LINEAR)
TILE = 64  # rows of weights that a warpgroup multiplies
STEP = 256  # columns of values that are widened, and of those of 16 bits
SPLITS = "splits"  # the option by which programs share tiles
APART = 32  # counters, a line of the cache
ARRANGED = 4  # steps of a row of x that a program of `arrange` writes
ARRANGED_WARPS = 16  # of a program that takes a row apart
_BOX = 32  # words of a row that lie side by side in shared memory
_FLOAT8_HOLDS = (FLOAT8, "int4")
_PARTED = 64  # columns of sums, of x that comes in parts: the latest of both parts are kept beside them
_X_BYTES = 96 * 2**10  # of shared memory for x, beside one weight of 16 bits; beside more two thirds
_REGISTERS = {1: 232, 2: 232, 3: 152, 4: 112}  # by warpgroups
_TWO_CAP, _TWO_REGISTERS = 80, 96  # of three warpgroups, of which two multiply; two programs to a multiprocessor
_QUARTER = 128  # bytes of a row of x


def expresses(kernel: Op) -> bool:
    """Whether this form can serve a kernel: 2:4 values, 8 to 256 rows of x in a tile.

    A consumer frees nothing before it has a step of each weight, and as many quarters of x as it takes together.
    """
    stored = (kernel["storage"], kernel["rows"], kernel["cols"]) == ("n_of_m", 2, 4) and not kernel["transposed"]
    values = kernel["values"] == kernel["dtype"] or (kernel["scales"] and kernel["dtype"] == "bfloat16")
    if not (stored and values and kernel["dtype"] in ELEMENTS):
        return False
    rows, least = int(kernel["block_m"]), 8 // parts(kernel)
    deep = stages(kernel) >= len(sides(kernel)) and x_stages(kernel) >= together(kernel)
    return deep and least <= rows <= 256 and rows & (rows - 1) == 0


def parts_of_x(values: str, sums: int) -> int:
    """Of how many float8 numbers each of x is the sum; 1: x is as it is.

    Two of them, the second of what the first leaves, hold the eight bits of bf16, and values that float8 holds exactly
    are not widened. `sums` are columns of sums: rows of x for each weight.
    """
    return 2 if values in _FLOAT8_HOLDS and sums <= _PARTED else 1


def parts(kernel: Op) -> int:
    """Likewise for a kernel."""
    return parts_of_x(kernel["values"], int(kernel["block_m"]) * len(sides(kernel)))


def taken(kernel: Op) -> str:
    """The type of x as it is multiplied."""
    return FLOAT8 if parts(kernel) > 1 else str(kernel["dtype"])


def arranging_warps(kernel: Op) -> int:
    """Of a program of `arrange`."""
    return ARRANGED_WARPS if parts(kernel) > 1 else 4


def step(kernel: Op) -> int:
    """Columns of a step: twice as many of float8."""
    return STEP * parts(kernel)


def words(kernel: Op) -> int:
    """32-bit words of a thread's values of a quarter of a row of a step."""
    return WORDS[kernel["values"]] * parts(kernel)


def box(kernel: Op) -> int:
    """Words of a row of values in a box."""
    return min(words(kernel) * 16, _BOX)


def boxes(kernel: Op) -> int:
    """Boxes of values in a step."""
    return words(kernel) * 16 // box(kernel)


def rows(kernel: Op) -> int:
    """Of weights, of a program."""
    return TILE * option(kernel, WARPGROUPS, 2)


def stages(kernel: Op) -> int:
    """Steps of weights on their way."""
    return option(kernel, "stages", 3)


def together(kernel: Op) -> int:
    """Quarters of x that are multiplied at once."""
    return min(option(kernel, "together", 1), 4 // boxes(kernel), 4 // option(kernel, "shares", 1))


def x_stages(kernel: Op) -> int:
    """Quarters of x on their way. Of several shares each has slots of its own: its warps know no other's phases."""
    alone = kernel["values"] == kernel["dtype"] and not kernel["gated"] and option(kernel, "shares", 1) == 1
    room = _X_BYTES if alone else _X_BYTES * 2 // 3
    fitting = max(min(room // (parts(kernel) * int(kernel["block_m"]) * _QUARTER), 12), 3)
    count = option(kernel, "x_stages", fitting)
    return count if option(kernel, "shares", 1) == 1 else max(count // 4 * 4, 4)


def shown(kernel: Op) -> dict[str, tuple[int, int]]:
    """By descriptor, rows and columns of what it moves at once."""
    moved: dict[str, tuple[int, int]] = {}
    for side in sides(kernel):
        moved |= {
            f"values_{side}_tiles": (rows(kernel), box(kernel)),
            f"bits_{side}_tiles": (rows(kernel), step(kernel) // 32),
        }
    return moved | {"arranged_tiles": (parts(kernel) * int(kernel["block_m"]), step(kernel) // 4)}


def programs(kernel: Op) -> int:
    """To a multiprocessor: 1, or 2 of one warpgroup."""
    return option(kernel, "programs", 1)


def cap(kernel: Op) -> int:
    """Registers of a thread at the start; 0: what fits."""
    return _TWO_CAP if programs(kernel) == 2 else 0


def parameters(kernel: Op, entry: str) -> tuple[Parameter, ...]:
    """The arguments of a rendered kernel, in order; tensors first, as they change from call to call."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel, entry))


def _parameters(kernel: Op, entry: str) -> Iterator[tuple[str, str]]:
    if entry == ARRANGE and parts(kernel) > 1:
        yield from (("x", "data"), ("arranged", "x"), ("factors", "*fp32"))
        yield from (("k", "size"), ("steps", "i32"), ("x_m", "step"))
        return
    if entry == ARRANGE:
        yield from (("x", "*i32"), ("arranged", "*i32"), ("k", "i32"), ("steps", "i32"), ("x_m", "i64"))
        return
    yield "arranged", "x"
    if parts(kernel) > 1:
        yield "factors", "*fp32"
    for side in sides(kernel):
        yield from ((f"values_{side}", "*i32"), (f"bits_{side}", "*i32"))
        if kernel["scales"]:
            yield f"scales_{side}", "*fp32"
    if kernel["bias"]:
        yield "bias", "data"
    yield "y", "data"
    if option(kernel, SPLITS, 0):
        yield from (("parts", "*fp32"), ("arrived", "*i32"))
    yield from ((name, "desc") for name in shown(kernel))
    yield from (("n", "i32"), ("steps", "i32"), ("m", "i32"))


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of expanded.py.jinja; its head comment says what they are."""
    block_m = int(kernel["block_m"])
    return {
        "text": str(kernel),
        "jit": "gluon.jit",
        "parameters": {entry: parameters(kernel, entry) for entry in ENTRIES},
        "x_parts": parts(kernel),
        "words": words(kernel),
        "values": kernel["values"],
        "element": ELEMENTS[kernel["dtype"]],
        "scales": kernel["scales"],
        "bias": kernel["bias"],
        "activation": kernel["activation"],
        "sides": sides(kernel),
        "block_m": block_m,
        "warpgroups": option(kernel, WARPGROUPS, 2),
        "stages": stages(kernel),
        "x_stages": x_stages(kernel),
        "boxes": boxes(kernel),
        "box": box(kernel),
        "near": 4 // boxes(kernel),
        "together": together(kernel),
        "shares": option(kernel, "shares", 1),
        "registers": _TWO_REGISTERS
        if programs(kernel) == 2
        else _REGISTERS[option(kernel, WARPGROUPS, 2) * option(kernel, "shares", 1)],
        "arranged": 512 * ARRANGED_WARPS,
        "halvings": halvings,
        "early": False,
        "splits": option(kernel, SPLITS, 0),
        "apart": APART,
        "parts_at_once": max(min(64 // (block_m * (1 + kernel["gated"])), 4), 1),
    }
