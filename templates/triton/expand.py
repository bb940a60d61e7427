"""What the Triton template of few rows times n-of-m and bitmap weights on tensor cores needs to know about a kernel.

Its function and its arguments are those of templates/triton/bits.py's `linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton import bits
from spgen.templates.triton.bits import LINEAR, parameters, sides

COLUMNS = 4  # of a row that a thread takes at once
HALVES = {"bfloat16": "bf16", "float16": "f16"}
_PER_WORD = {"bfloat16": 2, "float16": 2, "int8": 4, "float8_e4m3fn": 4, "int4": 8}


def serves(dtype: str, storage: str, rows: int, cols: int) -> bool:
    """Whether the template takes x of this dtype and this storage, but for all of 2:2, whose zeros have no place."""
    return dtype in HALVES and bits.serves(storage, cols) and (rows, cols) != (2, 2)


def room(kernel: Op) -> int:
    """The most values that four columns of a row can have."""
    n, m = kernel["rows"], kernel["cols"]
    if kernel["storage"] == "bitmap":
        return COLUMNS
    return int(n * COLUMNS // m if m <= COLUMNS else min(n, COLUMNS))


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of expand.py.jinja; its head comment says what they are."""
    bitmap = kernel["storage"] == "bitmap"
    group = 64 if bitmap else kernel["cols"]
    return {
        "text": str(kernel),
        "jit": "triton.jit",
        "parameters": parameters(kernel, LINEAR),
        "bitmap": bitmap,
        "n": kernel["rows"],
        "group": group,
        "room": room(kernel),
        "word": max(group, 32),
        "values": kernel["values"],
        "per": _PER_WORD[kernel["values"]],
        "half": HALVES[kernel["dtype"]],
        "scales": kernel["scales"],
        "bias": kernel["bias"],
        "activation": kernel["activation"],
        "sides": sides(kernel),
        "block_m": kernel["block_m"],
        "block_n": kernel["block_n"],
        "units": 32 * option(kernel, "warps", 4),
    }
