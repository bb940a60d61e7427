"""Sparse models are saved and loaded like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spgen as sp
from tests.spgen.weights.models import batch, model

PATTERNS = {"*.gate": sp.block(16, density=0.3), "*.up": sp.n_of_m(2, 4), "*.down": sp.block(1, 1, density=0.4)}


def sparse(scale: float = 1.0, values: str | None = None) -> nn.Module:
    dense = model()
    with torch.no_grad():  # other weights become the largest
        for parameter in dense.parameters():
            parameter.copy_(torch.where(torch.rand_like(parameter) < 0.3, parameter * scale, parameter))
    return sp.sparsify(dense, PATTERNS, values=values)


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_round_trips(tmp_path: Path, form: str, values: str | None) -> None:
    pytest.importorskip("tvm_ffi")
    one, other, x = sparse(5.0, values), sparse(1.0, values), batch()
    if form == "torch":
        torch.save(one.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(one.state_dict(), tmp_path / "state.safetensors")
        state = safetensors.load_file(tmp_path / "state.safetensors")
    with torch.no_grad():
        wanted = one(x)
        assert not torch.allclose(other(x), wanted)
        other.load_state_dict(state)
        assert torch.equal(other(x), wanted)


def test_a_state_of_other_densities_loads() -> None:
    pytest.importorskip("tvm_ffi")
    one = sp.sparsify(nn.Linear(64, 96), {"*": sp.block(16, density=0.2)})
    other = sp.sparsify(nn.Linear(64, 96), {"*": sp.block(16, density=0.7)})
    other.load_state_dict(one.state_dict())
    x = batch(3, 64)
    with torch.no_grad():
        assert torch.equal(other(x), one(x))
    other(x).sum().backward()
    weight = other.weight
    assert isinstance(weight, nn.Module)
    assert weight.values.grad.shape == one.weight.values.shape  # type: ignore[union-attr]


@pytest.mark.parametrize("pattern", [sp.n_of_m(2, 4), sp.block(32, density=0.2), sp.block(1, 1, density=0.2)], ids=str)
def test_other_storages_are_refused(pattern: sp.Pattern) -> None:
    one = sp.sparsify(nn.Linear(64, 96), {"*": sp.block(16, density=0.2)})
    other = sp.sparsify(nn.Linear(64, 96), {"*": pattern})
    with pytest.raises(RuntimeError, match=r"weight\.(values|index_0)"):
        other.load_state_dict(one.state_dict())


def test_weights_of_other_sizes_are_refused() -> None:
    one = sp.sparsify(nn.Linear(64, 96), {"*": sp.block(16, density=0.2)})
    other = sp.sparsify(nn.Linear(64, 128), {"*": sp.block(16, density=0.2)})
    with pytest.raises(RuntimeError, match=r"weight\.index_0"):
        other.load_state_dict(one.state_dict())


BLOCKS, HALF, ANY = sp.block(16, density=0.4), sp.n_of_m(2, 4), sp.block(1, 1, density=0.4)


@pytest.mark.parametrize(
    ("pattern", "name", "place", "value", "message"),
    [
        (BLOCKS, "index_0", (0,), 1, r"index_0\[0\]: got 1"),
        (BLOCKS, "index_0", (2,), 1000, r"index_0\[3\].*\n.*do not fall"),
        (BLOCKS, "index_0", (6,), 1000, r"index_0\[6\]: got 1000\n.*number of blocks"),
        (BLOCKS, "index_1", (3,), 4, r"index_1\[3\]: got 4\n.*0 to 3"),
        (BLOCKS, "index_1", (3,), -1, r"index_1\[3\]: got -1"),
        (BLOCKS, "index_1", (1,), 0, r"index_1\[1\]: got 0\n.*rise"),
        (BLOCKS, "index_2", (0,), 77, r"index_2\[0\]: got 77\n.*index_0 and index_1"),
        (BLOCKS, "index_5", (4,), 77, r"index_5\[4\]: got 77"),
        (HALF, "index_0", (5, 2), 0b0111, r"index_0\[5, 4\].*: got 3\n.*2 of 4"),
        (HALF, "index_0", (95, 7), 1 << 4, r"index_0\[95, 60\] \(columns\)"),
        (ANY, "index_1", (2, 0), 5, r"index_1\[2, 0\]: got 5\n.*before"),
        (ANY, "index_0", (50, 0), -1, r"values: got \d+ entries"),
    ],
)
def test_an_index_that_does_not_describe_the_values_is_refused(
    pattern: sp.Pattern, name: str, place: tuple[int, ...], value: int, message: str
) -> None:
    width = 60 if pattern is HALF else 64
    weight = torch.randn(96, width, generator=torch.Generator().manual_seed(1))
    weight[:16] *= 2  # the first block row is stored
    one = sp.linear(weight, pattern)
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    sp.linear(torch.randn(96, width), pattern).load_state_dict(state)
    state[f"weight.{name}"][place] = value
    with pytest.raises(RuntimeError, match=rf"weight\.{message}"):
        one.load_state_dict(state)


def test_other_numbers_of_entries_are_refused() -> None:
    one = sp.linear(torch.randn(96, 64), BLOCKS)
    for name in ("values", "index_1", "index_5"):
        state = one.state_dict()
        state[f"weight.{name}"] = state[f"weight.{name}"][:-1]
        with pytest.raises(RuntimeError, match=r"(?s)weight\.index_\d.*(entries|number of blocks)"):
            sp.linear(torch.randn(96, 64), BLOCKS).load_state_dict(state)
