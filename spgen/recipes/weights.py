"""Methods that make weights sparse. `globs` name a model's linear layers, as in :func:`spgen.sparsify`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spgen.errors import ShapeError
from spgen.patterns import Pattern, block, n_of_m
from spgen.weights.linear import Linear, check_matrix, linear
from spgen.weights.select import selected
from spgen.weights.sparsify import sparsify
from spgen.weights.training import Rule, Schedule


def blast(
    model: nn.Module, globs: Sequence[str], *, end: int, density: float = 0.1, size: int = 64, start: int = 0,
    every: int = 100, regrow: float = 0.1,
) -> tuple[nn.Module, Schedule]:  # fmt: skip
    """Blocks pruned by norm and regrown by gradient while the model trains (Okanovic et al., "BLaST", 2025).

    The model with trained layers, and the schedule whose `step` follows the optimiser's. `spgen.freeze` ends it.
    """
    trained = sparsify(model, dict.fromkeys(globs, block(size, density=density)), train=Rule())
    return trained, Schedule(trained, start=start, end=end, every=every, regrow=regrow)


def sr_ste(
    model: nn.Module, globs: Sequence[str], *, end: int, n: int = 2, m: int = 4, decay: float = 2e-4
) -> tuple[nn.Module, Schedule]:
    """N:M weights from scratch: the largest of each group at every step, gradients to all weights, and a decay of those
    left out (SR-STE; Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021).
    """  # fmt: skip
    trained = sparsify(model, dict.fromkeys(globs, n_of_m(n, m)), train=Rule(1.0, decay))
    return trained, Schedule(trained, end=end, gradual=False)


def progressive(
    model: nn.Module, globs: Sequence[str], *, end: int, start: int = 0, n: int = 2, m: int = 4
) -> tuple[nn.Module, Schedule]:
    """N:M weights of which those left out learn less and less
    (Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024).
    """  # fmt: skip
    trained = sparsify(model, dict.fromkeys(globs, n_of_m(n, m)), train=Rule(1.0, fading=True))
    return trained, Schedule(trained, start=start, end=end, gradual=False)


def sparse_finetuning(model: nn.Module, globs: Sequence[str], *, density: float = 0.5) -> nn.Module:
    """Any values, the largest of each weight, which keep learning in their places (Kurtic et al., "Sparse Fine-tuning
    for Inference Acceleration of Large Language Models", 2023); the loss is `square_head`'s beside the task's.
    """  # fmt: skip
    return sparsify(model, dict.fromkeys(globs, block(1, 1, density=density)), train=Rule())


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over layers of the squared error of hidden states, relative to the teacher's square (the same paper)."""
    if len(student) != len(teacher) or not student:
        raise ShapeError("student", given=f"{len(student)} hidden states", allowed=f"{len(teacher)}, at least one")
    errors = [
        (one - other).square().mean() / other.square().mean() for one, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def gqsa(weight: Tensor, bias: Tensor | None = None, *, group: int = 16, density: float = 0.5) -> Linear:
    """Groups of consecutive inputs of one output, those with the largest norms, as int4 with a scale each
    (Zeng et al., "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference", 2024).
    """  # fmt: skip
    return linear(weight, block(1, group, density=density), bias, values="int4")


def armor(
    weight: Tensor, bias: Tensor | None = None, *, size: int = 64, steps: int = 300, lr: float = 1e-2,
    inputs: Tensor | None = None,
) -> nn.Sequential:  # fmt: skip
    """A 2:4 core between two block-diagonal factors, W ~ A S B ("ARMOR: High-Performance Semi-Structured Pruning via
    Adaptive Matrix Factorization", 2025), as three layers; the factors are fitted by Adam from A = B = 1.

    The error of each input counts with `inputs`, norms of the inputs [K], which choose the core as Wanda does.
    """  # fmt: skip
    check_matrix("weight", weight)
    n, k = weight.shape
    if n % size or k % size:
        raise ShapeError("weight", given=f"shape {list(weight.shape)}", allowed=f"multiples of size={size}")
    wanted = weight.detach().float()
    cost = torch.ones(k, device=weight.device) if inputs is None else inputs.float() / inputs.float().mean()
    mask, _ = selected(wanted * cost, n_of_m(2, 4))
    left, right = (torch.eye(size, device=weight.device).repeat(rows // size, 1, 1) for rows in (n, k))
    factors = [nn.Parameter(one) for one in (left, wanted * mask, right)]
    sizes = 0.1, float(wanted.square().mean().sqrt()), 0.1  # of the factors' entries
    optimizer = torch.optim.Adam([{"params": [one], "lr": lr * own} for one, own in zip(factors, sizes, strict=True)])
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            ((_chain(factors, mask) - wanted) * cost).square().sum().backward()
            optimizer.step()
    left, core, right = (one.detach().to(weight.dtype) for one in factors)
    ends = [linear(torch.block_diag(*one), _diagonal(len(one), size), b) for one, b in ((right, None), (left, bias))]
    middle = linear(core * mask, n_of_m(2, 4, mask=mask))
    return nn.Sequential(ends[0], middle, ends[1])


def _chain(factors: Sequence[Tensor], mask: Tensor) -> Tensor:
    """A S B, A and B as their blocks [blocks, size, size]."""
    left, core, right = factors
    rows = left @ (core * mask).unflatten(0, (len(left), -1))
    cols = rows.flatten(0, 1).unflatten(1, (len(right), -1)).transpose(0, 1) @ right
    product: Tensor = cols.transpose(0, 1).flatten(1)
    return product


def _diagonal(count: int, size: int) -> Pattern:
    return block(size, mask=torch.eye(count, dtype=torch.bool))
