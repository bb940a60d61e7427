"""The schedule a GPU kernel starts from: tile sizes, warps, stages and registers by head size, dtype and device.

The options of a kernel that this backend knows:

| option | meaning |
|---|---|
| `warps`, `stages` | Triton's own; below 2 stages Hopper's matrix products no longer overlap |
| `masked_stages` | stages of the loops over masked tiles (default: `stages`) |
| `registers` | a cap per thread, by which programs share a multiprocessor (not where masks read tables pair by pair) |
| `prefetch` | 1: columns that come from a table are read one tile ahead |
| `tma` | 0: no tensor descriptors, even where the tensors allow them |
| `splits` | programs that share the keys of a row tile, where row tiles are fewer than a device runs (default: 1) |
| `tf32x3` | 1: products of float32 as three of tf32, else by plain arithmetic |
| `align` | tiles of keys that are walked in order begin at multiples of so many |
| `warpgroups` | 1 or 2 that multiply, beside warps that bring tiles: the form of spgen/backends/gluon.py, on Hopper |
"""

from __future__ import annotations

from spgen.ir.config import Config
from spgen.ir.kernel import FLOAT8, option
from spgen.ir.node import Op
from spgen.settings import settings, triton_interpreted
from spgen.target import Target
from spgen.templates.gluon import attention
from spgen.templates.gluon.resources import WARPGROUPS, lanes
from spgen.templates.triton.attention import padded

_MUCH = 160 * 1024  # bytes of shared memory a block may have on sm_80, sm_90 and sm_100; elsewhere 99 KB or less

# Rows are (largest number of channel lanes, block_m, block_n, warps, stages, registers). On Hopper two programs share a
# multiprocessor up to 128 lanes, whence the cap on registers: one computes its softmax while the other multiplies.
_HALF_HOPPER = ((128, 128, 64, 8, 2, 128), (256, 128, 64, 8, 2, 0))
_HALF_MUCH = ((64, 128, 64, 4, 2, 0), (128, 128, 64, 8, 2, 0), (256, 64, 64, 8, 2, 0))
_HALF_SHORT = ((256, 64, 64, 4, 2, 0),)
# One stage, so that three or four short programs share a multiprocessor: they hide each other's latency, which the
# masks of short tiles lengthen, better than a second stage does.
_HALF_HOPPER_SHORT = ((64, 64, 64, 4, 1, 96), (128, 64, 64, 4, 1, 128), (256, 64, 64, 4, 1, 0))
_HALF_LITTLE = ((64, 128, 64, 4, 2, 0), (128, 64, 64, 4, 2, 0), (256, 64, 32, 8, 2, 0))
_FLOAT_HOPPER = ((64, 128, 64, 8, 2, 0), (128, 128, 32, 8, 2, 0), (256, 64, 32, 4, 1, 0))
_FLOAT_CORES = ((64, 64, 32, 4, 2, 0), (128, 32, 32, 4, 1, 0), (256, 32, 16, 8, 1, 0))
_FLOAT_PLAIN = ((128, 32, 32, 8, 1, 0), (256, 16, 16, 8, 1, 0))
# Calls of few rows (decoding) wait for memory: low tiles, deep pipelines, all of a multiprocessor's shared memory.
_LOW_HEIGHTS = (16, 32, 64)
_LOW_WARPS, _LOW_STAGES, _LOW_WIDTHS = 4, (3, 4), (128, 64)
_BESIDE = 16 * 1024  # bytes of shared memory for what is not a tile of K or V


# Of the form whose warps are specialised: lanes of K and V together, block_m, block_n, warps, warpgroups, stages,
# registers. Where rows differ by 64, two programs of one warpgroup share a multiprocessor.
_SPECIALISED = (
    (128, 128, 128, 12, 2, 4, 232), (192, 128, 128, 12, 2, 3, 232), (256, 128, 128, 12, 2, 2, 232),
    (320, 128, 128, 12, 2, 2, 232), (384, 128, 64, 12, 2, 2, 232), (512, 128, 64, 12, 2, 2, 224),
)  # fmt: skip
_MANY_VALUES = 192  # lanes, beyond which accumulators leave registers for 64 scores of a row
_LEAST_ROWS = 32  # that share what data list: a row tile is masked where there are fewer than it has
_SPECIALISED_SHORT = (
    (128, 64, 64, 8, 1, 4, 192), (192, 64, 64, 8, 1, 2, 192), (256, 64, 64, 8, 1, 2, 192), (384, 64, 64, 8, 1, 1, 216),
    (512, 64, 64, 8, 1, 1, 232),
)  # fmt: skip


def specialised_config(
    head_dim: int, value_dim: int, dtype: str, target: Target, *, rows: int | None = None, height: int | None = None
) -> Config | None:
    """A configuration for Hopper's own form, None where there is none; arguments as those of `default_config`."""
    wanted = lanes(head_dim) + lanes(value_dim)
    if dtype == FLOAT8:  # lanes are a power of two
        wanted = sum(max(padded(channels), lanes(1)) for channels in (head_dim, value_dim))
    if lanes(value_dim) > _MANY_VALUES:
        wanted = max(wanted, 2 * _MANY_VALUES)
    table = _SPECIALISED if rows is None or rows >= _SPECIALISED[0][1] else _SPECIALISED_SHORT
    found = next((row for limit, *row in table if wanted <= limit), None)
    if found is None or dtype == "float32" or not _is_hopper(target):
        return None
    block_m, block_n, warps, warpgroups, stages, registers = found
    if dtype == FLOAT8:  # half the bytes, and sums of products beside each product
        options = (f"warps={warps}", f"warpgroups={warpgroups}", f"stages={2 * stages}", "align=16")
        return Config(block_m, block_n, options)
    if (rows is not None and rows < _LEAST_ROWS) or (height is not None and height <= _LOW_HEIGHTS[-1]):
        return None
    options = (f"warps={warps}", f"warpgroups={warpgroups}", f"stages={stages}", f"registers={registers}")
    return Config(block_m, block_n, options)


def refusal(kernel: Op, target: Target) -> str | None:
    """Why a kernel does not get the form that its schedule asks for; None if it does."""
    if not option(kernel, WARPGROUPS, 0):
        return None
    if triton_interpreted():
        return "Triton's interpreter"
    return attention.refusal(kernel) if _is_hopper(target) else f"{target.arch}, which is not Hopper"


def default_config(
    head_dim: int, value_dim: int, dtype: str, target: Target, *, rows: int | None = None, cols: int | None = None,
    height: int | None = None,
) -> Config:  # fmt: skip
    """A configuration that fits every target of this kind.

    `rows` and `cols` are how many neighbouring rows and columns share their data, if they do not all: tiles no taller
    than that waste least, down to 64 rows, and tiles no wider read columns that follow each other. `height` is how many
    rows could share a row tile, if they are few. Products of float32 are three products of tf32 where there are tensor
    cores: as exact as float32's own rounding, and five times as fast as its plain arithmetic, which SPGEN_FLOAT32=ieee
    chooses.
    """
    widths = padded(head_dim), padded(value_dim)
    extra = []
    if dtype != "float32":
        table = _half_table(target, rows)
    elif target.kind == "cuda" and settings().float32 == "tf32x3":
        table = _FLOAT_HOPPER if _is_hopper(target) else _FLOAT_CORES
        extra = ["tf32x3=1"]
    else:
        table = _FLOAT_PLAIN
    block_m, block_n, warps, stages, registers = next(row for limit, *row in table if max(widths) <= limit)
    low = next((one for one in _LOW_HEIGHTS if height is not None and height <= one < block_m), None)
    if low is not None:
        block_m, warps, registers = low, _LOW_WARPS, 0
        if dtype != "float32":
            block_n, stages = _low_tile(sum(widths), target, cols) or (block_n, stages)
    if registers:
        extra.append(f"registers={registers}")
    options = [f"warps={warps}", f"stages={stages}", "prefetch=1", *extra]
    return Config(block_m, block_n, tuple(options))


def _low_tile(lanes: int, target: Target, cols: int | None) -> tuple[int, int] | None:
    """Keys and stages of a half-precision tile of few rows: the widest of which enough stages fit."""
    least, most = _LOW_STAGES
    for block_n in _LOW_WIDTHS if target.kind == "cuda" else ():
        stages = (target.smem_bytes - _BESIDE) // (2 * block_n * lanes)
        if stages >= least and (cols is None or cols >= block_n or block_n == _LOW_WIDTHS[-1]):
            return block_n, min(stages, most)
    return None


def _half_table(target: Target, rows: int | None) -> tuple[tuple[int, ...], ...]:
    if target.smem_bytes < _MUCH:
        return _HALF_LITTLE
    if rows is not None and rows < 128:
        return _HALF_HOPPER_SHORT if _is_hopper(target) else _HALF_SHORT
    return _HALF_HOPPER if _is_hopper(target) else _HALF_MUCH


def _is_hopper(target: Target) -> bool:
    return target.arch == "sm_90"
