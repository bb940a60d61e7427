"""The order in which configurations are tried.

Predictions err alike for configurations of the same tiles and warps, which differ in how registers, loads and stages
are set: where one is slower than predicted, the others are, too. So the fastest predicted come first, and each further
one of a kind as if it took a little longer than the one before: a short list then holds several kinds (as in maximal
marginal relevance, Carbonell and Goldstein 1998).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

from spgen.ir.config import Config

_AGAIN = 1.04  # how much longer another configuration of a kind seems to take, for each of the kind before it

Kind: TypeAlias = "tuple[int, int, int]"


def kind_of(config: Config) -> Kind:
    """What predictions err alike for: rows and keys of the tiles, and warps."""
    return config.block_m, config.block_n, config.option("warps")


def ranked(seconds: Mapping[Config, float]) -> list[Config]:
    """Configurations with predicted seconds, in the order of trying."""
    before: Counter[Kind] = Counter()
    seeming = {}
    for config in sorted(seconds, key=lambda config: seconds[config]):
        kind = kind_of(config)
        seeming[config] = seconds[config] * _AGAIN ** before[kind]
        before[kind] += 1
    return sorted(seeming, key=lambda config: seeming[config])
