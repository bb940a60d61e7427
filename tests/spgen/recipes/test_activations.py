"""Recipes of active neurons and channels against dense products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu

import spgen as sp
from spgen.recipes import activations as recipes

D, F = 32, 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


GATE, UP, DOWN = random(F, D), random(F, D, seed=1), random(D, F, seed=2)
BIASES = {"hidden_bias": random(F, seed=3), "bias": random(D, seed=4)}
SAMPLE = random(200, D, seed=5)


def check(layer: nn.Module, x: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_cats(rows: int) -> None:
    layer = recipes.cats(GATE, UP, DOWN, SAMPLE, sparsity=0.7, rows=rows)
    gates = silu(SAMPLE @ GATE.T)
    assert (gates.abs() >= layer.activity.threshold).float().mean() == pytest.approx(0.3, abs=1e-3)
    x = random(4, D)
    gate = silu(x @ GATE.T)
    active = gate.abs() >= layer.activity.threshold
    active = active if rows == 1 else active.any(0).expand(4, F)
    check(layer, x, (gate * (x @ UP.T) * active) @ DOWN.T)


def test_turbo_sparse_loses_nothing() -> None:
    layer, x = recipes.turbo_sparse(GATE, UP, DOWN), random(5, D)
    check(layer, x, (relu(x @ GATE.T) * relu(x @ UP.T)) @ DOWN.T)
    assert layer.active(x).float().mean() == pytest.approx(0.5, abs=0.1)


def test_deja_vu() -> None:
    torch.manual_seed(0)
    router = recipes.low_rank_router(D, F, 8)
    x = random(5, D)
    with torch.no_grad():
        scores = router(x)
    active = torch.zeros(5, F).scatter(1, scores.topk(20).indices, 1.0)
    layer = recipes.deja_vu(UP, DOWN, router, top_k=20, **BIASES)
    check(layer, x, (relu(x @ UP.T + BIASES["hidden_bias"]) * active) @ DOWN.T + BIASES["bias"])
    gated = recipes.deja_vu(UP, DOWN, router, top_k=20, w_gate=GATE, activation="silu")
    check(gated, x, (silu(x @ GATE.T) * (x @ UP.T) * active) @ DOWN.T)
    with pytest.raises(sp.ShapeError, match=f"{F} neurons in blocks of 1"):
        recipes.deja_vu(UP, DOWN, recipes.low_rank_router(D, F + 1, 8), top_k=20)(x)


def test_polar_sparsity_shares_a_list_over_the_batch() -> None:
    torch.manual_seed(0)
    router, x = recipes.low_rank_router(D, F, 8), random(3, D)
    with torch.no_grad():
        active = (router(x) > 0.3).any(0)
    assert 0 < active.sum() < F
    layer = recipes.polar(UP, DOWN, router, threshold=0.3, **BIASES)
    check(layer, x, (relu(x @ UP.T + BIASES["hidden_bias"]) * active) @ DOWN.T + BIASES["bias"])


@pytest.mark.parametrize("rows", [1, 8])
def test_block_ffn(rows: int) -> None:
    router, scale = random(12, D, seed=6), random(12, seed=7)
    layer, x = recipes.block_ffn(UP, DOWN, router, scale=scale, rows=rows), random(9, D)
    weights = relu(x @ router.T)
    weights = weights / (weights.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    hidden = silu(x @ UP.T) * weights.repeat_interleave(8, 1)
    check(layer, x, hidden @ DOWN.T)
    used = layer.active(x).view(9, 12, 8)
    assert used.any(2).equal(used.all(2))
    if rows == 1:
        assert used[..., 0].equal(weights != 0)
    with pytest.raises(sp.ShapeError, match="7 experts"):
        recipes.block_ffn(UP, DOWN, router[:7])


def test_shadow_llm_predicts_once() -> None:
    torch.manual_seed(0)
    calls: list[int] = []
    predictor = nn.Linear(D, 2 * F)
    predictor.register_forward_hook(lambda *_: calls.append(1))
    routers = recipes.shadow_routers(predictor, [F, F])
    layers = [recipes.deja_vu(UP, DOWN, router, top_k=10) for router in routers]
    x = random(4, D)
    with torch.no_grad():
        scores = predictor(x).split(F, 1)
    calls.clear()
    hidden = x
    for part, layer in zip(scores, layers, strict=True):
        active = torch.zeros(4, F).scatter(1, part.topk(10).indices, 1.0)
        check(layer, hidden, (relu(hidden @ UP.T) * active) @ DOWN.T)
        with torch.no_grad():
            hidden = relu(hidden @ UP.T) @ DOWN.T / F
    assert len(calls) == 1
    wrong = recipes.shadow_routers(predictor, [F, F + 1])
    with pytest.raises(sp.ShapeError, match="predictor: got 192 scores"):
        recipes.deja_vu(UP, DOWN, wrong[0], top_k=10)(x)


def test_q_sparse_keeps_the_largest_inputs() -> None:
    layer, x = nn.Linear(D, 20), random(6, D).requires_grad_()
    sparse = recipes.q_sparse(layer, density=0.25)
    kept = torch.zeros(6, D).scatter(1, x.abs().topk(8).indices, 1.0)
    with torch.no_grad():
        wanted = layer(x * kept)
    check(sparse, x, wanted)
    (of_x,) = torch.autograd.grad(sparse(x).sum(), x)
    torch.testing.assert_close(of_x, layer.weight.detach().sum(0).expand(6, D))


@pytest.mark.parametrize("scaled", [False, True])
def test_r_sparse(scaled: bool) -> None:
    layer, x = nn.Linear(D, 20), random(6, D)
    scale = layer.weight.detach().norm(dim=0) if scaled else None
    sparse = recipes.r_sparse(layer, SAMPLE, sparsity=0.5, rank=20, scale=scale)
    with torch.no_grad():
        check(sparse, x, layer(x))  # at full rank nothing is lost
        few = recipes.r_sparse(layer, SAMPLE, sparsity=0.5, rank=4, scale=scale)
        sizes = (x if scale is None else x * scale).abs()
        kept = sizes >= few.activity.threshold
        assert kept.float().mean() == pytest.approx(0.5, abs=0.15)
        u, s, v = torch.linalg.svd(layer.weight)
        rest = (x * ~kept) @ (u[:, :4] * s[:4] @ v[:4]).T
    check(few, x, (x * kept) @ layer.weight.detach().T + rest + layer.bias.detach())


def test_refusals() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(sp.PatternError, match="sparsity"):
            recipes.cats(GATE, UP, DOWN, SAMPLE, sparsity=share)
    with pytest.raises(sp.PatternError, match="sparsity"):
        recipes.r_sparse(nn.Linear(D, 20), SAMPLE[:0])
