"""Products with sparse weights for tests: random weights, and what the kernels must write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from spgen.target import Target
from spgen.weights.compile import Request, Sizes, backend_of, kernel_of, sampled_kernel_of
from spgen.weights.storage import Layout, Stored, pack, quantized, values_dtype

ACTIVATIONS = {
    "none": lambda values: values, "relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu,
    "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
}  # fmt: skip
NORMS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3}  # of what rounding changes, relative to the result's


@dataclass(frozen=True)
class Product:
    """A call: rows of x by a weight [n, k] of which a share of blocks, or of values, is stored."""

    m: int
    n: int
    k: int
    layout: str
    dtype: str = "float32"
    values: str = ""  # other than the dtype
    density: float = 0.4
    transposed: bool = False
    gated: bool = False
    bias: bool = False
    activation: str = "none"
    seed: int = 0
    config: tuple[tuple[str, int], ...] = ()  # other than the default's

    @property
    def width(self) -> int:
        """Columns of y."""
        return self.k if self.transposed else self.n

    def tensors(self, device: str = "cpu") -> tuple[Tensor, list[Stored], Tensor | None]:
        """x with rows that lie apart, the weights, the bias."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = [self._weight(generator, device) for _ in range(1 + self.gated)]
        depth, dtype = (self.n if self.transposed else self.k), getattr(torch, self.dtype)
        x = torch.randn(self.m, depth + 8, generator=generator).to(dtype).to(device)[:, :depth]
        bias = torch.randn(self.width, generator=generator).to(dtype).to(device) if self.bias else None
        return x, weights, bias

    def _weight(self, generator: torch.Generator, device: str) -> Stored:
        layout = Layout.read(self.layout)
        kept = self._kept(layout, generator)
        weight = torch.randn(self.n, self.k, generator=generator).to(getattr(torch, self.dtype))
        stored = pack(weight, kept, layout)
        stored = quantized(stored, self.values) if self.values else stored
        moved = [tensor.to(device) for tensor in stored.index]
        scales = None if stored.scales is None else stored.scales.to(device)
        return replace(stored, values=stored.values.to(device), index=tuple(moved), scales=scales)

    def _kept(self, layout: Layout, generator: torch.Generator) -> Tensor:
        """Random blocks; or random places, of groups up to n."""
        grouped = layout.kind == "n_of_m"
        rows, cols = (1, 1) if grouped else (layout.rows, layout.cols)
        kept = torch.rand(-(-self.n // rows), -(-self.k // cols), generator=generator) < self.density
        kept = kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: self.n, : self.k]
        if grouped:
            order = torch.rand(self.n, -(-self.k // layout.cols), layout.cols, generator=generator).argsort(-1)
            kept = kept & (order < layout.rows).flatten(1)[:, : self.k]
        return kept

    def request(self, weights: Sequence[Stored], target: Target) -> Request:
        """What its kernel is specialised for."""
        one = weights[0]
        return Request(
            self.dtype, one.layout, values_dtype(one), one.scales is not None, target, self.transposed, self.gated,
            self.bias, self.activation,
        )  # fmt: skip

    def sizes(self, weights: Sequence[Stored]) -> Sizes:
        """What chooses its configuration."""
        return Sizes(self.m, self.n, self.k, len(weights[0].values))


def wanted(
    product: Product, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """The result in float64, with another activation if one is given."""
    dense = [weight.dense().double() for weight in weights]
    sums = [x.double() @ (weight if product.transposed else weight.T) for weight in dense]
    activated = ACTIVATIONS[product.activation if activation is None else activation]
    first = activated(sums[0] if bias is None else sums[0] + bias.double())
    return first * sums[1] if product.gated else first


def run(product: Product, target: Target, x: Tensor, weights: Sequence[Stored], bias: Tensor | None = None) -> Tensor:
    """What a product's kernel writes."""
    request, sizes = product.request(weights, target), product.sizes(weights)
    backend = backend_of(target)
    config = backend.default_config(request, sizes).having(**dict(product.config))
    y = torch.full((product.m, product.width), torch.nan, dtype=x.dtype, device=x.device)
    backend.build(kernel_of(request, sizes, config), target)(x, weights, bias, y)
    return y


def check(product: Product, target: Target, device: str = "cpu") -> Tensor:
    """Run a product's kernel, and compare."""
    x, weights, bias = product.tensors(device)
    y = run(product, target, x, weights, bias)
    correct = wanted(product, x, weights, bias)
    assert not y.isnan().any()
    # gelu of a negative number is a small difference of large ones
    size = wanted(product, x, weights, bias, "none") if product.activation.startswith("gelu") else correct
    assert (y.double() - correct).norm() <= NORMS[product.dtype] * max(correct.norm(), size.norm()), product
    return y


def check_gradient(product: Product, target: Target, device: str = "cpu", **config: int) -> Tensor:
    """Run the kernel of the stored blocks' gradient, and compare."""
    x, (weight,), _ = product.tensors(device)
    dtype = getattr(torch, product.dtype)
    g = torch.randn(product.m, product.n + 8, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    g = g[:, : product.n]
    request, sizes = product.request([weight], target), product.sizes([weight])
    backend = backend_of(target)
    chosen = backend.sampled_config(request, sizes).having(**config)
    out = torch.full_like(weight.values, torch.nan)
    backend.build_sampled(sampled_kernel_of(request, chosen), target)(g, x, weight, out)
    assert not out.isnan().any()
    correct = (g.double().T @ x.double()) * weight.mask()
    found = replace(weight, values=out).dense().double()
    assert (found - correct).norm() <= NORMS[product.dtype] * correct.norm(), str(chosen)
    return out
