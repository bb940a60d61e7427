"""Layers over sparse weights against the dense oracle, with gradients, under torch.compile, and mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spgen as sp
from spgen import reference
from spgen.errors import DtypeError, GradientError, ShapeError, UnsupportedError
from spgen.ir.kernel import ACTIVATIONS
from spgen.weights import ops
from spgen.weights.select import mask_of, resolved

PATTERNS: dict[str, Callable[[], sp.Pattern]] = {
    "blocks of 16": lambda: sp.block(16, density=0.3),
    "blocks of 32 x 8": lambda: sp.block(32, 8, density=0.4),
    "groups": lambda: sp.block(1, 16, density=0.5),
    "2 of 4": lambda: sp.n_of_m(2, 4),
    "1 of 8": lambda: sp.n_of_m(1, 8),
    "any": lambda: sp.where(lambda i, j: (3 * i + j) % 5 == 0),
}


def weights(n: int = 70, k: int = 100, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)


def masked(weight: torch.Tensor, pattern: sp.Pattern) -> torch.Tensor:
    return mask_of(resolved(pattern, weight), weight)


@given(
    name=st.sampled_from(sorted(PATTERNS)), rows=st.sampled_from([0, 1, 2, 5, 16, 33, 70]),
    activation=st.sampled_from(ACTIVATIONS), with_bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40)
def test_layers_agree_with_the_oracle(name: str, rows: int, activation: str, with_bias: bool, seed: int) -> None:
    weight, pattern = weights(seed=seed), PATTERNS[name]()
    bias = torch.randn(70) if with_bias else None
    x = torch.randn(rows, 100)
    expected = reference.linear(x, weight, masked(weight, pattern), bias, activation)
    with torch.no_grad():
        y = sp.linear(weight, pattern, bias, activation=activation)(x)
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PATTERNS)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    weight, pattern = weights(dtype=dtype), PATTERNS[name]()
    x = torch.randn(2, 3, 100).to(dtype)
    y = sp.linear(weight, pattern)(x)
    assert y.shape == (2, 3, 70)
    assert y.dtype == dtype
    expected = reference.linear(x, weight, masked(weight, pattern))
    torch.testing.assert_close(y.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", PATTERNS)
def test_rows_that_lie_apart(name: str) -> None:
    weight, x = weights(), torch.randn(7, 2, 100)[:, 1]
    layer = sp.linear(weight, PATTERNS[name]())
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.contiguous()))
        torch.testing.assert_close(layer(x.T.contiguous().T), layer(x))


@pytest.mark.parametrize("values", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["blocks of 16", "groups", "2 of 4"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_quantised_values(name: str, values: str, rows: int) -> None:
    layer = sp.linear(weights(), PATTERNS[name](), values=values)
    x = torch.randn(rows, 100)
    dense = layer.weight.dense()
    expected = reference.linear(x, dense, torch.ones_like(dense, dtype=torch.bool))
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-5)


def test_quantised_values_have_no_gradient() -> None:
    one = sp.linear(weights(), sp.block(16, density=0.3), values="int8").weight
    values = one.values.float().requires_grad_()
    y = torch.ops.spgen.linear(torch.randn(3, 100), values, one.index, one.scales, None, one.layout, 70, 100, "none")
    with pytest.raises(GradientError, match="quantised"):
        y.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PATTERNS)
def test_gradients(name: str, activation: str) -> None:
    weight, pattern = weights(), PATTERNS[name]()
    layer = sp.linear(weight, pattern, torch.randn(70), activation=activation)
    x = torch.randn(9, 100, requires_grad=True)
    g = torch.randn(9, 70)
    layer(x).backward(g)
    kept = masked(weight, pattern)
    dense = weight.double().masked_fill(~kept, 0).requires_grad_()
    bias, inputs = layer.bias.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    reference.linear(inputs, dense, torch.ones_like(kept), bias, activation).backward(g.double())
    torch.testing.assert_close(x.grad.double(), inputs.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.bias.grad.double(), bias.grad, atol=1e-4, rtol=1e-4)
    weight_grad = torch.zeros_like(weight)
    stored = layer.weight.stored
    weight_grad = type(stored)(stored.layout, stored.shape, layer.weight.values.grad, stored.index).dense()
    expected = dense.grad.masked_fill(~stored.mask(), 0)
    torch.testing.assert_close(weight_grad.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", [sp.block(16, density=0.4), sp.block(8, 16, density=0.3)], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_gated_layers(pattern: sp.Pattern, rows: int) -> None:
    gate, up, down = weights(70, 100, seed=1), weights(70, 100, seed=2), weights(100, 70, seed=3)
    mlp = sp.mlp(gate, up, down, pattern, hidden_bias=torch.randn(70), bias=torch.randn(100))
    x = torch.randn(rows, 100, requires_grad=True)
    y = mlp(x)
    dense = [one.dense().double().requires_grad_() for one in (mlp.gate, mlp.up, mlp.down)]
    inputs = x.detach().double().requires_grad_()
    hidden = torch.nn.functional.silu(inputs @ dense[0].T + mlp.hidden_bias.double()) * (inputs @ dense[1].T)
    expected = hidden @ dense[2].T + mlp.bias.double()
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
    g = torch.randn(rows, 100)
    y.backward(g)
    expected.backward(g.double())
    torch.testing.assert_close(x.grad.double(), inputs.grad, atol=1e-4, rtol=1e-4)
    for own, other in zip((mlp.gate, mlp.up, mlp.down), dense, strict=True):
        stored = own.stored
        found = type(stored)(stored.layout, stored.shape, own.values.grad, stored.index).dense()
        torch.testing.assert_close(found.double(), other.grad.masked_fill(~stored.mask(), 0), atol=1e-4, rtol=1e-4)


def test_layers_without_a_gate_and_patterns_of_their_own() -> None:
    up, down = weights(70, 100, seed=2), weights(100, 70, seed=3)
    x = torch.randn(4, 100)
    mlp = sp.mlp(None, up, down, (sp.block(16, density=0.5), sp.n_of_m(2, 4)), activation="gelu")
    assert (mlp.up.layout, mlp.down.layout) == ("blocks(16, 16)", "n_of_m(2, 4)")
    expected = torch.nn.functional.gelu(x @ mlp.up.dense().T) @ mlp.down.dense().T
    torch.testing.assert_close(mlp(x), expected, atol=1e-4, rtol=1e-4)
    three = (sp.block(16, density=0.5), sp.n_of_m(2, 4), sp.dense())
    mixed = sp.mlp(weights(70, 100, seed=1), up, down, three)
    hidden = torch.nn.functional.silu(x @ mixed.gate.dense().T) * (x @ mixed.up.dense().T)
    torch.testing.assert_close(mixed(x), hidden @ mixed.down.dense().T, atol=1e-4, rtol=1e-4)


def test_the_down_weight_has_the_transposed_pattern() -> None:
    mask = torch.rand(5, 13) < 0.5
    mlp = sp.mlp(weights(70, 100), weights(70, 100), weights(100, 70), sp.block(14, 8, mask=mask))
    assert mlp.down.layout == "blocks(8, 14)"
    assert torch.equal(mlp.down.stored.mask(), mlp.up.stored.mask().T)


def test_operators_are_sound() -> None:
    layer = sp.linear(weights(), sp.block(16, density=0.3), torch.randn(70), activation="silu")
    one, x = layer.weight, torch.randn(5, 100, requires_grad=True)
    where = (one.layout, *one.shape)
    torch.library.opcheck(
        torch.ops.spgen.linear, (x, one.values, one.index, None, layer.bias, *where, "silu"), rtol=1e-3, atol=1e-3
    )
    torch.library.opcheck(
        torch.ops.spgen.linear_of_inputs, (torch.randn(5, 70), one.values.data, one.index, None, *where)
    )
    gate = one.values.detach().clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.spgen.gated, (x, gate, one.index, None, one.values, one.index, None, layer.bias, *where, "silu"),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["blocks of 16", "2 of 4"])
def test_compiled_into_a_graph(name: str) -> None:
    model = torch.nn.Sequential(
        sp.linear(weights(), PATTERNS[name](), activation="gelu"), torch.nn.LayerNorm(70),
        sp.linear(weights(100, 70), PATTERNS[name](), torch.randn(100)),
    )  # fmt: skip
    x = torch.randn(6, 100)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_autocast_runs_in_the_low_precision_type() -> None:
    layer, x = sp.linear(weights(), sp.block(16, density=0.3), torch.randn(70)), torch.randn(5, 100)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=5e-2, rtol=5e-2)


def test_states_load_whatever_is_stored() -> None:
    one, other = (sp.linear(weights(seed=n), sp.block(16, density=d)) for n, d in ((1, 0.2), (2, 0.6)))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.weight.dense(), one.weight.dense())
    x = torch.randn(3, 100)
    assert torch.equal(one(x), other(x))


def test_nothing_stored_gives_the_bias() -> None:
    nothing = sp.block(16, mask=torch.zeros(5, 7, dtype=torch.bool))
    bias, x = torch.randn(70), torch.randn(3, 100, requires_grad=True)
    layer = sp.linear(weights(), nothing, bias)
    y = layer(x)
    assert torch.equal(y, bias.expand(3, 70))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 100))


def test_explanations() -> None:
    text = str(sp.linear(weights(), sp.block(16, density=0.3)).explain(torch.randn(4, 100)))
    assert "blocks(16, 16)" in text
    assert "floor" in text
    assert "kernel" in text


def test_mistakes_are_explained() -> None:
    layer = sp.linear(weights(), sp.block(16, density=0.3))
    with pytest.raises(ShapeError, match=r"x: got shape \[3, 99\]"):
        layer(torch.randn(3, 99))
    with pytest.raises(DtypeError, match=r"x: got torch\.bfloat16"):
        layer(torch.randn(3, 100).bfloat16())
    with pytest.raises(DtypeError, match=r"x: got torch\.int64"):
        layer(torch.zeros(3, 100, dtype=torch.int64))
    with pytest.raises(DtypeError, match=r"weight: got torch\.int64"):
        sp.linear(torch.zeros(4, 4, dtype=torch.int64), sp.dense())
    with pytest.raises(DtypeError, match="pattern: got str"):
        sp.linear(weights(), "block(16)")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"bias: got torch.float32 \[3\]"):
        sp.linear(weights(), sp.dense(), torch.zeros(3))
    with pytest.raises(UnsupportedError, match="activation: got 'tanh'"):
        sp.linear(weights(), sp.dense(), activation="tanh")
    with pytest.raises(ShapeError, match=r"w_down: got shape \[100, 71\]"):
        sp.mlp(weights(), weights(), weights(100, 71), sp.dense())
    with pytest.raises(ShapeError, match=r"w_gate: got shape \[70, 99\]"):
        sp.mlp(weights(70, 99), weights(), weights(100, 70), sp.dense())
    with pytest.raises(ShapeError, match="pattern: got 2 patterns"):
        sp.mlp(weights(), weights(), weights(100, 70), (sp.dense(), sp.dense()))
    with pytest.raises(ShapeError, match=r"weight: got shape \[4\]"):
        sp.linear(torch.zeros(4), sp.dense())
    one, other = (sp.linear(weights(), sp.block(size, density=0.3)).weight.stored for size in (16, 8))
    with pytest.raises(UnsupportedError, match="gate and up"):
        ops.product(torch.randn(1, 100), (one, other), None, "silu")
