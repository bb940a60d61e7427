"""How products with sparse blocks run on GPUs unless a record says otherwise.

| option | meaning |
|---|---|
| `step` | columns of x that a step takes: of several blocks, or of a part of one |
| `stages` | steps on their way |
| `warps` | of a program |
| `splits` | programs that share a list's blocks; their sums are added up by a second kernel |
| `warpgroups` | those that multiply in Hopper's own form; without it plain Triton serves |
| `paired` | 1, of those: lists by twos, which share tiles of x |
| `group` | row tiles that come together; without it as many as the cache holds |
| `tf32x3` | 1: products of float32 as three of tf32, else by plain arithmetic |
| `rows`, `columns` | of a tile of the gradient |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spgen.backends.triton_bits import default_config as bits_config
from spgen.backends.triton_compile import ELEMENT_BYTES
from spgen.ir.config import Config
from spgen.settings import settings
from spgen.target import Target
from spgen.templates.gluon.linear import ELEMENTS, LANES, PAIRED, WARPGROUPS, WIDEST
from spgen.templates.triton.linear import SMALLEST_ROWS, SMALLEST_TILE, least_step, padded

if TYPE_CHECKING:
    from spgen.weights.compile import Request, Sizes

_BY_TWOS = 32  # columns of y
_FULL = 128  # rows of a tile of y whose products fill the tensor cores
_LONG = 12  # steps of a list, if few programs are to share it


def default_config(request: Request, sizes: Sizes) -> Config:
    """Always a legal choice."""
    if request.layout.kind != "blocks":
        return bits_config(request, sizes)
    out = request.layout.cols if request.transposed else request.layout.rows
    narrow = not request.transposed and out < SMALLEST_TILE
    if sizes.height == "few":
        return _narrow(request, sizes) if narrow else _few(request, sizes)
    if _is_for_hopper(request):
        return _hopper(request)
    block_n = min(padded(out, SMALLEST_TILE), 128)
    wide = request.dtype == "float32"
    block_m, step = (64, 32) if wide else (_FULL, 64)
    if wide:
        block_n = min(block_n, 64)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    config = Config(block_m, block_n, (f"step={step}", f"warps={warps}"))
    return _fitted(request, config, (block_m + block_n) * step)


def _is_for_hopper(request: Request) -> bool:
    """Whether templates/gluon/linear.py expresses the kernel; that form is asked for by its own option."""
    sides = (request.layout.rows, request.layout.cols)
    return (
        request.target.arch == "sm_90"
        and request.dtype in ELEMENTS
        and request.values == request.dtype
        and all(side >= SMALLEST_TILE and side == padded(side) for side in sides)
    )


def _hopper(request: Request) -> Config:
    """Two warpgroups, which keep as much of y as registers hold.

    Narrow tiles wait for x, so that row tiles come one by one: what programs read at a time is then the same rows. The
    narrowest come by twos; of wider ones the tensor cores read x as often as before. Block columns are too long for it.
    """
    rows, cols = request.layout.rows, request.layout.cols
    out, into = (cols, rows) if request.transposed else (rows, cols)
    block_n = min(out, WIDEST)
    if block_n < WIDEST:
        step, stages = (32, 8) if max(out, into) <= 32 else (LANES, 4)
        options = (f"step={step}", f"{WARPGROUPS}=2", f"stages={stages}", "group=1")
        twos = out <= _BY_TWOS and not request.transposed and not request.gated
        return Config(256, block_n, (*options, f"{PAIRED}=1") if twos else options)
    block_m, stages = (128, 6) if request.gated else (256, 3)
    return Config(block_m, block_n, (f"step={LANES}", f"{WARPGROUPS}=2", f"stages={stages}"))


def _few(request: Request, sizes: Sizes) -> Config:
    """Enough programs to fill the device, and small ones where there are more than that."""
    out, into = request.layout.rows, padded(request.layout.cols)
    if request.transposed:
        out, into = request.layout.cols, padded(request.layout.rows)
    elif sizes.m == 1:
        return _one_row(request, sizes)
    cores = max(request.target.cores, 1)
    lists = -(-(sizes.k if request.transposed else sizes.n) // out)
    turned = sizes.m <= SMALLEST_ROWS and not request.transposed and request.target.kind == "cuda"
    block_m = SMALLEST_ROWS if turned else padded(min(sizes.m, 64), SMALLEST_TILE)
    block_n = min(padded(out, SMALLEST_TILE), 32)
    if block_m == 64 and padded(out) >= 64 and lists * (padded(out) // 64) >= cores:
        block_n = 64  # rows of x are read again for each tile
    programs = lists * -(-out // block_n)
    ample = programs >= 2 * cores
    step, stages, warps = 128, 3 if ample or block_n == 64 else 4, 2 if ample and block_m * block_n <= 1024 else 4
    if turned and not ample:
        block_n, stages, warps = SMALLEST_TILE, 6, 2
    elif ample and not request.transposed:
        if block_m <= SMALLEST_TILE:
            block_n, step, stages, warps = _small(block_m, block_n, into)
        elif block_m == 64 and into <= 32:
            step, stages = 32, 4  # all programs fit at once
    if request.dtype == "float32":
        step = min(step, 64)
    if request.scales and not request.transposed:
        # a block's scales are those of sums, or of rows; those of several are gathered for each value
        step = min(step, max(into, least_step(request.values, request.transposed)))
    config = Config(block_m, block_n, (f"step={step}", f"warps={warps}"))
    config = _shared(config, request, sizes, lists * -(-out // block_n))
    return _fitted(request, config, (block_m + block_n) * step, stages)


def _small(block_m: int, block_n: int, into: int) -> tuple[int, int, int, int]:
    """Tiles of at most 16 rows of x: columns of y, step, stages, warps. A step is a block unless blocks are narrow."""
    if into > 64:
        return block_n, 128, 4, 2
    if into == 64:
        return SMALLEST_TILE, 64, 6, 1
    return (SMALLEST_TILE, 128, 3, 1) if block_m < SMALLEST_TILE else (block_n, 128, 3, 2)


def _one_row(request: Request, sizes: Sizes) -> Config:
    """Sums, of which a program has as many on their way as let all programs run at once."""
    out = request.layout.rows
    lists = -(-sizes.n // out)
    ample = lists * -(-out // SMALLEST_TILE) >= 4 * request.target.cores
    block_n, step, stages, warps = (SMALLEST_TILE, 128, 4, 2) if ample else (8, 512, 3, 4)
    config = Config(1, block_n, (f"step={step}", f"warps={warps}"))
    config = _shared(config, request, sizes, lists * -(-out // block_n))
    return _fitted(request, config, (1 + block_n) * step, stages)


def _shared(config: Config, request: Request, sizes: Sizes, programs: int) -> Config:
    """With splits where there are few programs of long lists.

    Adding parts up takes another launch, as long as some steps, which short lists and a few idle cores do not.
    """
    cores = max(request.target.cores, 1)
    outputs = (sizes.k if request.transposed else sizes.n) * (2 if request.gated else 1)
    columns = sizes.stored * (2 if request.values == "int4" else 1) // max(outputs, 1)  # of a list
    if 4 * programs >= 3 * cores or columns < _LONG * config.option("step"):
        return config
    return config.having(splits=min(padded(-(-2 * cores // max(programs, 1))), 8))


def _narrow(request: Request, sizes: Sizes) -> Config:
    block_m = min(padded(sizes.m), 8)
    lists, step, warps = (8, 128, 2) if block_m == 1 else (16, 64, 4)
    return Config(block_m, max(lists, padded(request.layout.rows)), (f"step={step}", f"warps={warps}"))


def sampled_config(request: Request, sizes: Sizes) -> Config:
    """Likewise for the gradient of stored blocks."""
    del sizes
    small = request.dtype == "float32"
    rows = min(padded(request.layout.rows, SMALLEST_TILE), 64 if small else 128)
    columns = 64 if small else 128
    warps, stages = (8, 4) if rows == 128 else (4, 3)
    config = Config(32 if small else 64, columns, (f"rows={rows}", f"columns={columns}", f"warps={warps}"))
    return _fitted(request, config, (rows + columns) * config.block_m, stages)


def _fitted(request: Request, config: Config, elements: int, most: int = 4) -> Config:
    """With as many stages of so many elements each as shared memory holds, up to `most`."""
    size = elements * ELEMENT_BYTES[request.dtype]
    if request.target.kind != "cuda":
        most = 2
    # some of it goes to what turns registers around
    stages = min(max(request.target.smem_bytes * 3 // 4 // size, 1), most)
    return _exact(request.dtype, request.target, config.having(stages=stages))


def _exact(dtype: str, target: Target, config: Config) -> Config:
    threefold = dtype == "float32" and target.kind == "cuda" and settings().float32 == "tf32x3"
    return config.having(tf32x3=1) if threefold else config
