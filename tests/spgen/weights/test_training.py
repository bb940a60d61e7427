"""Layers whose dense weights are trained, against autograd on the dense product, and schedules of their patterns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import spgen as sp
from spgen.reference.linear import ACTIVATIONS
from spgen.weights.training import at_density
from tests.spgen.weights.models import batch, model

PATTERNS = [
    sp.block(16, density=0.4),
    sp.block(16, density=0.4) & sp.where(lambda i, j: (i + j) % 3 > 0),
    sp.n_of_m(2, 4),
    sp.block(1, 1, density=0.3),
]


def layer(pattern: sp.Pattern, rule: sp.Rule | None = None, activation: str = "none", n: int = 40) -> sp.Trained:
    torch.manual_seed(3)
    return sp.Trained(torch.randn(n, 50), pattern, torch.randn(n), rule=rule, activation=activation)


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return torch.autograd.grad(y, inputs, g)


def of_the_oracle(trained: sp.Trained, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result in float64, and what the rule makes of the gradients of x, the weight and the bias."""
    assert trained.bias is not None
    x, weight, bias = (one.detach().double().requires_grad_() for one in (x, trained.weight, trained.bias))
    masked = (weight * trained.mask).detach().requires_grad_()
    y = ACTIVATIONS[trained.activation](x @ masked.T + bias)
    of_x, of_masked, of_bias = gradients(y, x, masked, bias)
    left_out, rule = ~trained.mask, trained.rule
    of_weight = of_masked * (~left_out + float(trained.flow) * left_out) + rule.decay * left_out * weight
    return y, (of_x, of_weight, of_bias)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("rule", [sp.Rule(), sp.Rule(1.0, 0.1), sp.Rule(0.3)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients(pattern: sp.Pattern, rule: sp.Rule, activation: str) -> None:
    pytest.importorskip("tvm_ffi")
    trained = layer(pattern, rule, activation)
    x = batch(7, 50).requires_grad_()
    y = trained(x)
    correct, of_inputs = of_the_oracle(trained, x)
    torch.testing.assert_close(y.double(), correct, rtol=1e-4, atol=1e-4)
    assert trained.bias is not None
    found = gradients(y, x, trained.weight, trained.bias)
    for one, other in zip(found, of_inputs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_frozen_layers_compute_the_same(pattern: sp.Pattern) -> None:
    pytest.importorskip("tvm_ffi")
    trained = layer(pattern, activation="relu")
    x = batch(5, 50)
    with torch.no_grad():
        torch.testing.assert_close(trained.freeze()(x), trained(x), rtol=0, atol=0)
    assert torch.equal(trained.stored.dense(), trained.weight.detach() * trained.mask)


def test_a_whole_model_is_frozen() -> None:
    trained = sp.sparsify(model(), {"*.mlp.*": sp.n_of_m(2, 4)}, train=sp.Rule())
    assert isinstance(trained.get_submodule("1.mlp.up"), sp.Trained)
    assert isinstance(sp.freeze(trained).get_submodule("1.mlp.up"), sp.Linear)
    assert isinstance(sp.freeze(sp.Trained(torch.ones(4, 4), sp.n_of_m(2, 4))), sp.Linear)


def test_a_state_brings_its_mask() -> None:
    pytest.importorskip("tvm_ffi")
    one, other = layer(PATTERNS[0]), layer(PATTERNS[0])
    with torch.no_grad():
        one.weight[:16, 16:32] = 9.0
    one.select(sp.block(16, density=0.1))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.mask, other.mask)
    x = batch(5, 50)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


def test_a_step_under_compile() -> None:
    pytest.importorskip("tvm_ffi")
    for rule in (sp.Rule(), sp.Rule(1.0, 0.1)):
        trained = layer(PATTERNS[0], rule, "silu")
        x = batch(7, 50).requires_grad_()
        alone = gradients(trained(x), x, trained.weight)
        compiled = torch.compile(trained, fullgraph=True, backend="aot_eager")
        for one, other in zip(gradients(compiled(x), x, trained.weight), alone, strict=True):
            torch.testing.assert_close(one, other)


def test_autocast() -> None:
    pytest.importorskip("tvm_ffi")
    trained = layer(PATTERNS[0], sp.Rule(1.0, 0.1))
    x = batch(7, 50)
    with torch.autocast("cpu", torch.bfloat16):
        y = trained(x)
    assert y.dtype == torch.bfloat16
    (found,) = gradients(y, trained.weight)
    assert found.dtype == torch.float32
    _, (_, wanted, _) = of_the_oracle(trained, x)
    assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


# -- schedules --------------------------------------------------------------------------------------------------------


def shares(trained: nn.Module) -> list[float]:
    return [float(one.mask.float().mean()) for one in trained.modules() if isinstance(one, sp.Trained)]


def test_densities_fall_as_a_cube() -> None:
    trained = layer(sp.block(1, 1, density=0.2))
    schedule = sp.Schedule(trained, start=2, end=12, every=5)
    assert shares(trained) == [1.0]
    found = []
    for step in range(16):
        schedule.step(step)
        found += shares(trained)
    wanted = [0.2 + 0.8 * (1 - t) ** 3 for t in (0, 0.5, 1)]
    for value, steps in zip(wanted, (range(2, 7), range(7, 12), range(12, 16)), strict=True):
        assert [found[step] for step in steps] == pytest.approx([value] * len(steps), abs=1e-3)


def test_what_is_left_out_becomes_zero_and_what_stays_is_largest() -> None:
    trained = layer(sp.block(10, density=0.25))
    norms = trained.weight.detach().view(4, 10, 5, 10).square().sum((1, 3))
    schedule = sp.Schedule(trained, start=0, end=1)
    schedule.step(0)
    schedule.step(1)
    kept = trained.mask.view(4, 10, 5, 10).any(3).any(1)
    assert kept.sum() == 5
    assert norms[kept].min() > norms[~kept].max()
    assert not trained.weight[~trained.mask].any()


def test_blocks_grow_where_gradients_are_large() -> None:
    pytest.importorskip("tvm_ffi")
    torch.manual_seed(0)
    trained = sp.Trained(torch.randn(40, 50), sp.block(10, density=0.5))
    schedule = sp.Schedule(trained, start=0, end=100, every=10, regrow=0.4, gradual=False)
    before = trained.mask.view(4, 10, 5, 10).any(3).any(1)
    assert trained.dense_gradient
    x = batch(30, 50)
    x[:, 20:30] *= 100  # gradients of the third column of blocks are by far the largest
    trained(x).square().sum().backward()
    assert trained.weight.grad is not None
    assert trained.weight.grad[~trained.mask].any()
    schedule.step(0)
    after = trained.mask.view(4, 10, 5, 10).any(3).any(1)
    assert after.sum() == before.sum()
    assert after[:, 2].all()
    grown = (after & ~before).repeat_interleave(10, 0).repeat_interleave(10, 1)
    assert grown.any()
    assert not trained.weight[grown].any()
    assert not trained.dense_gradient


def test_the_share_that_grows_falls_to_none() -> None:
    trained = sp.Trained(torch.randn(40, 50), sp.block(10, density=0.5))
    schedule = sp.Schedule(trained, start=0, end=10, regrow=0.4, gradual=False)
    before = trained.mask
    trained.weight.grad = torch.randn(40, 50)
    schedule.step(10)
    assert torch.equal(trained.mask, before)


def test_weights_that_learn_come_back() -> None:
    trained = sp.Trained(torch.tensor([[4.0, 3, 2, 1]]), sp.n_of_m(2, 4), rule=sp.Rule(1.0, 2e-4))
    schedule = sp.Schedule(trained, start=0, end=10, gradual=False)
    with torch.no_grad():
        trained.weight[0, 3] = 9.0
    schedule.step(0)
    assert trained.mask.tolist() == [[True, False, False, True]]
    assert trained.weight[0].tolist() == [4, 3, 2, 9]


def test_flow_fades() -> None:
    trained = layer(sp.n_of_m(2, 4), sp.Rule(0.8, fading=True))
    schedule = sp.Schedule(trained, start=10, end=20, gradual=False)
    found = []
    for step in range(30):
        found.append(float(trained.flow))
        schedule.step(step)
    assert found[5] == pytest.approx(0.8)
    assert found[15] == pytest.approx(0.4)
    assert found[25] == 0


def test_training_lowers_the_loss() -> None:
    pytest.importorskip("tvm_ffi")
    torch.manual_seed(0)
    x = batch(200, 50)
    for rule, pattern, options in (
        (sp.Rule(), sp.block(10, density=0.5), {"regrow": 0.3}),
        (sp.Rule(1.0, 2e-4), sp.n_of_m(2, 4), {"gradual": False}),
    ):
        teacher = sp.linear(torch.randn(40, 50), pattern).weight.dense()
        student = sp.sparsify(nn.Linear(50, 40), {"*": pattern}, train=rule)
        optimizer = torch.optim.Adam(student.parameters(), 3e-2)
        schedule = sp.Schedule(student, end=60, every=3, **options)  # type: ignore[arg-type]
        losses = []
        for step in range(150):
            loss = (student(x) - x @ teacher.T).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0]
        assert math.isclose(shares(student)[0], 0.5, abs_tol=0.02)
        with torch.no_grad():
            torch.testing.assert_close(sp.freeze(student)(x), student(x))


def test_refusals() -> None:
    trained = layer(sp.n_of_m(2, 4))
    with pytest.raises(sp.DataError, match=r"sp\.sparsify\(model, patterns, train"):
        sp.Schedule(nn.Linear(4, 4), end=10)
    with pytest.raises(sp.DtypeError, match="Schedule: model"):
        sp.Schedule([trained], end=10)  # type: ignore[arg-type]
    with pytest.raises(sp.UnsupportedError, match="gradual=False"):
        sp.Schedule(trained, end=10)
    with pytest.raises(sp.UnsupportedError, match="model: regrow"):
        sp.Schedule(trained, end=10, regrow=0.1, gradual=False)
    for wrong in (
        {"start": 10, "end": 10},
        {"end": 10, "every": 0},
        {"end": 10, "regrow": 1.0},
        {"end": 9, "power": 0},
    ):
        with pytest.raises(sp.PatternError, match="Schedule: got"):
            sp.Schedule(layer(PATTERNS[0]), **wrong)  # type: ignore[arg-type]
    growing = layer(PATTERNS[0])
    with pytest.raises(sp.DataError, match=r"call step\(\) before zero_grad"):
        sp.Schedule(growing, end=10, regrow=0.1).step(0)
    with pytest.raises(sp.PatternError, match="Rule: flow: got 2"):
        sp.Rule(2)
    with pytest.raises(sp.PatternError, match="Rule: decay: got -1"):
        sp.Rule(0, -1)
    with pytest.raises(sp.UnsupportedError, match="norms of the weight's inputs"):
        sp.Trained(torch.ones(4, 4), sp.n_of_m(2, 4, scores=sp.wanda()))
    with pytest.raises(sp.ShapeError, match="bias: got"):
        sp.Trained(torch.ones(4, 4), sp.n_of_m(2, 4), torch.ones(5))


def test_densities_within_a_pattern() -> None:
    pattern = sp.block(16, density=0.5) | sp.sink(4) | sp.block(8, density=0.1)
    assert at_density(pattern, 0.0) == sp.block(16, density=1.0) | sp.sink(4) | sp.block(8, density=1.0)
    assert at_density(pattern, 1.0) == pattern
