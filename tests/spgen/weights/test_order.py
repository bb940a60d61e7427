"""Orders of features: layers compute the same in any, and hidden blocks are found."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen import reference
from spgen.errors import DataError, ShapeError
from spgen.weights.order import Orders


def planted(n: int = 96, k: int = 64, size: int = 16) -> torch.Tensor:
    """Large blocks in a small weight, rows and columns shuffled."""
    torch.manual_seed(0)
    w = torch.randn(n, k) * 0.05
    for at in range(k // size):
        w[at * size : (at + 1) * size, at * size : (at + 1) * size] += torch.randn(size, size)
    return w[torch.randperm(n)][:, torch.randperm(k)]


def orders(n: int, k: int) -> Orders:
    torch.manual_seed(1)
    return Orders(torch.randperm(n), torch.randperm(k))


@pytest.mark.parametrize("sides", ["q", "k", "qk"])
def test_layers_over_permuted_blocks(sides: str) -> None:
    w, bias, x = planted(), torch.randn(96), torch.randn(5, 64)
    found = orders(96, 64)
    given = {name: getattr(found, name) for name in sides}
    mask = torch.rand(6, 4) < 0.5
    pattern = sp.permuted(sp.block(16, mask=mask), **given)
    layer = sp.linear(w, pattern, bias)
    assert layer.weight.layout == "blocks(16, 16)"
    kept = reference.mask(pattern, 96, 64, q_offset=0)[0, 0]
    expected = reference.linear(x, w, kept, bias)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_hidden_features_move_with_both_their_weights() -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96)
    hidden_bias, bias, x = torch.randn(96), torch.randn(64), torch.randn(3, 64)
    found = orders(96, 64)
    everything = sp.block(16, mask=torch.ones(6, 4, dtype=torch.bool))
    plain = sp.mlp(gate, up, down, everything, hidden_bias=hidden_bias, bias=bias)
    for pattern in (
        sp.permuted(everything, q=found.q), sp.permuted(everything, k=found.k),
        sp.permuted(everything, q=found.q, k=found.k),
    ):  # fmt: skip
        permuted = sp.mlp(gate, up, down, pattern, hidden_bias=hidden_bias, bias=bias)
        torch.testing.assert_close(permuted(x), plain(x), atol=1e-3, rtol=1e-4)
    # no features are moved where hidden ones are permuted alone
    alone = sp.mlp(gate, up, down, sp.permuted(everything, q=found.q))
    assert alone.features.inputs is None
    assert alone.features.places is None


def test_hidden_blocks_are_found() -> None:
    w = planted()
    q, k = sp.concentrated(w, 16, density=4 * 16 * 16 / w.numel())
    together = sp.linear(w, sp.permuted(sp.block(16, density=4 / 24), q=q, k=k))
    apart = sp.linear(w, sp.block(16, density=4 / 24))
    assert together.weight.values.square().sum() > 0.95 * w.square().sum()
    assert apart.weight.values.square().sum() < 0.5 * w.square().sum()


def test_what_is_concentrated_stays() -> None:
    w = torch.zeros(64, 64)
    w[:16, :16] = 1
    found = sp.concentrated(w, 16, density=1 / 16)
    assert torch.equal(found.q, torch.arange(64))
    assert torch.equal(found.k, torch.arange(64))


def test_mistakes_are_explained() -> None:
    w = torch.randn(32, 48)
    blocks = sp.block(16, density=0.5)
    with pytest.raises(ShapeError, match=r"permuted: q: got shape \[31\].*\n.*\[32\]"):
        sp.linear(w, sp.permuted(blocks, q=torch.arange(31)))
    with pytest.raises(DataError, match="permuted: k: got an order that leaves features out"):
        sp.linear(w, sp.permuted(blocks, k=torch.zeros(48, dtype=torch.int64)))
