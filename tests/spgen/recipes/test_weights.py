"""Recipes of sparse weights do what their papers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spgen as sp
from spgen.recipes import weights as recipes
from tests.spgen.weights.models import batch, model

pytest.importorskip("tvm_ffi")
GLOBS = ["*.mlp.*"]


def trained(student: nn.Module, schedule: sp.Schedule, steps: int, m: int = 32) -> list[float]:
    """Losses of learning what the dense model computes."""
    teacher, x = model(), batch(m)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    losses = []
    for step in range(steps):
        loss = (student(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def layers(student: nn.Module) -> list[sp.Trained]:
    found = [module for module in student.modules() if isinstance(module, sp.Trained)]
    assert len(found) == 6
    return found


def test_blast_ends_at_its_density_and_learns_on() -> None:
    student, schedule = recipes.blast(model(), GLOBS, end=20, density=0.25, size=16, every=5, regrow=0.2)
    losses = trained(student, schedule, 60)
    for layer in layers(student):
        tiles = layer.mask.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).any(3).any(1)
        assert tiles.float().mean() == pytest.approx(0.25, abs=0.03)
    assert losses[0] < 1e-6  # dense at first
    assert losses[-1] < losses[21]


@pytest.mark.parametrize("method", [recipes.sr_ste, recipes.progressive])
def test_n_of_m_from_scratch(method: object) -> None:
    student, schedule = method(model(), GLOBS, end=25)  # type: ignore[operator]
    before = [layer.mask for layer in layers(student)]
    losses = trained(student, schedule, 40)
    assert losses[-1] < 0.5 * losses[0]
    changed = 0
    for layer, mask in zip(layers(student), before, strict=True):
        assert layer.mask.unflatten(1, (-1, 4)).sum(-1).eq(2).all()
        changed += int((layer.mask != mask).sum())
    assert changed
    assert float(layers(student)[0].flow) == (1.0 if method is recipes.sr_ste else 0.0)
    assert sp.freeze(student)(batch()).isfinite().all()


def test_sparse_finetuning_keeps_its_places() -> None:
    student = recipes.sparse_finetuning(model(), GLOBS, density=0.3)
    masks = [layer.mask for layer in layers(student)]
    teacher, x = model(), batch(32)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        outputs: list[list[Tensor]] = [[], []]
        for found, own in zip(outputs, (student, teacher), strict=True):
            hidden = x
            for block in own:  # type: ignore[attr-defined]
                hidden = block(hidden)
                found.append(hidden)
        loss = recipes.square_head(outputs[0], [one.detach() for one in outputs[1]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    frozen = sp.freeze(student).get_submodule("0.mlp.gate")
    assert isinstance(frozen, sp.Linear)
    assert frozen.weight.layout == "bitmap()"
    assert torch.equal(frozen.weight.stored.mask(), masks[0])
    assert masks[0].float().mean() == pytest.approx(0.3, abs=0.01)


def test_square_head_is_relative() -> None:
    one, other = torch.randn(5, 8), torch.randn(5, 8)
    assert recipes.square_head([other], [other]) == 0
    found = recipes.square_head([one, 3 * one], [other, 3 * other])
    torch.testing.assert_close(found, (one - other).square().mean() / other.square().mean())
    with pytest.raises(sp.ShapeError, match="student: got 1"):
        recipes.square_head([one], [])


def test_gqsa_keeps_groups_as_int4() -> None:
    weight, bias, x = torch.randn(40, 64), torch.randn(40), batch(3, 64)
    layer = recipes.gqsa(weight, bias)
    assert layer.weight.layout == "blocks(1, 16)"
    stored = layer.weight.stored
    kept = stored.mask()
    groups = kept.unflatten(1, (-1, 16))
    assert groups.any(-1).equal(groups.all(-1))
    assert kept.float().mean() == 0.5
    assert stored.nbytes < weight.numel()  # a byte each, indices included
    step = (weight * kept).unflatten(1, (-1, 16)).abs().amax(-1, keepdim=True) / 7
    assert ((stored.dense() - weight * kept).unflatten(1, (-1, 16)).abs() <= step / 2 + 1e-6).all()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ stored.dense().T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calibrated", [False, True])
def test_armor_comes_closer_than_its_core(calibrated: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 96) * 0.05, torch.randn(64)
    inputs = torch.rand(96) * 4 if calibrated else None
    layers = recipes.armor(weight, bias, size=32, inputs=inputs)
    assert [layer.weight.layout for layer in layers] == ["blocks(32, 32)", "n_of_m(2, 4)", "blocks(32, 32)"]  # type: ignore[union-attr]
    cost = torch.ones(96) if inputs is None else inputs
    with torch.no_grad():
        product = layers(torch.eye(96)).T - bias[:, None]
        alone = sp.linear(weight, sp.n_of_m(2, 4, scores=sp.wanda()), inputs=cost).weight.dense()
    found, before = (((one - weight) * cost).norm() for one in (product, alone))
    assert found < 0.75 * before
    with pytest.raises(sp.ShapeError, match="multiples of size"):
        recipes.armor(weight, size=40)
