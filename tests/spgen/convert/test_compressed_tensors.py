"""Checkpoints in compressed-tensors' sparse formats, written here as the library writes them."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import spgen as sp


def checkpoint(weight: Tensor, mask: Tensor, two_four: bool, name: str = "up") -> dict[str, Tensor]:
    """As compressed-tensors 0.9 writes a layer."""
    bits = torch.from_numpy(numpy.packbits(mask.numpy(), axis=-1, bitorder="little"))
    raw = weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight
    values = raw[mask].view(weight.dtype)
    shape = torch.tensor(weight.shape)
    found = {f"{name}.compressed": values, f"{name}.bitmask": bits, f"{name}.shape": shape}
    if two_four:
        return found | {
            f"{name}.compressed": values.view(len(weight), -1), f"{name}.shape": shape.view(-1, 1),
        }  # fmt: skip
    counts = mask.sum(1)
    return found | {f"{name}.row_offsets": counts.cumsum(0) - counts}


def two_of_four(n: int, k: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=random)
    ranks = weight.abs().view(n, -1, 4).argsort(-1).argsort(-1)
    return weight, (ranks > 1).view(n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 8), (5, 100), (16, 256)])
def test_two_of_four(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = two_of_four(*shape)
    stored = sp.from_compressed_tensors(checkpoint(weight.to(dtype), mask, two_four=True))["up"]
    assert str(stored.layout) == "n_of_m(2, 4)"
    assert torch.equal(stored.dense(), weight.to(dtype) * mask)
    assert torch.equal(stored.mask(), mask)


def test_any_mask() -> None:
    weight, mask = torch.randn(7, 77), torch.rand(7, 77) < 0.3
    mask[3] = False
    stored = sp.from_compressed_tensors(checkpoint(weight, mask, two_four=False, name="a.b"))["a.b"]
    assert str(stored.layout) == "bitmap()"
    assert torch.equal(stored.dense(), weight * mask)


def test_zeros_among_the_values_stay_stored() -> None:
    weight, mask = two_of_four(4, 8)
    weight[:2] = 0
    stored = sp.from_compressed_tensors(checkpoint(weight, mask, two_four=True))["up"]
    assert torch.equal(stored.mask(), mask)


@pytest.mark.parametrize("scale", [torch.tensor([0.5]), torch.rand(6, 1) + 0.1])
@pytest.mark.parametrize("two_four", [True, False])
def test_float8(scale: Tensor, two_four: bool) -> None:
    pytest.importorskip("tvm_ffi")
    weight, mask = two_of_four(6, 64)
    small = weight.to(torch.float8_e4m3fn)
    stored = sp.from_compressed_tensors(checkpoint(small, mask, two_four) | {"up.weight_scale": scale})["up"]
    wanted = small.float() * mask * scale
    torch.testing.assert_close(stored.dense(), wanted, rtol=0, atol=0)
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(sp.Linear(stored)(x), x @ wanted.T, rtol=1e-4, atol=1e-4)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(self.norm(x))
        return found


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("form", ["file", "folder", "tensors"])
def test_a_model(tmp_path: Path, form: str, old_names: bool) -> None:
    pytest.importorskip("tvm_ffi")
    save_file = pytest.importorskip("safetensors.torch").save_file
    weight, mask = two_of_four(6, 8)
    bias, scale = torch.randn(6), torch.randn(8)
    tensors = checkpoint(weight, mask, two_four=True, name="up.weight" if old_names else "up")
    tensors |= {"up.bias": bias, "norm.weight": scale, "norm.bias": torch.zeros(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    sources = {"file": tmp_path / "model.safetensors", "folder": str(tmp_path), "tensors": tensors}
    model = sp.load_compressed(Two().eval(), sources[form])  # type: ignore[arg-type]
    assert isinstance(model.up, sp.Linear)
    x = torch.randn(3, 8)
    wanted = (nn.functional.layer_norm(x, (8,)) * scale) @ (weight * mask).T + bias
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


def test_refusals(tmp_path: Path) -> None:
    weight, mask = two_of_four(4, 8)
    good = checkpoint(weight, mask, two_four=True)
    with pytest.raises(sp.DataError, match=r"up\.bitmask: got nothing"):
        sp.from_compressed_tensors({"up.compressed": good["up.compressed"]})
    with pytest.raises(sp.DataError, match=r"up\.compressed: got 14 values"):
        sp.from_compressed_tensors(good | {"up.compressed": torch.randn(2, 7)})
    with pytest.raises(sp.ShapeError, match=r"up\.bitmask"):
        sp.from_compressed_tensors(good | {"up.shape": torch.tensor([4, 20])})
    with pytest.raises(sp.ShapeError, match=r"up\.shape"):
        sp.from_compressed_tensors(good | {"up.shape": torch.tensor([4])})
    with pytest.raises(sp.DtypeError, match=r"up\.compressed: got torch\.int8"):
        sp.from_compressed_tensors(good | {"up.compressed": good["up.compressed"].to(torch.int8)})
    with pytest.raises(sp.ShapeError, match=r"up\.weight_scale"):
        sp.from_compressed_tensors(checkpoint(weight.to(torch.float8_e4m3fn), mask, two_four=True))
    with pytest.raises(sp.DataError, match="at most 2 of 4"):
        sp.from_compressed_tensors(checkpoint(weight, mask.sort(1).values, two_four=True))
    with pytest.raises(sp.PatternError, match="checkpoint: up"):
        sp.load_compressed(nn.Sequential(nn.Linear(8, 4)), good)
    with pytest.raises(sp.DataError, match="without safetensors"):
        sp.load_compressed(Two(), tmp_path)
