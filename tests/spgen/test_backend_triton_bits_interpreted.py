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
        draw(st.sampled_from(("float32", "float16"))) if not values else "float32", values,
        draw(st.sampled_from((0.0, 0.05, 0.5, 1.0))), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=20)
@given(products())
def test_products(product: Product) -> None:
    check(product, H200)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 70])
def test_layouts(layout: str, m: int) -> None:
    for values in ("", "int8", "int4"):
        if values != "int4" or is_even(layout, 165):
            check(Product(m, 5, 165, layout, values=values, density=0.7, bias=True), H200)


@pytest.mark.parametrize("layout", ["n_of_m(2, 4)", "n_of_m(6, 16)", "bitmap()", "n_of_m(2, 6)"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_to_do(layout: str, transposed: bool) -> None:
    for m, n, k in ((0, 32, 32), (3, 0, 32), (3, 32, 0)):
        check(Product(m, n, k, layout, bias=True, transposed=transposed), H200)


def test_rows_beyond_a_bucket_and_blank_places() -> None:
    """Three rows in a kernel for four; blank places hold values that must not be read."""
    product = Product(3, 20, 100, "n_of_m(2, 4)", density=0.3)
    x, weights, _ = product.tensors()
    y = run(product, H200, x, weights)
    stored = weights[0]
    blank = pack(torch.ones(stored.shape), stored.mask(), stored.layout).values == 0
    assert blank.any()
    weights[0] = replace(stored, values=stored.values.masked_fill(blank, torch.nan))
    torch.testing.assert_close(run(product, H200, x, weights), y)
