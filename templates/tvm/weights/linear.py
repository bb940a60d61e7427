"""From level-3 products with sparse weights to the code that builds them with TVM."""

from __future__ import annotations

from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.render import render
from spgen.templates.tvm.schedule import Isa, isa_of
from spgen.templates.tvm.weights.schedule import check, dot_rows, expands, segment_of, tiles_of


def linear_source(kernel: Op, target: Target) -> str:
    """Python source whose `linear()` gives the PrimFunc of `kernel`.

    Raises UnsupportedError for a schedule or a type that the CPU's kernels do not have.
    """
    check(kernel, target)
    isa, tiles = isa_of(target), tiles_of(kernel, target)
    height = tiles.outputs // tiles.units if kernel["storage"] == "blocks" else tiles.outputs
    return render(
        "tvm/weights/linear.py.jinja",
        kernel=str(kernel),
        tiles=tiles,
        **{name: kernel[name] for name in ("storage", "rows", "cols", "transposed", "gated", "bias", "activation")},
        **{name: kernel[name] for name in ("dtype", "values", "scales")},
        segment=segment_of(kernel),
        expands=expands(kernel, isa),
        dot_rows=dot_rows(tiles.block_m),
        resident=height <= tiles.block_n and (not tiles.dots or dot_rows(tiles.block_m) == tiles.block_m),
        products="direct",
        helpers=_helpers(kernel["dtype"], kernel["values"], isa),
    )


def _helpers(dtype: str, values: str, isa: Isa) -> str:
    """The LLVM functions that the kernel calls."""
    lanes = isa.lanes
    text = render(
        "tvm/helpers.ll.jinja", lanes=lanes, scalef=isa.scalef, x86=isa.x86, fma="fma" if isa.fma else "fmuladd"
    )
    text += render("tvm/weights/stored.ll.jinja", lanes=lanes, dtype=values, converts=isa.converts, expands=isa.scalef)
    if dtype == "float32":
        return text
    return text + render("tvm/elements.ll.jinja", lanes=lanes, dtype=dtype, converts=isa.converts, pairs=False)
