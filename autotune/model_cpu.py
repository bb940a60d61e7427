"""How long a kernel takes on a CPU: register tiles, caches, row tiles and cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from spgen.autotune.work import Work
from spgen.ir.config import Config
from spgen.ir.register_tiles import usual_rows, usual_value_rows
from spgen.target import Target

_PORTS = 2  # vector loads, and multiply-adds, that a core starts in a cycle
_ASSUMED_PEAK = 5e10  # of a core of which only the instructions are known


def terms(work: Work, config: Config, target: Target, values: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each term by itself, and "total". Terms of a tile follow each other: a core does one at a time."""
    peak = (target.peak("float32") or _ASSUMED_PEAK * target.cores) / target.cores
    keys, channels = tile_rows(config, target, work.value_dim)
    pace = partial(_pace, vectors=max(config.block_m // target.simd, 1), target=target, values=values)
    held = work.tiles * config.block_n
    columns = min(work.columns, held) or held
    cut = max(columns - work.full * config.block_n, 0)  # in masked tiles
    cycles = work.head_dim * _scored(work, config, keys, cut) * pace(keys) + columns * _summed(work, channels, pace)
    moved = work.head_dim + work.value_dim
    rescaled = work.tiles * config.block_m * work.value_dim * values["rescale"]
    products = 2 * config.block_m * cycles / (peak * values["products"]) * _cached(work, config, target, values)
    softmax = (config.block_m * (columns * values["score"] + cut * values["mask"]) + rescaled) / peak
    loads = columns * moved * values["widen"] / peak if work.dtype != "float32" else 0.0
    loads += work.gathered * config.block_n * moved * values["gather"] / peak
    tiles = products + softmax + loads + work.tiles * values["tile"]
    total = tiles + work.programs * values["program"]
    busy = max(min(target.cores, work.programs), 1)
    found = {
        "products": products / busy,
        "softmax": softmax / busy,
        "loads": loads / busy,
        "latency": (work.tiles * values["tile"] + work.programs * values["program"]) / busy,
        "longest program": values["longest"] * work.longest * tiles / max(work.tiles, 1) + values["program"],
        "memory": work.moved(config) / (target.bandwidth * values["memory"]) if target.bandwidth else 0.0,
        "launch": values["launch"],
    }
    # workers take row tiles one by one: the last ones are waited for, half a row tile on average
    balanced = total / busy + 0.5 * total / max(work.programs, 1) * (busy > 1)
    longest = max(balanced, found["longest program"], found["memory"])
    return {**found, "total": longest * math.exp(_adjustment(config, target, work, values)) + values["launch"]}


def tile_rows(config: Config, target: Target, value_dim: int) -> tuple[int, int]:
    """Rows of the register tiles of K Q and V P: as chosen, else the usual ones."""
    vectors = max(config.block_m // target.simd, 1)
    keys = usual_rows(config.block_n, vectors, target.registers)
    channels = usual_value_rows(value_dim, vectors, target.registers)
    return config.option("key_rows", keys), config.option("value_rows", channels)


def _scored(work: Work, config: Config, rows: int, cut: int) -> float:
    """Columns of K Q, those in register tiles that are not full included: half of one in a tile that ends anywhere."""
    whole = math.ceil(config.block_n / rows) * rows
    return work.full * whole + min(cut + work.masked * (rows - 1) / 2, work.masked * whole)


def _summed(work: Work, rows: int, pace: Callable[[int], float]) -> float:
    """Time of a column of V P in channels at the peak; the last register tile is as high as what is left."""
    rest = work.value_dim % rows
    return (work.value_dim - rest) * pace(rows) + (rest * pace(rest) if rest else 0.0)


def _pace(rows: int, vectors: int, target: Target, values: Mapping[str, float]) -> float:
    """What a row of a register tile takes more: operands to load, chains that wait, registers that are lacking."""
    used = vectors * rows
    loads = values["broadcast"] * (vectors + rows) / used
    waiting = values["chain"] / used
    lacking = max(used + vectors + 1 - target.registers, 0) if target.registers else 0
    return max(1.0, loads, waiting) + values["spill"] * lacking / _PORTS


def _cached(work: Work, config: Config, target: Target, values: Mapping[str, float]) -> float:
    """What a product takes more when what it walks over and over does not fit the first cache."""
    if not target.l1_bytes:
        return 1.0
    held = (
        4 * (config.block_m + config.block_n) * max(work.head_dim, work.value_dim) + 4 * config.block_m * config.block_n
    )
    return 1 + values["cache"] * max(math.log2(held / target.l1_bytes), 0.0)


def _adjustment(config: Config, target: Target, work: Work, values: Mapping[str, float]) -> float:
    return sum(values[f"adjust.{name}"] * x for name, x in features(work, config, target).items())


def features(work: Work, config: Config, target: Target) -> dict[str, float]:
    """Choices as numbers around 0."""
    keys, channels = tile_rows(config, target, work.value_dim)
    return {
        "rows": math.log2(config.block_m / target.simd / 2), "keys": math.log2(config.block_n / 64),
        "key_rows": math.log2(keys / 6), "value_rows": math.log2(channels / 6),
    }  # fmt: skip
