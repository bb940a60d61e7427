"""Layers that compute active neurons alone, against dense products with a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spgen as sp
from spgen.weights import neuron_ops
from tests.interpreted import run_interpreted

D, F = 24, 60


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


GATE, UP, DOWN = random(F, D), random(F, D, seed=1), random(D, F, seed=2)
HIDDEN_BIAS, BIAS = random(F, seed=3), random(D, seed=4)


def router(width: int = F) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(D, 8), nn.Linear(8, width))


LAYERS: dict[str, Callable[[sp.Activity], sp.NeuronMLP]] = {
    "gate": lambda activity: sp.NeuronMLP(GATE, UP, DOWN, activity, bias=BIAS),
    "dReLU": lambda activity: sp.NeuronMLP(GATE, UP, DOWN, activity, activation="relu", up_activation="relu"),
    "router": lambda activity: sp.NeuronMLP(
        None, UP, DOWN, activity, activation="relu", router=router(), hidden_bias=HIDDEN_BIAS, bias=BIAS
    ),
    "router of a gated": lambda activity: sp.NeuronMLP(GATE, UP, DOWN, activity, router=router()),
    "experts": lambda activity: sp.NeuronMLP(
        None, UP, DOWN, activity, router=nn.Sequential(router(6), nn.ReLU()), block=10, weighted=True
    ),
}
ACTIVITIES = {
    "threshold": sp.Activity(0.4), "magnitude": sp.Activity(0.3, positive=False), "top 7": sp.Activity(top_k=7),
    "chunks of 4": sp.Activity(0.4, rows=4), "a batch's top 3": sp.Activity(top_k=3, rows=None, positive=False),
}  # fmt: skip


def oracle(mlp: sp.NeuronMLP, x: Tensor) -> Tensor:
    """In float64, row by row: the union over its list of what each row finds active."""
    x, activity = x.double(), mlp.activity
    act: Any = {"silu": nn.functional.silu, "relu": torch.relu}[mlp.activation]
    gate = None if mlp.gate is None else x @ mlp.gate.double().T
    up = x @ mlp.up.double().T
    if mlp.router is None:
        scores = act(gate)
        hidden = scores * (torch.relu(up) if mlp.up_activation == "relu" else up)
    else:
        scores = mlp.router.double()(x).repeat_interleave(mlp.block, 1)  # type: ignore[attr-defined]
        mlp.router.float()  # type: ignore[attr-defined]
        before = up if mlp.hidden_bias is None else up + mlp.hidden_bias.double()
        hidden = (act(before) if gate is None else act(gate) * up) * (scores if mlp.weighted else 1)
    ranks = scores if activity.positive else scores.abs()
    if activity.top_k:
        active = ranks >= ranks.sort(dim=1, descending=True).values[:, activity.top_k - 1 : activity.top_k]
    else:
        active = ranks > activity.threshold if activity.positive else ranks >= activity.threshold
    size = activity.rows or len(x)
    lists = [active[at : at + size].any(0).expand(min(size, len(x) - at), -1) for at in range(0, len(x), size)]
    y = (hidden * torch.cat(lists)) @ mlp.down.double()
    return y if mlp.bias is None else y + mlp.bias.double()


@pytest.mark.parametrize("m", [1, 7, 70])
@pytest.mark.parametrize(
    ("name", "activity"),
    # the k largest of equal scores, as those of an expert's neurons, are not defined
    [(name, activity) for name in LAYERS for activity in ACTIVITIES if name != "experts" or "top" not in activity],
)
def test_active_neurons(name: str, activity: str, m: int) -> None:
    mlp, x = LAYERS[name](ACTIVITIES[activity]), random(m, D, seed=7)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x).double(), oracle(mlp, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mlp(x).double(), oracle(mlp, x), rtol=1e-4, atol=1e-4)  # as when it is trained


def test_few_rows_gather_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("dense")

    monkeypatch.setattr(neuron_ops, "dense_neurons", refuse)
    mlp = LAYERS["gate"](sp.Activity(0.5))
    with torch.no_grad():
        mlp(random(3, D))
        with pytest.raises(AssertionError, match="dense"):
            mlp(random(70, D))


def test_what_is_active() -> None:
    mlp = LAYERS["dReLU"](sp.Activity())
    x = random(2, 5, D)
    assert torch.equal(mlp.active(x), x @ GATE.T > 0)
    assert LAYERS["router"](sp.Activity(top_k=9)).active(x).sum(-1).eq(9).all()


def test_leading_axes_and_no_rows() -> None:
    mlp = LAYERS["gate"](sp.Activity(0.4))
    x = random(2, 3, D)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp(x.flatten(0, 1)).view(2, 3, D))
        assert mlp(x[:0]).shape == (0, 3, D)


@pytest.mark.parametrize("m", [1, 5])
def test_no_active_neuron_gives_the_bias(m: int) -> None:
    x = random(m, D)
    with torch.no_grad():
        assert torch.equal(LAYERS["gate"](sp.Activity(1e6))(x), BIAS.expand(m, D))
        assert not LAYERS["dReLU"](sp.Activity(1e6, rows=None))(x).any()


def test_gradients_are_those_of_the_active() -> None:
    mlp, x = LAYERS["dReLU"](sp.Activity()), random(6, D).requires_grad_()
    inputs = [x, mlp.gate, mlp.up, mlp.down]
    found = torch.autograd.grad(mlp(x).square().sum(), inputs)  # type: ignore[arg-type]
    dense = (torch.relu(x @ mlp.gate.T) * torch.relu(x @ mlp.up.T)) @ mlp.down  # type: ignore[union-attr]
    for one, other in zip(found, torch.autograd.grad(dense.square().sum(), inputs), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other)


def test_operators_are_sound_and_compile() -> None:
    mlp, x = LAYERS["gate"](sp.Activity(0.4)), random(3, D)
    weights = None, None, UP, DOWN.T.contiguous(), None, BIAS
    torch.library.opcheck(torch.ops.spgen.neurons, (x, x @ GATE.T, *weights, "none", 0.4, True, 1))
    torch.library.opcheck(torch.ops.spgen.channels, (x, x, random(D, 9), None, 0.4, False, 2))
    with torch.no_grad():
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    mlp, x = LAYERS["gate"](sp.Activity(0.4)), random(3, D)
    with torch.no_grad():
        wanted = mlp(x)
        found = mlp.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found - wanted).norm() < 0.03 * wanted.norm()


# -- input channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 6, 70])
@pytest.mark.parametrize("rows", [1, 4, None])
def test_active_channels(rows: int | None, m: int) -> None:
    weight, x, scale = random(30, D), random(m, D), random(D).abs()
    low_rank = random(30, 3), random(3, D)
    layer = sp.ChannelLinear(
        weight, sp.Activity(0.5, positive=False, rows=rows), random(30), scale=scale, low_rank=low_rank
    )
    size = rows or m
    active = (x * scale).abs() >= 0.5
    mask = torch.cat([active[at : at + size].any(0).expand(min(size, m - at), -1) for at in range(0, m, size)])
    wanted = (x * mask) @ weight.T + random(30) + ((x * ~mask) @ low_rank[1].T) @ low_rank[0].T
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_pass_straight_through() -> None:
    weight, x = random(30, D), random(5, D).requires_grad_()
    layer = sp.ChannelLinear(weight, sp.Activity(top_k=6, positive=False))
    y = layer(x)
    kept = torch.zeros_like(x).scatter(1, x.abs().topk(6).indices, 1.0) * x
    torch.testing.assert_close(y, kept @ weight.T)
    of_x, of_weight = torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y))
    torch.testing.assert_close(of_x, torch.ones(5, 30) @ weight)
    torch.testing.assert_close(of_weight, kept.T @ torch.ones(5, 30))


def test_refusals() -> None:
    with torch.no_grad(), pytest.raises(sp.ShapeError, match=r"router: got scores \[3, 59\]"):
        sp.NeuronMLP(None, UP, DOWN, sp.Activity(), router=router(59))(random(3, D))
    with pytest.raises(sp.PatternError, match="router: got neither"):
        sp.NeuronMLP(None, UP, DOWN, sp.Activity())
    with pytest.raises(sp.PatternError, match="without a router"):
        sp.NeuronMLP(GATE, UP, DOWN, sp.Activity(), weighted=True)
    with pytest.raises(sp.PatternError, match="up_activation"):
        sp.NeuronMLP(GATE, UP, DOWN, sp.Activity(), router=router(), up_activation="relu")
    with pytest.raises(sp.UnsupportedError, match="activation"):
        sp.NeuronMLP(GATE, UP, DOWN, sp.Activity(), activation="tanh")
    with pytest.raises(sp.ShapeError, match="w_down"):
        sp.NeuronMLP(GATE, UP, DOWN.T, sp.Activity())
    with pytest.raises(sp.ShapeError, match="w_gate"):
        sp.NeuronMLP(GATE[:5], UP, DOWN, sp.Activity())
    with pytest.raises(sp.ShapeError, match="block: got 7"):
        sp.NeuronMLP(None, UP, DOWN, sp.Activity(), router=router(), block=7)
    with pytest.raises(sp.DtypeError, match="w_up"):
        sp.NeuronMLP(None, UP.double(), DOWN, sp.Activity(), router=router())
    with pytest.raises(sp.DtypeError, match="activity"):
        sp.NeuronMLP(GATE, UP, DOWN, 0.5)  # type: ignore[arg-type]
    with pytest.raises(sp.ShapeError, match="x: got"):
        LAYERS["gate"](sp.Activity())(random(3, D + 1))
    for wrong in ({"threshold": -1.0}, {"top_k": 0}, {"rows": 0}):
        with pytest.raises(sp.PatternError, match=next(iter(wrong))):
            sp.Activity(**wrong)  # type: ignore[arg-type]
    with pytest.raises(sp.ShapeError, match="low_rank"):
        sp.ChannelLinear(UP, sp.Activity(), low_rank=(random(F, 3), random(4, D)))
    with pytest.raises(sp.ShapeError, match="scale"):
        sp.ChannelLinear(UP, sp.Activity(), scale=random(F))
    with pytest.raises(sp.ShapeError, match="x: got"):
        sp.ChannelLinear(UP, sp.Activity())(random(3, F))


def test_on_gpus_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted("weights/test_neurons_interpreted.py")
