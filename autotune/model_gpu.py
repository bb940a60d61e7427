"""How long a kernel takes on a GPU: the terms of one tile, of a program, and of the whole launch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from spgen.autotune.work import BYTES, Resources, Work, least_shared, occupancy, padded, threads_of
from spgen.ir.config import Config
from spgen.target import Target

_MOST_REGISTERS = 255
_SQUEEZED, _AGAIN = 0.78, 11  # registers under a cap, and bytes for each that is spilled
_FULL_ROWS = 64  # of a tile, below which Hopper's wide products are not used
_SHORT_PROGRAM = 16.0  # tiles
_ASSUMED_PEAK = 2e12  # of a multiprocessor of which only the limits are known
_JOIN = 6.0  # exponent by which the bounds of a launch are joined


@dataclass(frozen=True)
class _Tile:
    """Seconds of one tile: of the units that all programs of a multiprocessor share, and of one program's own chain."""

    products: float
    softmax: float
    loads: float
    chain: float


def terms(
    work: Work, config: Config, target: Target, values: Mapping[str, float], resources: Resources
) -> dict[str, float]:
    """Seconds of each term by itself, and "total".

    Programs of a multiprocessor share its tensor cores, its vector units and its way to memory; a program by itself is
    a chain of products, softmax and waiting. So a tile takes the larger of what is shared and of the chain over the
    programs that share, joined smoothly, as such overlap is never perfect.
    """
    if config.option("warpgroups"):
        return _specialised(work, config, target, values)
    call = work
    work, launches = _split(call, config.option("splits", 1))
    share = max(occupancy(config, target, resources), 1)
    share = min(share, max(-(-work.programs // target.cores), 1))
    total, parts, chain = 0.0, dict.fromkeys(("products", "softmax", "loads", "latency"), 0.0), 0.0
    for count, masked, gathered in _kinds(work):
        tile = _tile(work, config, target, values, resources, masked=masked, gathered=gathered)
        own = {
            "products": tile.products, "softmax": tile.softmax, "loads": tile.loads, "latency": tile.chain / share,
        }  # fmt: skip
        total += count * _joined(own.values(), values["overlap"])
        chain += count * tile.chain
        for name, seconds in own.items():
            parts[name] += count * seconds
    busy = max(min(target.cores, work.programs), 1)
    waves = _waves(work, target.cores * share)
    found = {name: seconds / busy for name, seconds in parts.items()}
    found["longest program"] = values["longest"] * work.longest * chain / max(work.tiles, 1) + values["program"]
    found["memory"] = work.moved(config) / (target.bandwidth * values["memory"]) if target.bandwidth else 0.0
    throughput = (total + work.programs * values["program"] / share) / busy * waves
    launch = _joined((throughput, found["longest program"], found["memory"]), _JOIN)
    return {
        **found, "launch": launches * values["launch"],
        "total": launch * math.exp(_adjustment(call, config, values)) + launches * values["launch"],
    }  # fmt: skip


def _specialised(work: Work, config: Config, target: Target, values: Mapping[str, float]) -> dict[str, float]:
    """Of kernels whose row tiles are handed out while they run: products hide all else but a row tile's end."""
    lanes = padded(work.head_dim), padded(work.value_dim)
    tile = 2 * config.block_m * config.block_n * sum(lanes) / (
        (target.peak(work.dtype) or _ASSUMED_PEAK) / target.cores * values["specialised"]
    )  # fmt: skip
    share = 2 // config.option("warpgroups")
    busy = max(min(target.cores, work.programs), 1)
    found = {
        "products": work.tiles * tile / busy,
        "boundary": work.programs * values["boundary"] / share / busy,
        "longest program": values["longest"] * work.longest * tile + values["boundary"],
        "memory": work.moved(config) / (target.bandwidth * values["memory"]) if target.bandwidth else 0.0,
    }
    launch = _joined((found["products"] + found["boundary"], found["longest program"], found["memory"]), _JOIN)
    return {**found, "launch": values["launch"], "total": launch + values["launch"]}


def _split(work: Work, splits: int) -> tuple[Work, int]:
    """The work of programs that share a row tile's keys, and the launches: another one adds up their parts."""
    if splits <= 1:
        return work, 1
    return replace(work, programs=work.programs * splits, longest=-(-work.longest // splits)), 2


def _kinds(work: Work) -> list[tuple[float, bool, bool]]:
    """Tiles by whether they are masked and gathered; gathered ones are spread evenly over both."""
    gathered = work.gathered / work.tiles if work.tiles else 0.0
    found = [
        (count * part, masked, is_gathered)
        for masked, count in ((False, work.full), (True, work.masked))
        for is_gathered, part in ((False, 1 - gathered), (True, gathered))
    ]
    return [kind for kind in found if kind[0]]


def _tile(
    work: Work, config: Config, target: Target, values: Mapping[str, float], resources: Resources, *, masked: bool,
    gathered: bool,
) -> _Tile:  # fmt: skip
    lanes = padded(work.head_dim), padded(work.value_dim)
    pairs, channels = config.block_m * config.block_n, config.block_m * lanes[1]
    vector = _vector_rate(target)
    products = 2 * pairs * sum(lanes) / _matrix_rate(work.dtype, config, target, values)
    operations = pairs * (values["score"] + (values["mask"] if masked else 0.0)) + channels * values["rescale"]
    if config.option("tf32x3"):
        operations += (pairs + config.block_m * lanes[0] + config.block_n * sum(lanes)) * values["split"]
    threads = threads_of(config, target)
    operations += resources.spilled * threads * values["spill"]
    moved = config.block_n * sum(lanes) * BYTES[work.dtype]
    if gathered or not _has_descriptors(config, target):
        operations += moved * values["pointers"]
    softmax = operations / vector
    loads = moved * values["load"] / (target.bandwidth / target.cores) if target.bandwidth else 0.0
    loads *= values["gather"] if gathered else 1.0
    stages = config.option("masked_stages", config.option("stages", 2)) if masked else config.option("stages", 2)
    waiting = values["latency"] + (values["exposed"] / 4 ** (stages - 1) if stages < 4 else 0.0)
    if gathered and not config.option("prefetch", 1):
        waiting += values["search"]
    few = 4 * 32 / threads  # warps to a scheduler hide each other's latency
    return _Tile(products, softmax, loads, products + softmax * (1 + values["alone"] * few) + waiting)


def _matrix_rate(dtype: str, config: Config, target: Target, values: Mapping[str, float]) -> float:
    """FLOP/s of a multiprocessor."""
    rate = target.peak(dtype)
    if dtype == "float32" and config.option("tf32x3"):
        rate = target.peak("tf32") / 3 * values["threefold"]
    rate = (rate or _ASSUMED_PEAK) / target.cores * values["products"]
    return rate * (values["short"] if config.block_m < _FULL_ROWS else 1.0)


def _vector_rate(target: Target) -> float:
    return (target.peak("float32") or _ASSUMED_PEAK / 8) / target.cores


def _has_descriptors(config: Config, target: Target) -> bool:
    newer = target.kind == "cuda" and int(target.arch.removeprefix("sm_")) >= 90
    return newer and config.option("tma", 1) != 0


def _waves(work: Work, places: int) -> float:
    """How much longer the launch takes because programs are whole: fully where all are alike, hardly where they differ,
    since the long ones start first."""
    if not work.tiles or not work.longest:
        return 1.0
    waves = work.programs / places
    alike = min(work.tiles / work.programs / work.longest, 1.0)
    return 1 + (math.ceil(waves) / waves - 1) * alike**2


def _joined(terms: Iterable[float], exponent: float) -> float:
    """The largest of the terms, or somewhat more where others come near it."""
    given = list(terms)
    largest = max(given)
    return largest * sum((term / largest) ** exponent for term in given) ** (1 / exponent) if largest else 0.0


def _adjustment(work: Work, config: Config, values: Mapping[str, float]) -> float:
    """What the terms leave over, as an exponent that is linear in the choices."""
    return sum(values[f"adjust.{name}"] * x for name, x in features(work, config).items())


def features(work: Work, config: Config) -> dict[str, float]:
    """Choices as numbers around 0, within what was measured."""
    rows, keys = (min(max(math.log2(size), -1.0), 1.0) for size in (config.block_m / 128, config.block_n / 64))
    stages = config.option("stages", 2)
    short = 1 / (1 + work.tiles * config.block_n / 64 / max(work.programs, 1) / _SHORT_PROGRAM)
    masked = work.masked / max(work.tiles, 1)
    # a warp multiplies 16 rows: with fewer, warps split the keys, with more, it holds several products at once
    height = math.log2(config.block_m / config.option("warps", 4) / 16)
    return {
        "tall_warps": min(max(height, 0.0), 1.0), "split_warps": min(max(-height, 0.0), 1.0),
        "rows": rows, "keys": keys, "warps": math.log2(config.option("warps", 4) / 8), "one_stage": float(stages == 1),
        "stages": float(max(stages - 2, 0)), "capped": float(config.option("registers") > 0),
        "masked_stages": float(0 < config.option("masked_stages") < stages), "short_keys": short * keys,
        "short_rows": short * rows, "masked_keys": masked * keys, "masked_rows": masked * rows,
    }  # fmt: skip


def estimated(work: Work, config: Config, target: Target) -> Resources:
    """Registers from what a thread holds, and shared memory as Triton gives it out; the rest is spilled.

    A thread holds its part of the accumulators, of the scores twice (as float32, then in the operand's type beside the
    next ones) and of q; without tensor descriptors, the addresses of its part of K and V. Checked against compiled
    kernels on sm_80, sm_90 and gfx942 (docs/notes/cost-model.md).
    """
    if config.option("warpgroups"):
        entry = target.registers // (2 // config.option("warpgroups")) // threads_of(config, target) // 8 * 8
        return Resources(entry, least_shared(config, work, target), 0)
    lanes = padded(work.head_dim), padded(work.value_dim)
    threads, size = threads_of(config, target), BYTES[work.dtype]
    own = config.block_m * (lanes[1] + 2 * config.block_n) / threads
    tile = config.block_n * sum(lanes) / threads
    if target.kind == "hip":
        held, most = 190 + own + tile * size / 4, min(512, 4 * 512 // config.option("warps", 4))
    else:
        held, most = 22 + own + config.block_m * lanes[0] * size / 8 / threads, _MOST_REGISTERS
        held += 0.0 if _has_descriptors(config, target) else min(0.7 * tile, 60)
        held *= 1.3 if config.option("tf32x3") else 1.0
    cap = min(config.option("registers") or most, most)
    shared = least_shared(config, work, target)
    # under a cap below what it may take, ptxas does with a fifth less, and spills what is left again and again
    spilled = 4 * (held - cap) if cap == most else _AGAIN * (_SQUEEZED * held - cap)
    return Resources(round(min(held, cap)), shared, round(max(spilled, 0)))
