"""How long a kernel takes on a CPU: register tiles, caches, row tiles and cores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spgen.autotune.work import Work
from spgen.ir.config import Config
from spgen.target import Target

_SPARE = 2  # registers beside a register tile
_TALLEST = 16  # rows of a register tile
_PORTS = 2  # vector loads, and multiply-adds, that a core starts in a cycle
_ASSUMED_PEAK = 5e10  # of a core of which only the instructions are known
_WIDE = 96  # channels, from which the registers decide the tile of V P


def terms(work: Work, config: Config, target: Target, values: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each term by itself, and "total". Terms of a tile follow each other: a core does one at a time."""
    peak = (target.peak("float32") or _ASSUMED_PEAK * target.cores) / target.cores
    pairs = config.block_m * config.block_n
    keys, channels = tile_rows(config, target, work)
    cycles = work.head_dim * _slowness(config.block_n, keys, config, target, values)
    cycles += work.value_dim * _slowness(work.value_dim, channels, config, target, values)
    products = 2 * pairs * cycles / (peak * values["products"]) * _cached(work, config, target, values)
    moved = config.block_n * (work.head_dim + work.value_dim)
    softmax = (pairs * values["score"] + config.block_m * work.value_dim * values["rescale"]) / peak
    loads = moved * values["widen"] / peak if work.dtype != "float32" else 0.0
    tile = products + softmax + loads + values["tile"]
    extra = (work.masked * pairs * values["mask"] + work.gathered * moved * values["gather"]) / peak
    busy = max(min(target.cores, work.programs), 1)
    total = work.tiles * tile + extra + work.programs * values["program"]
    mean = tile + extra / max(work.tiles, 1)
    found = {
        "products": work.tiles * products / busy,
        "softmax": (work.tiles * softmax + work.masked * pairs * values["mask"] / peak) / busy,
        "loads": (work.tiles * loads + work.gathered * moved * values["gather"] / peak) / busy,
        "latency": (work.tiles * values["tile"] + work.programs * values["program"]) / busy,
        "longest program": values["longest"] * work.longest * mean + values["program"],
        "memory": work.moved(config) / (target.bandwidth * values["memory"]) if target.bandwidth else 0.0,
        "launch": values["launch"],
    }
    # workers take row tiles one by one: the last ones are waited for, half a row tile on average
    balanced = total / busy + 0.5 * total / max(work.programs, 1) * (busy > 1)
    longest = max(balanced, found["longest program"], found["memory"])
    return {**found, "total": longest * math.exp(_adjustment(config, target, work, values)) + values["launch"]}


def tile_rows(config: Config, target: Target, work: Work) -> tuple[int, int]:
    """Rows of the register tiles of K Q and V P: as chosen, else those that the registers and the sizes suggest."""
    vectors = max(config.block_m // target.simd, 1)
    most = max(1, min(_TALLEST, (target.registers - _SPARE - vectors) // vectors))
    channels = most if work.value_dim >= _WIDE else _divisor(work.value_dim, most)
    return config.option("key_rows", _divisor(config.block_n, most)), config.option("value_rows", channels)


def _divisor(size: int, most: int) -> int:
    return max(rows for rows in range(1, most + 1) if size % rows == 0)


def _slowness(size: int, rows: int, config: Config, target: Target, values: Mapping[str, float]) -> float:
    """Time of a product over that at the peak: rows for nothing, operands to load, chains that wait, registers."""
    vectors = max(config.block_m // target.simd, 1)
    used = vectors * rows
    waste = math.ceil(size / rows) * rows / size
    loads = values["broadcast"] * (vectors + rows) / used
    waiting = values["chain"] / used
    lacking = max(used + vectors + 1 - target.registers, 0) if target.registers else 0
    return waste * (max(1.0, loads, waiting) + values["spill"] * lacking / _PORTS)


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
    keys, channels = tile_rows(config, target, work)
    return {
        "rows": math.log2(config.block_m / target.simd / 2), "keys": math.log2(config.block_n / 64),
        "key_rows": math.log2(keys / 6), "value_rows": math.log2(channels / 6),
    }  # fmt: skip
