"""Why a product with sparse weights runs as it does: storage, bytes, floor, kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spgen.target import Target
from spgen.weights.compile import Sizes, config_of
from spgen.weights.ops import request_of
from spgen.weights.storage import Stored

_LINE = "{:<10} {}"


@dataclass(frozen=True)
class Explanation:
    """What a call costs; bytes and floating-point operations of a call, the floor in seconds (0 if unknown)."""

    storage: str
    density: float
    bytes: int
    flops: int
    floor: float
    kernel: str
    target: Target

    def __str__(self) -> str:
        floor = f"{self.floor * 1e6:.1f} us" if self.floor else "unknown"
        lines = (
            ("storage", f"{self.storage}, {self.density:.1%} stored"),
            ("work", f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"),
            ("floor", f"{floor} on {self.target.name}"),
            ("kernel", self.kernel),
        )
        return "\n".join(_LINE.format(*line) for line in lines)


def explain(x: Tensor, weights: Sequence[Stored], bias: bool, activation: str) -> Explanation:
    """The explanation of activation(x W^T + bias), gated if there are two weights."""
    request = request_of(x, tuple(weights), False, bias, activation)
    n, k = weights[0].shape
    rows = x.numel() // max(k, 1)
    stored = sum(weight.values.numel() * (2 if request.values == "int4" else 1) for weight in weights)
    sizes = Sizes(rows, n, k, stored)
    moved = sum(weight.nbytes for weight in weights) + (rows * (n + k)) * x.element_size()
    flops, target = 2 * rows * stored, request.target
    peak = target.peak(request.dtype)
    times = [flops / peak if peak else 0.0, moved / target.bandwidth if target.bandwidth else 0.0]
    config = config_of(request, sizes)
    return Explanation(
        str(request.layout), stored / max(1, n * k * len(weights)), moved, flops, max(times),
        f"{target.kind}, for {sizes.height} rows, {config}", target,
    )  # fmt: skip
