"""What the Triton template of products with active neurons needs to know about a level-3 kernel.

`parameters` is also the contract with the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.templates.triton.attention import SMALLEST_TILE, Parameter
from spgen.templates.triton.bits import padded

MULTIPLY = 5  # rows to a list from which matrix units are used
LARGEST_TILE = 64  # rows of a tile
PARTS = 16  # shares whose sums are added up at once
FLAGS = "uint8"  # the dtype of scores that say no more than active or not


def multiplies(kernel: Op) -> bool:
    """Whether matrix units are used, on tiles of rows; else rows of x are multiplied one by one."""
    return int(kernel["rows"]) >= MULTIPLY


def parameters(kernel: Op) -> tuple[Parameter, ...]:
    """The arguments of the rendered kernel, in order; types are those of attention's, and "flags"."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(kernel))


def _parameters(kernel: Op) -> Iterator[tuple[str, str]]:
    """What changes from call to call first."""
    part, flags = kernel["part"], kernel["dtype"] == FLAGS
    if part in ("union", "compact"):
        yield "scores", "flags" if flags else "data"
        if part == "union":
            yield "active_of", "flags"
        else:
            yield from (("index", "*i32"), ("count", "*i32"))
        if not flags and not kernel["known"]:
            yield "threshold", "*fp32"
        yield from (("f", "size"), ("m", "i32"))
        if part == "union":
            yield "shared", "i32"
        if not flags:
            yield "scores_m", "step"
            if kernel["known"]:
                yield "threshold", "i32"
        return
    yield from (("x" if part == "up" else "h", "data"), ("w", "data"), ("index", "*i32"), ("count", "*i32"))
    if kernel["twofold"]:
        yield "w_gate", "data"
    if kernel["gated"]:
        yield "gate", "data"
    if kernel["bias"]:
        yield "bias", "data"
    if part == "up":
        yield "h", "data"
        yield from (("n_programs", "i32"), *_sizes(kernel), ("k", "size"), ("x_m", "step"))
        if kernel["gated"]:
            yield "gate_m", "step"
    else:
        yield from (("y", "data"), ("parts", "*fp32"), ("arrived", "*i32"))
        yield from (("splits", "i32"), *_sizes(kernel), ("d", "size"), ("h_m", "step"))


def _sizes(kernel: Op) -> Iterator[tuple[str, str]]:
    yield from (("f", "size"), ("m", "i32"))
    if multiplies(kernel):
        yield from (("tiles", "i32"), ("shared", "i32"))


def tile_of(rows: int) -> int:
    """Rows of x that a program takes, of `rows` that share a list."""
    return rows if rows < MULTIPLY else min(padded(rows, SMALLEST_TILE), LARGEST_TILE)


def symbols(kernel: Op) -> Mapping[str, Any]:
    """Every symbol of neurons.py.jinja; its head comment says what they are."""
    return {
        "text": str(kernel),
        "jit": "triton.jit",
        "parameters": parameters(kernel),
        **{
            name: kernel[name] for name in ("part", "rows", "positive", "known", "gated", "twofold", "bias", "gathered")
        },
        "flags": kernel["dtype"] == FLAGS,
        "activation": kernel["activation"],
        "multiplies": multiplies(kernel),
        "block_a": kernel["block_a"],
        "block_n": kernel["block_n"],
        "precision": ', input_precision="ieee"' if kernel["dtype"] == "float32" else "",
        "parts": PARTS,
        "stages": option(kernel, "stages", 3),
        "unroll": option(kernel, "unroll", 4),
    }
