"""Products with n-of-m and bitmap weights in Triton's interpreter, in a process of their own (TRITON_INTERPRET=1).

Started by test_backend_triton_bits.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.weights.storage import Layout, pack
from tests.products import ACTIVATIONS, Product, check, run

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")

H200 = Target.of("h200")
GROUPS = ((2, 4), (1, 4), (1, 2), (4, 8), (3, 4), (5, 8), (6, 16), (7, 32), (10, 64), (2, 6), (3, 5))
LAYOUTS = (*(f"n_of_m({n}, {m})" for n, m in GROUPS), "bitmap()")


def is_even(layout: str, k: int) -> bool:
    """Whether a row has an even number of values, as int4 wants them."""
    one = Layout.read(layout)
    groups = -(-k // one.padded) * one.padded // one.cols
    return one.kind == "n_of_m" and groups * one.rows % 2 == 0


@st.composite
def products(draw: st.DrawFn) -> Product:
    layout, k = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 140))
    values = draw(st.sampled_from(("", "int8", "float8_e4m3fn", "int4" if is_even(layout, k) else "")))
    return Product(
        draw(st.sampled_from((1, 2, 3, 4, 7, 33, 70))), draw(st.integers(1, 40)), k, layout,
        draw(st.sampled_from(("float32", "float16"))), values,
        draw(st.sampled_from((0.0, 0.05, 0.5, 1.0))), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=12)
@given(products())
def test_products(product: Product) -> None:
    check(product, H200)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "dtype"), [(1, "float32"), (3, "float16"), (70, "float32")])
def test_layouts(layout: str, m: int, dtype: str) -> None:
    """One by one, on tensor cores, and unpacked first."""
    for values in ("", "int8", "int4"):
        if values != "int4" or is_even(layout, 165):
            check(Product(m, 5, 165, layout, dtype, values, density=0.7, bias=True), H200)


@pytest.mark.parametrize("layout", ["n_of_m(1, 4)", "n_of_m(4, 4)", "n_of_m(9, 64)", "bitmap()"])
@pytest.mark.parametrize("values", ["", "int8", "float8_e4m3fn", "int4"])
def test_tensor_cores(layout: str, values: str) -> None:
    """Several steps, of which the last is not whole, with full, mixed and empty groups."""
    if values != "int4" or is_even(layout, 410):
        for density in (0.1, 0.5, 1.0):
            check(Product(2, 3, 410, layout, "float16", values, density, config=(("warps", 1),)), H200)
    if not values:
        check(Product(8, 6, 333, layout, "float16", gated=True, bias=True, activation="gelu"), H200)
        check(Product(1, 6, 333, layout, "float16", config=(("expand", 0),)), H200)


def test_values_that_no_word_starts_with() -> None:
    """Values in the middle of a buffer, at two bytes from a word's start."""
    product = Product(2, 5, 200, "n_of_m(4, 8)", "float16")
    x, weights, _ = product.tensors()
    y = run(product, H200, x, weights)
    stored = weights[0]
    buffer = torch.empty(stored.values.numel() + 1, dtype=torch.float16)[1:].view_as(stored.values).copy_(stored.values)
    assert buffer.data_ptr() % 4
    torch.testing.assert_close(run(product, H200, x, [replace(stored, values=buffer)]), y)


@pytest.mark.parametrize("layout", ["n_of_m(2, 4)", "n_of_m(6, 16)", "bitmap()", "n_of_m(2, 6)"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_to_do(layout: str, transposed: bool) -> None:
    for m, n, k in ((0, 32, 32), (3, 0, 32), (3, 32, 0)):
        for dtype in ("float32", "float16"):
            check(Product(m, n, k, layout, dtype, bias=True, transposed=transposed), H200)


def test_rows_beyond_a_bucket_and_blank_places() -> None:
    """Three rows in a kernel for four; blank places hold values that must not be read."""
    for dtype, layout in (("float32", "n_of_m(2, 4)"), ("float16", "n_of_m(4, 8)"), ("float16", "n_of_m(1, 2)")):
        product = Product(3, 6, 100, layout, dtype, density=0.3)
        x, weights, _ = product.tensors()
        y = run(product, H200, x, weights)
        stored = weights[0]
        blank = pack(torch.ones(stored.shape), stored.mask(), stored.layout).values == 0
        assert blank.any()
        weights[0] = replace(stored, values=stored.values.masked_fill(blank, torch.nan))
        torch.testing.assert_close(run(product, H200, x, weights), y)
