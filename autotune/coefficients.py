"""The coefficients of the cost model: where a target's come from, and what they are where nothing was measured.

They are positive numbers, but for those named `adjust.…`, which are exponents. Times are in seconds of a multiprocessor
or core; work of the vector units is in operations of float32, so that coefficients carry over to other targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from spgen.target import Target, modelled

SHARES = ("products", "short", "threefold", "memory", "specialised")  # of a rate that the data sheet states: below 1
SPREAD = "spread"  # by which factor times lay off, when calls were predicted that the fit had not seen
_UNMEASURED = 2.0  # the spread that is assumed
_FAMILY = 1.5  # by which a spread grows on another architecture

GPU: Mapping[str, float] = {
    "products": 0.72,  # share of the peak that a stream of matrix products reaches
    "short": 0.6,  # share of that with tiles of fewer than 64 rows
    "threefold": 0.5,  # share of that with products of float32 as three of tf32
    "split": 8.0,  # operations to split an operand of theirs in high and low parts
    "score": 18.0,  # operations for a score: scaling, maximum, exponential, sum
    "rescale": 3.0,  # operations for a channel of the accumulator that is rescaled
    "mask": 14.0,  # operations more for a score that is masked
    "alone": 0.5,  # how much slower four warps by themselves run than a full multiprocessor
    "overlap": 3.0,  # exponent by which terms that overlap are joined; large: the largest decides
    "latency": 1e-7,  # seconds of a tile that nothing of the same program hides
    "exposed": 7e-7,  # seconds that loads take with one stage
    "load": 0.5,  # time to load a byte from the shared cache over that from memory
    "gather": 2.0,  # the same of rows that are read one by one, beside tiles
    "pointers": 0.6,  # operations to address a byte where there are no tensor descriptors
    "search": 3e-7,  # seconds to find columns that were not read one tile ahead
    "spill": 1.5,  # operations for a byte that is spilled
    "specialised": 0.66,  # share of the peak that warps reach which do nothing but multiply and the softmax
    "boundary": 1.5e-6,  # seconds that such a program takes from one row tile to the next
    "program": 3e-6,  # seconds that a program takes beside its tiles
    "longest": 1.0,  # weight of the longest program
    "memory": 0.85,  # share of the bandwidth that is reached
    "launch": 6e-6,  # seconds of a launch
    "adjust.rows": 0.0, "adjust.keys": 0.0, "adjust.warps": 0.0, "adjust.tall_warps": 0.0, "adjust.split_warps": 0.0,
    "adjust.one_stage": 0.0, "adjust.stages": 0.0, "adjust.capped": 0.0, "adjust.masked_stages": 0.0,
    "adjust.short_keys": 0.0, "adjust.short_rows": 0.0, "adjust.masked_keys": 0.0, "adjust.masked_rows": 0.0,
}  # fmt: skip
CPU: Mapping[str, float] = {
    "products": 0.9,  # share of the peak that the register tiles reach
    "broadcast": 1.0,  # loads of a register tile's operands in the time of a multiply-add
    "chain": 8.0,  # accumulators that hide the latency of a multiply-add
    "spill": 0.5,  # share more for each register that a register tile lacks
    "widen": 6.0,  # operations to widen an element of K and V of 16 bits
    "score": 30.0,  # operations for a score
    "rescale": 3.0,  # operations for a channel that is rescaled
    "mask": 8.0,  # operations more for a score that is masked
    "gather": 6.0,  # operations to copy an element of a row that is read by itself
    "cache": 0.15,  # share more for a tile that fills the first cache twice
    "tile": 3e-7,  # seconds of a tile beside all that
    "program": 1e-6,  # seconds of a row tile beside its tiles
    "longest": 1.0,  # weight of the longest row tile
    "memory": 0.8,  # share of the bandwidth that is reached
    "launch": 5e-6,  # seconds to start the workers
    "adjust.rows": 0.0, "adjust.keys": 0.0, "adjust.key_rows": 0.0, "adjust.value_rows": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Coefficients:
    """Values, on what they were fitted in words, and by which factor predictions of other calls lay off."""

    values: Mapping[str, float]
    source: str
    spread: float


def guesses(target: Target) -> Mapping[str, float]:
    """The coefficients of a kind of target that nothing was measured on."""
    return CPU if target.kind == "cpu" else GPU


def coefficients_of(target: Target) -> Coefficients:
    """The target's own coefficients, else those of the nearest one that has some, else guesses."""
    return _coefficients(target, target.model)


@lru_cache(maxsize=64)
def _coefficients(target: Target, own: tuple[tuple[str, float], ...]) -> Coefficients:
    if own:
        return _made(target, own, f"fitted on {target.isa or target.name}")
    for other in modelled(target):
        alike = other.arch == target.arch if target.kind != "cpu" else other.isa == target.isa
        kind = "the same" if alike else "another"
        of = "vector extension" if target.kind == "cpu" else "architecture"
        return _made(
            target, other.model, f"fitted on {other.isa or other.name}, of {kind} {of}", 1.0 if alike else _FAMILY
        )
    return Coefficients(guesses(target), "never measured", _UNMEASURED)


def _made(target: Target, fitted: tuple[tuple[str, float], ...], source: str, factor: float = 1.0) -> Coefficients:
    values = dict(fitted)
    spread = values.pop(SPREAD, _UNMEASURED) * factor
    return Coefficients({**guesses(target), **values}, source, spread)
