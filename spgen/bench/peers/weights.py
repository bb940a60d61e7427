"""Products with sparse weights as torch computes them: densely, by blocks, and through cuSPARSELt."""

from __future__ import annotations

import torch
from torch import Tensor

from spgen.backends.cusparselt import fastest, multiplied
from spgen.bench.neurons import Neurons
from spgen.bench.peers import MORE, Contender, Unserved
from spgen.bench.weights import Product

_BLOCKS = 16  # what torch's own kernels take at least


def dense(problem: Product | Neurons, x: Tensor) -> Contender:
    """As many weights, of which none is left out, by torch.nn.functional.linear: cuBLAS, or MKL."""
    if isinstance(problem, Neurons):
        every = problem.dense(x)
        return Contender(lambda plan: every(), pairs=MORE)
    weights, g = problem.full, problem.g
    if g is not None:
        return Contender(lambda plan: (g.T @ x, g @ weights[0])[1], pairs=MORE)
    if problem.kind == "gated":
        return Contender(
            lambda plan: _gated(*(torch.nn.functional.linear(x, weight) for weight in weights)), pairs=MORE
        )
    return Contender(lambda plan: torch.nn.functional.linear(x, weights[0]), pairs=MORE)


def onednn(problem: Product, x: Tensor) -> Contender:
    """As many weights by oneDNN, which lays them out for this size beforehand."""
    if x.device.type != "cpu" or problem.g is not None or problem.kind == "gated":
        raise Unserved("it is for layers on CPUs")
    weight = problem.full[0]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return Contender(
        lambda plan: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), pairs=MORE
    )  # fmt: skip


def bsr(problem: Product | Neurons, x: Tensor) -> Contender:
    """Blocks by torch's BSR layout."""
    if isinstance(problem, Neurons):
        raise Unserved("it is for stored weights")
    layout = problem.stored[0].layout
    if layout.kind != "blocks" or problem.g is not None or problem.kind == "gated" or layout.rows < _BLOCKS:
        raise Unserved(f"it is for layers of blocks of at least {_BLOCKS}")
    weight = problem.dense[0].to_sparse_bsr((layout.rows, layout.cols))
    return Contender(lambda plan: torch.nn.functional.linear(x, weight))


def cusparselt(problem: Product | Neurons, x: Tensor) -> Contender:
    """2 of 4 by the sparse tensor cores, with the fastest of cuSPARSELt's algorithms."""
    if isinstance(problem, Neurons):
        raise Unserved("it is for stored weights")
    layout = problem.stored[0].layout
    if (layout.kind, layout.rows, layout.cols) != ("n_of_m", 2, 4) or problem.stored[0].scales is not None:
        raise Unserved("it is for 2 of 4 weights as wide as x")
    if x.device.type != "cuda" or not torch.backends.cusparselt.is_available():
        raise Unserved("torch has no cuSPARSELt here")
    weight = problem.dense[0]
    compressed = torch._cslt_compress(weight)
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % 16))  # what cuSPARSELt takes; laid out, not timed
    best = fastest(compressed, padded.T)
    return Contender(lambda plan: multiplied(compressed, padded.T, None, best)[:rows])


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up
