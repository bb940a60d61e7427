"""The cost model: how long a configuration should take, before anything is compiled.

What has to be done is counted by the compiler (`Work`); how fast it is done follows from the target's description.
"""

from __future__ import annotations

from dataclasses import dataclass

from spgen.ir.config import Config
from spgen.target import Target


@dataclass(frozen=True)
class Work:
    """What one configuration makes of a call, counted.

    `programs` are launched; tiles are those of all of them: `full` run without a mask, `masked` with one, `gathered`
    of either are read row by row. `longest` are the tiles of the program that has most. `flops` counts the needed
    pairs, `bytes` what must move once. `dtype`, `head_dim` and `value_dim` are those of the call.
    """

    dtype: str
    head_dim: int
    value_dim: int
    programs: int
    full: int
    masked: int
    gathered: int
    longest: int
    flops: float
    bytes: float

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.full + self.masked


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of shared memory, and bytes a thread spills."""

    registers: int = 0
    shared: int = 0
    spilled: int = 0


@dataclass(frozen=True)
class Prediction:
    """Seconds, and the term that decides them: arithmetic, memory, latency or launch."""

    seconds: float
    bound: str


def predict(work: Work, config: Config, target: Target, resources: Resources | None = None) -> Prediction:
    """How long a call takes with this configuration on this target."""
    peak = target.peak(work.dtype) * 0.45
    tile = 2 * (work.head_dim + work.value_dim) * config.block_m * config.block_n
    weighted = work.full + 1.4 * work.masked + 0.6 * work.gathered
    arithmetic = weighted * tile / peak if peak else 0.0
    memory = work.bytes / target.bandwidth if target.bandwidth else 0.0
    bound = "arithmetic" if arithmetic >= memory else "memory"
    return Prediction(max(arithmetic, memory) + 10e-6, bound)
