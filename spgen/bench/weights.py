"""Products with sparse weights to measure: blocks, n of m, bitmaps, groups, gated layers and gradients.

Weights are drawn so that results are of order 1, whatever is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.bench.peers import Contender
from spgen.weights import ops
from spgen.weights.linear import Linear
from spgen.weights.storage import Stored

_SAMPLES = 8  # rows of a result that are held against the oracle


@dataclass(frozen=True)
class Rows:
    """x of `rows` rows, and weights that take `inputs` features to `outputs`."""

    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    device: str

    def tensors(self) -> tuple[Tensor]:
        """Random x, the same each time."""
        generator = torch.Generator(self.device).manual_seed(0)
        return (torch.randn(self.rows, self.inputs, dtype=self.dtype, device=self.device, generator=generator),)

    def record(self) -> dict[str, Any]:
        """What a result says of it; where it ran is the result's hardware."""
        return {
            "length": self.rows, "outputs": self.outputs, "inputs": self.inputs,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


@dataclass(frozen=True)
class Product:
    """y = x W^T, or what a `kind` makes of it; `stored` are the weights, `dense` the same with zeros.

    `full` are weights of which none was left out: with zeros a GPU draws less power, and is faster than it would be
    without them. `kind` "gated" is silu(x gate^T) * (x up^T), "gradients" those of x and of the stored values for a
    gradient `g`.
    """

    work: Rows
    pattern: sp.Pattern
    kind: str
    stored: tuple[Stored, ...]
    dense: tuple[Tensor, ...]
    full: tuple[Tensor, ...]
    g: Tensor | None = None

    @property
    def density(self) -> float:
        """The share of values that are stored."""
        return self._values / (len(self.dense) * self.work.outputs * self.work.inputs)

    @property
    def _values(self) -> int:
        return sum(one.values.numel() * (2 if one.values.dtype == torch.uint8 else 1) for one in self.stored)

    @property
    def flops(self) -> int:
        """FLOP of stored values, a multiply-add for each row; twice that for both gradients."""
        return 2 * self.work.rows * self._values * (2 if self.g is not None else 1)

    @property
    def bytes(self) -> int:
        """Weights, x and y once each; gradients read x and g, and write the others'."""
        weights = sum(one.nbytes for one in self.stored)
        rows = self.work.rows * (self.work.inputs + self.work.outputs) * self.dense[0].element_size()
        return (weights + rows) if self.g is None else 2 * weights + 2 * rows

    def ours(self, x: Tensor) -> Contender:
        """The kernel that spgen compiles."""
        if self.kind == "gated":
            return Contender(lambda plan: ops.product(x, self.stored, None, "silu"))
        (one,) = self.stored
        if self.g is None:
            layer = Linear(one).requires_grad_(False)
            return Contender(lambda plan: layer(x))
        g, where = self.g, (str(one.layout), *one.shape)

        def gradients(plan: Any) -> Tensor:
            ops.linear_of_weights(g, x, one.values, one.index, *where)
            return ops.linear_of_inputs(g, one.values, one.index, None, *where)

        return Contender(gradients)

    def largest_error(self, out: Tensor, x: Tensor) -> float:
        """The largest difference of some rows to the oracle's."""
        rows = torch.linspace(0, self.work.rows - 1, min(_SAMPLES, self.work.rows)).long().to(x.device)
        dense = [weight.double() for weight in self.dense]
        if self.g is not None:
            expected = self.g[rows].double() @ dense[0]
        else:
            everything = torch.ones_like(dense[0], dtype=torch.bool)
            first = "silu" if self.kind == "gated" else "none"
            expected = reference.linear(x[rows], dense[0], everything, None, first)
            if self.kind == "gated":
                expected = expected * reference.linear(x[rows], dense[1], everything)
        return float((out[rows].double() - expected).abs().max())


def problem(
    work: Rows, kind: str = "blocks", size: int | tuple[int, int] = 64, sparsity: float = 0.9, values: str | None = None
) -> Product:
    """Random weights of a kind: "blocks", "n_of_m" (2 of 4), "bitmap", "gated" or "gradients" of blocks."""
    generator = torch.Generator(work.device).manual_seed(1)

    def random(*shape: int, dtype: torch.dtype = work.dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=work.device, generator=generator)

    pattern = _pattern(work, kind, size, sparsity, generator)
    count = 2 if kind == "gated" else 1
    kept = 0.5 if kind == "n_of_m" else 1 - sparsity
    weights = [random(work.outputs, work.inputs) * (work.inputs * kept) ** -0.5 for _ in range(count)]
    stored = tuple(sp.linear(weight, pattern, values=values).weight.stored for weight in weights)
    g = random(work.rows, work.outputs) * (work.inputs / work.outputs) ** 0.5 if kind == "gradients" else None
    dense = tuple(one.dense().to(work.dtype) for one in stored)
    return Product(work, pattern, kind, stored, dense, tuple(weights), g)


def _pattern(
    work: Rows, kind: str, size: int | tuple[int, int], sparsity: float, generator: torch.Generator
) -> sp.Pattern:  # fmt: skip
    if kind == "n_of_m":
        return sp.n_of_m(2, 4)
    r, c = (1, 1) if kind == "bitmap" else (size, size) if isinstance(size, int) else size
    shape = (-(-work.outputs // r), -(-work.inputs // c))
    drawn = torch.rand(shape, device=work.device, generator=generator).flatten()
    mask = torch.zeros_like(drawn, dtype=torch.bool)
    mask[drawn.topk(round((1 - sparsity) * len(drawn))).indices] = True
    return sp.block(r, c, mask=mask.view(shape))
