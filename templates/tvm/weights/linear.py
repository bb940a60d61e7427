"""From level-3 products with sparse weights to the code that builds them with TVM."""

from __future__ import annotations

from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.render import render
from spgen.templates.tvm.schedule import Isa, isa_of
from spgen.templates.tvm.weights.schedule import (
    NEAR,
    apart,
    check,
    check_sampled,
    dot_rows,
    expands,
    halves,
    picks,
    sampled_scratch,
    sampled_tile,
    segment_of,
    slots,
    tiles_of,
)

_SHIFTED = {"int4": 8, "int8": 4}  # values of a word
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int4": 4}  # of stored values, else 8


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
        value_bits=_BITS.get(kernel["values"], 8),
        expands=expands(kernel, isa),
        slots=slots(kernel, isa),
        apart=apart(isa),
        halves=halves(kernel, isa),
        picks=picks(kernel, isa),
        near=NEAR,
        dot_rows=dot_rows(tiles.block_m),
        resident=height <= tiles.block_n and (not tiles.dots or dot_rows(tiles.block_m) == tiles.block_m),
        products="direct",
        helpers=_helpers(kernel["dtype"], isa) + _stored(kernel, isa),
    )


def sampled_source(kernel: Op, target: Target) -> str:
    """Likewise, with `sampled()`, for the gradient of stored blocks."""
    check_sampled(kernel, target)
    isa = isa_of(target)
    tile_rows, tile_vectors = sampled_tile(kernel, target)
    return render(
        "tvm/weights/sampled.py.jinja",
        kernel=str(kernel),
        lanes=isa.lanes,
        **{name: kernel[name] for name in ("block_m", "rows", "cols", "dtype", "values")},
        tile_rows=tile_rows,
        tile_vectors=tile_vectors,
        scratch=sampled_scratch(kernel, target),
        products="direct",
        helpers=_helpers(kernel["dtype"], isa),
    )


def _helpers(dtype: str, isa: Isa) -> str:
    """The LLVM functions for operations on vectors, and for elements of x and y."""
    text = render(
        "tvm/helpers.ll.jinja", lanes=isa.lanes, scalef=isa.scalef, x86=isa.x86, fma="fma" if isa.fma else "fmuladd"
    )
    if dtype == "float32":
        return text
    return text + render("tvm/elements.ll.jinja", lanes=isa.lanes, dtype=dtype, converts=isa.converts, pairs=False)


def _stored(kernel: Op, isa: Isa) -> str:
    """Those for stored values."""
    whole = kernel["storage"] == "n_of_m" and isa.lanes % kernel["cols"] == 0
    each = isa.lanes // kernel["cols"] * kernel["rows"] if whole and expands(kernel, isa) else 0
    permutes = _permutes(kernel["values"], isa, each)
    wanted = slots(kernel, isa) or (kernel["storage"] != "blocks" and expands(kernel, isa) and not apart(isa))
    return render(
        "tvm/weights/stored.ll.jinja",
        lanes=isa.lanes,
        dtype=kernel["values"],
        converts=isa.converts,
        apart=apart(isa) and kernel["storage"] != "blocks" and expands(kernel, isa),
        permutes=permutes,
        spread=_spread(kernel, permutes, min(isa.lanes, 8), each) if wanted else [],
        padded=kernel["storage"] == "bitmap",
        halves=halves(kernel, isa),
        places=_places(kernel) if picks(kernel, isa) else [],
        each=each,
    )


def _permutes(values: str, isa: Isa, each: int) -> str:
    """What spreads a vector's values, of which there are `each` (0: any number): see stored.ll.jinja."""
    fits = each and each < _SHIFTED.get(values, 0)  # in a word, with a zero behind them
    return "shl" if fits and isa.permutes != "expand" else isa.permutes


def _spread(kernel: Op, permutes: str, lanes: int, each: int) -> list[list[int]]:
    """By the bits of a mask, what its values need to come into the lanes of those bits, a row of bytes.

    The number of each lane's value; for NEON those of its bytes; for shifts how far it is from the top of a word.
    Groups that are not full have zeros behind their values. Blanks have the number of a value that is zero, if there
    is one for sure, else -1.
    """
    in_word = _SHIFTED.get(kernel["values"], 0)
    zero = lanes - 1 if 0 < each < lanes and permutes in ("permps", "") else -1
    blank = in_word - 1 if permutes == "shl" else zero
    n, m = (kernel["rows"], kernel["cols"]) if each else (lanes, lanes)

    def number(mask: int, lane: int) -> int:
        group = lane // m
        return group * n + (mask % 2**lane >> group * m).bit_count() if mask >> lane & 1 else blank

    rows = [[number(mask, lane) for lane in range(lanes)] for mask in range(2**lanes)]
    if permutes == "shl":
        return [[32 // in_word * (in_word - 1 - place) for place in row] for row in rows]
    if permutes == "tbl":
        return [[-1 if place < 0 else 4 * place + byte for place in row for byte in range(4)] for row in rows]
    return rows


def _places(kernel: Op) -> list[int]:
    """By the bits of a group, where in a segment of x its values' rows are, 16 bits each."""
    n, m, tall = kernel["rows"], kernel["cols"], kernel["block_m"]
    columns = [[column for column in range(m) if bits >> column & 1][:n] for bits in range(2**m)]
    return [sum(column * tall << 16 * e for e, column in enumerate(some)) for some in columns]
