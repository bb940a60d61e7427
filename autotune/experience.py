"""What trials of other calls say of a configuration, beyond what the cost model predicts.

The model errs in the same direction for the same configuration of similar calls. So the logarithm of measured over
predicted, beside the mean of its call, is averaged over the trials of other records: those of similar kernels and sizes
count more, and so do configurations that agree in more axes (kernel regression, Nadaraya and Watson 1964). A trial
weighs (best / its time)², here and in the mean, as it does in the fit of the coefficients.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

from spgen.autotune.model import Work, predict
from spgen.autotune.ranking import Kind, kind_of
from spgen.autotune.records import Bucket, Key, Record
from spgen.ir.config import Config
from spgen.target import Target

_REACH = 0.3  # of an axis' weight, by which a trial's say falls to 1/e
_PRIOR = 1.0  # weight of the model alone, in trials
_LEAST = 0.01  # weights that are left out
_AXES = {
    "stages": 1.0, "registers": 0.7, "prefetch": 0.3, "masked_stages": 0.3, "tma": 0.5, "splits": 1.0,
    "warpgroups": 5.0, "key_rows": 0.7, "value_rows": 0.7,
}  # fmt: skip
_DIFFERENT = {"dtype": 3.0, "head_dim": 3.0, "packed": 3.0, "structure": 1.0}  # what keys differ in
_SIZES = 0.5  # the same for a power of two between sizes


class Experience:
    """The trials of records on a target. `correction` is what the logarithm of a prediction is to be raised by."""

    def __init__(self, records: Iterable[Record], target: Target) -> None:
        self._known = [(record, _residuals(record, target)) for record in records if record.facts]

    def correction(self, record: Record, config: Config) -> float:
        """Of a configuration of a call; what is known of the call itself does not count."""
        total, weight = 0.0, _PRIOR
        for other, residuals in self._known:
            alike = _likeness(record.key, record.bucket, other.key, other.bucket)
            if alike < _LEAST or other.identity == record.identity:
                continue
            for measured, residual, counts in residuals.get(kind_of(config), ()):
                share = alike * counts * math.exp(-_distance(config, measured) / _REACH)
                total += share * residual
                weight += share
        return total / weight


def _residuals(record: Record, target: Target) -> dict[Kind, list[tuple[Config, float, float]]]:
    """Each configuration's residual and weight, by kind: in that, others must agree altogether."""
    seconds = {
        config: trial.seconds for config, trial in record.trials.items() if not trial.fault and trial.seconds > 0
    }
    if not seconds:
        return {}
    best = min(seconds.values())
    ratios = {
        config: math.log(taken / predict(Work.of(record.facts, config), config, target).seconds)
        for config, taken in seconds.items()
    }
    counts = {config: (best / taken) ** 2 for config, taken in seconds.items()}
    mean = sum(counts[config] * ratio for config, ratio in ratios.items()) / sum(counts.values())
    found = defaultdict(list)
    for config, ratio in ratios.items():
        found[kind_of(config)].append((config, ratio - mean, counts[config]))
    return found


@lru_cache(maxsize=2**12)
def _likeness(one: Key, size: Bucket, other: Key, other_size: Bucket) -> float:
    apart = sum(far for name, far in _DIFFERENT.items() if getattr(one, name) != getattr(other, name))
    return math.exp(-apart - _SIZES * size.distance(other_size))


@lru_cache(maxsize=2**16)
def _distance(one: Config, other: Config) -> float:
    return sum(weight for name, weight in _AXES.items() if one.option(name, -1) != other.option(name, -1))
