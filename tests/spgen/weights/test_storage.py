"""How weights are stored: what is packed comes back, and each layout is what its head comment says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spgen.errors import DataError, ShapeError, SpgenError, UnsupportedError
from spgen.weights.storage import QUANTIZED, Layout, pack, quantized, taken, values_dtype

LAYOUTS = [
    "blocks(16, 16)", "blocks(1, 16)", "blocks(7, 5)", "blocks(32, 8)", "n_of_m(2, 4)", "n_of_m(1, 8)", "n_of_m(3, 5)",
    "n_of_m(4, 4)", "bitmap()",
]  # fmt: skip


def drawn(seed: int, n: int, k: int, layout: Layout, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a mask that the layout can hold."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=random)
    mask = torch.rand(n, k, generator=random) < density
    if layout.kind == "n_of_m":
        m = layout.cols
        padded = torch.nn.functional.pad(mask, (0, -k % m)).view(n, -1, m)
        mask = (padded & (padded.cumsum(-1) <= layout.rows)).view(n, -1)[:, :k]
    return weight, mask


@given(
    st.integers(0, 2**20), st.integers(1, 70), st.integers(1, 150), st.sampled_from(LAYOUTS),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)  # fmt: skip
def test_what_is_packed_comes_back(seed: int, n: int, k: int, text: str, density: float) -> None:
    layout = Layout.read(text)
    weight, mask = drawn(seed, n, k, layout, density)
    stored = pack(weight, mask, layout)
    assert torch.equal(stored.dense(), weight.masked_fill(~mask, 0))
    assert (stored.mask() | ~mask).all()  # all that is wanted is stored
    if layout.kind != "blocks":
        assert torch.equal(stored.mask(), mask)
    # a gradient lies where its value does
    again = taken(stored, weight)
    kept = stored.values != 0
    assert torch.equal(again[kept], stored.values[kept])


def test_blocks_are_listed_by_rows_and_by_columns() -> None:
    weight = torch.arange(24.0).view(4, 6)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 5] = mask[2, 0] = mask[3, 4] = True
    stored = pack(weight, mask, Layout("blocks", 2, 2))
    indptr, indices, order, back, rows, blocks, back_order = (tensor.tolist() for tensor in stored.index)
    assert (indptr, indices, order) == ([0, 1, 3], [2, 0, 2], [1, 0])
    assert (back, rows, blocks, back_order) == ([0, 1, 1, 3], [1, 0, 1], [1, 0, 2], [2, 0, 1])
    assert stored.values.tolist() == [[[0, 5], [0, 0]], [[12, 0], [0, 0]], [[0, 0], [22, 0]]]


def test_bits_and_words_say_which_columns() -> None:
    weight = torch.zeros(2, 70)
    weight[0, 1], weight[0, 3], weight[1, 69] = 1, 2, 3
    (bits,) = (stored := pack(weight, weight != 0, Layout("n_of_m", 2, 4))).index
    assert bits.shape == (2, 16)
    assert stored.values.shape == (2, 64)
    assert bits[0, 0] == 0b1010
    assert bits[1, 8] == 1 << 5
    words, offsets = (stored := pack(weight, weight != 0, Layout("bitmap"))).index
    assert words.tolist() == [[0b1010, 0], [0, 1 << 5]]
    assert offsets.tolist() == [[0, 2], [2, 2]]
    assert stored.values[:3].tolist() == [1, 2, 3]
    assert len(stored.values) == 3 + 64


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("text", ["blocks(16, 16)", "blocks(1, 16)", "n_of_m(2, 4)", "bitmap()"])
def test_fewer_bits(text: str, dtype: str) -> None:
    layout = Layout.read(text)
    weight, mask = drawn(1, 48, 96, layout, 0.4)
    stored = pack(weight, mask, layout)
    if dtype == "int4" and layout.kind == "bitmap":
        with pytest.raises(UnsupportedError, match="int4 in a bitmap"):
            quantized(stored, dtype)
        return
    small = quantized(stored, dtype)
    assert values_dtype(small) == dtype
    assert small.nbytes < stored.nbytes
    step = {"int4": 0.5 / 7, "int8": 0.5 / 127, "float8_e4m3fn": 1 / 16}[dtype]
    assert (small.dense() - stored.dense()).abs().max() <= step * weight.abs().max() * 1.001
    assert torch.equal(stored.dense(), weight.masked_fill(~mask, 0))  # the original is as it was
    assert torch.equal(small.mask(), stored.mask())


def test_a_row_of_zeros_has_a_scale() -> None:
    stored = quantized(
        pack(torch.zeros(16, 16), torch.ones(16, 16, dtype=torch.bool), Layout("blocks", 16, 16)), "int8"
    )
    assert torch.equal(stored.dense(), torch.zeros(16, 16))


def test_mistakes_are_explained() -> None:
    weight = torch.zeros(2, 8)
    weight[1, 4:7] = 1
    with pytest.raises(DataError, match=r"weight\[1, 4:8\]: got 3 values\n.*at most 2 of 4"):
        pack(weight, weight != 0, Layout("n_of_m", 2, 4))
    with pytest.raises(ShapeError, match=r"mask: got shape \[2, 3\]"):
        pack(torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bool), Layout("bitmap"))
    with pytest.raises(SpgenError, match="storage: got 'tiles"):
        Layout.read("tiles(2, 2)")
    blocks = pack(torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool), Layout("blocks", 1, 3))
    with pytest.raises(ShapeError, match="an even number for int4"):
        quantized(blocks, "int4")
    with pytest.raises(UnsupportedError, match="values: got int2"):
        quantized(blocks, "int2")
    with pytest.raises(UnsupportedError, match="values: got values of"):
        quantized(quantized(blocks, "int8"), "int8")
