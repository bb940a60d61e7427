"""Tile sizes of a CPU kernel: what its schedule says, and what the vector extension allows.

Needed at each start, so it imports neither Jinja nor the templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from spgen.errors import UnsupportedError
from spgen.ir.config import Config
from spgen.ir.kernel import option
from spgen.ir.node import Op
from spgen.ir.register_tiles import usual_rows, usual_value_rows
from spgen.target import Target

DTYPES = ("float32", "bfloat16", "float16")
MAX_BLOCK = 96  # lanes or columns of a tile: what a worker keeps of each lies in arrays on its stack


@dataclass(frozen=True)
class Isa:
    """`lanes` fp32 values fill a vector register, of which there are `registers`.

    `block_m` is the best row tile, `rows` what the register tiles then have (0: as many as leave registers for the
    operands, beside `block_m // lanes` vectors). `x86` is the family of processors; `fma` whether they multiply and add
    in one step; `scalef` whether there are AVX-512's reduce and scaling by 2^n; `converts` whether fp16 is converted by
    an instruction; `pairs` whether pairs of bf16 are multiplied faster than fp32. `permutes` is the instruction that
    spreads a vector's floats: see weights/stored.ll.jinja.
    """

    lanes: int
    registers: int
    block_m: int
    rows: int = 0
    x86: bool = False
    fma: bool = True
    scalef: bool = False
    converts: bool = False
    pairs: bool = False
    permutes: str = ""


_ISAS = {
    "avx512_bf16": Isa(
        lanes=16, registers=32, block_m=64, x86=True, scalef=True, converts=True, pairs=True, permutes="expand"
    ),
    "avx512": Isa(lanes=16, registers=32, block_m=64, x86=True, scalef=True, converts=True, permutes="expand"),
    "avx2": Isa(lanes=8, registers=16, block_m=16, rows=6, x86=True, converts=True, permutes="permps"),
    "neon": Isa(lanes=4, registers=32, block_m=16, converts=True, permutes="tbl"),
    "rvv": Isa(lanes=4, registers=32, block_m=16),
    "sse2": Isa(lanes=4, registers=16, block_m=16, rows=3, x86=True, fma=False),
    "none": Isa(lanes=4, registers=16, block_m=8, fma=False),
}


def isa_of(target: Target) -> Isa:
    """The row of the target's vector extension; the narrowest for one that is not listed."""
    return _ISAS.get(target.isa, _ISAS["none"])


def default_tiles(target: Target) -> Config:
    """The configuration that was best where no other was measured."""
    isa = isa_of(target)
    options = (f"key_rows={isa.rows}", f"value_rows={isa.rows}") if isa.rows else ()
    return Config(isa.block_m, 64, options)


def check(kernel: Op, target: Target) -> None:
    """Raises UnsupportedError for what no CPU kernel does."""
    isa = isa_of(target)
    if kernel["dtype"] not in DTYPES:
        raise UnsupportedError("dtype on the CPU", given=kernel["dtype"], allowed=", ".join(DTYPES))
    for name in ("block_m", "block_n"):
        if kernel[name] % isa.lanes or not 0 < kernel[name] <= MAX_BLOCK:
            allowed = f"a multiple of {isa.lanes} up to {MAX_BLOCK}"
            raise UnsupportedError(f"schedule: {name}", given=kernel[name], allowed=allowed)
    if not 1 <= kernel["pack"] <= kernel["block_m"]:
        raise UnsupportedError("schedule: pack", given=kernel["pack"], allowed="1 to block_m")


def products(kernel: Op, isa: Isa, *, strided: bool) -> str:
    """What the matrix products multiply: "direct", "widened" or "pairs": see products.py.jinja."""
    if kernel["dtype"] == "float32":
        return "direct"
    in_pairs = kernel["dtype"] == "bfloat16" and isa.pairs and not strided and kernel["head_dim"] % 2 == 0
    return "pairs" if in_pairs else "widened"


def key_rows(kernel: Op, isa: Isa) -> int:
    """Keys of the register tile of K Q."""
    vectors = kernel["block_m"] // isa.lanes
    return option(kernel, "key_rows", usual_rows(kernel["block_n"], vectors, isa.registers))


def value_rows(kernel: Op, isa: Isa) -> int:
    """Channels of the register tile of V P."""
    vectors = kernel["block_m"] // isa.lanes
    return option(kernel, "value_rows", usual_value_rows(kernel["value_dim"], vectors, isa.registers))


def scratch_size(kernel: Op, target: Target) -> int:
    """fp32 values of memory for each worker: queries, output and scores of a tile, and keys and values of 16 bits."""
    rows = key_rows(kernel, isa_of(target))
    columns = -(-kernel["block_n"] // rows) * rows
    dims = kernel["head_dim"] + kernel["value_dim"]
    # pairs need less than what is widened
    staged = 0 if kernel["dtype"] == "float32" else rows * kernel["head_dim"] + kernel["block_n"] * kernel["value_dim"]
    return int((dims + columns) * kernel["block_m"] + staged)
