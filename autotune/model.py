"""The cost model: how long a configuration should take, before anything is compiled.

What has to be done is counted by the compiler (`Work`); how fast it is done follows from the target's description and
from coefficients that were fitted on measured trials (`fit.py`). docs/notes/cost-model.md says what the terms are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spgen.autotune import model_cpu, model_gpu
from spgen.autotune.coefficients import coefficients_of
from spgen.autotune.work import Resources, Work, fits, occupancy
from spgen.ir.config import Config
from spgen.target import Target

__all__ = ["Prediction", "Resources", "Work", "break_even", "estimated", "fits", "occupancy", "predict"]

_BLOCK = 128  # rows and keys of the blocks that `break_even` speaks of
_STEPS = 40  # of its bisection
_DENSE_SHARE = 0.6  # of the peak, which dense attention reaches where nothing was measured


@dataclass(frozen=True)
class Prediction:
    """Seconds, the term that decides them, and how sure that is.

    `bound` is products, softmax, loads, latency, longest program, memory or launch; `terms` are the seconds of each by
    itself. `sureness` says on what the coefficients were fitted, `spread` by which factor times then lay off.
    """

    seconds: float
    bound: str
    terms: Mapping[str, float]
    sureness: str
    spread: float

    def __str__(self) -> str:
        sure = f"{self.sureness}, within a factor of {self.spread:.2f}"
        return f"{self.seconds * 1e3:,.3f} ms, limited by {self.bound}; {sure}"


def predict(work: Work, config: Config, target: Target, resources: Resources | None = None) -> Prediction:
    """How long a call takes with this configuration on this target.

    `resources` are those of the compiled kernel; without, they are estimated.
    """
    known = coefficients_of(target)
    terms = terms_of(work, config, target, known.values, resources or estimated(work, config, target))
    own = {name: seconds for name, seconds in terms.items() if name != "total"}
    return Prediction(terms["total"], max(own, key=lambda name: own[name]), own, known.source, known.spread)


def terms_of(
    work: Work, config: Config, target: Target, values: Mapping[str, float], resources: Resources
) -> dict[str, float]:
    """Seconds of each term, and "total", for given coefficients."""
    if target.kind == "cpu":
        return model_cpu.terms(work, config, target, values)
    return model_gpu.terms(work, config, target, values, resources)


def estimated(work: Work, config: Config, target: Target) -> Resources:
    """What the compiled kernel should take; nothing on a CPU."""
    if target.kind == "cpu":
        return Resources()
    return model_gpu.estimated(work, config, target)


def break_even(
    target: Target, dtype: str, head_dim: int, config: Config, *, value_dim: int | None = None, length: int = 32768,
    heads: int = 32,
) -> float:  # fmt: skip
    """The share of a causal call's blocks of 128 x 128 at which it takes as long as dense attention does.

    Below it the sparse kernel should be the faster one; 1 if it always is, even with all blocks listed, 0 if it never
    is. The dense kernel's rate is that of the target's description.
    """
    value_dim = head_dim if value_dim is None else value_dim
    dense = 2.0 * (head_dim + value_dim) * heads * length * (length + 1) / 2 / _dense_rate(target, dtype, head_dim)

    def slower(density: float) -> bool:
        work = _blocks(dtype, head_dim, value_dim, config, length, heads, density)
        return predict(work, config, target).seconds > dense

    low, high = 0.0, 1.0
    if not slower(high):
        return 1.0
    if slower(low):
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if slower(middle) else (middle, high)
    return low


def _dense_rate(target: Target, dtype: str, head_dim: int) -> float:
    """FLOP/s of dense attention: that of the nearest measured head size, else a share of the peak."""
    sizes = {int(name.split()[1]): rate for name, rate in target.dense if name.split()[0] == dtype}
    if not sizes:
        return _DENSE_SHARE * target.peak("tf32" if dtype == "float32" and target.kind == "cuda" else dtype)
    return sizes[min(sizes, key=lambda size: abs(size - head_dim))]


def _blocks(
    dtype: str, head_dim: int, value_dim: int, config: Config, length: int, heads: int, density: float
) -> Work:  # fmt: skip
    """The work of causal block lists; the diagonal is always listed and masked."""
    rows = -(-length // _BLOCK)
    diagonal, below = rows * heads, density * heads * rows * (rows - 1) / 2
    cut = (_BLOCK / config.block_m) * (_BLOCK / config.block_n)
    size = 4 if dtype == "float32" else 2
    return Work(
        dtype, head_dim, value_dim,
        programs=-(-length // config.block_m) * heads,
        full=round(below * cut),
        masked=round(diagonal * cut),
        gathered=0,
        longest=round((density * (rows - 1) + 1) * _BLOCK / config.block_n),
        flops=2.0 * (head_dim + value_dim) * (below + diagonal / 2) * _BLOCK**2,
        bytes=2.0 * length * heads * (head_dim + value_dim) * size,
    )  # fmt: skip
