"""Products with sparse blocks in Triton's interpreter: they run in a process of their own (TRITON_INTERPRET=1).

Started by test_backend_triton_linear.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spgen.settings import triton_interpreted
from spgen.target import Target
from tests.products import ACTIVATIONS, Product, check, check_gradient, run

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")

H200 = Target.of("h200")
LAYOUTS = ("blocks(32, 32)", "blocks(16, 64)", "blocks(128, 128)", "blocks(7, 5)", "blocks(48, 16)", "blocks(24, 6)")
NARROW = ("blocks(1, 16)", "blocks(3, 8)", "blocks(8, 2)")


@st.composite
def products(draw: st.DrawFn) -> Product:
    layout = draw(st.sampled_from(LAYOUTS + NARROW))
    odd = any(int(side) % 2 for side in layout[7:-1].split(", ")[1:])
    values = draw(st.sampled_from(("", "int8", "float8_e4m3fn", "" if odd else "int4")))
    return Product(
        draw(st.sampled_from((1, 2, 7, 16, 33, 64, 70))), draw(st.integers(1, 140)), draw(st.integers(1, 140)), layout,
        draw(st.sampled_from(("float32", "float16"))) if not values else "float32", values,
        draw(st.sampled_from((0.0, 0.05, 0.4, 1.0))), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.integers(0, 99)),
        (("splits", draw(st.sampled_from((1, 3)))),) if draw(st.booleans()) else (),
    )  # fmt: skip


@settings(max_examples=25)
@given(products())
def test_products(product: Product) -> None:
    check(product, H200)


@pytest.mark.parametrize("layout", LAYOUTS + NARROW)
@pytest.mark.parametrize("m", [1, 3, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(layout: str, m: int, transposed: bool) -> None:
    check(Product(m, 100, 133, layout, transposed=transposed, bias=True), H200)


@pytest.mark.parametrize("config", [
    {"block_m": 16, "block_n": 16, "step": 16}, {"step": 256}, {"group": 1, "block_m": 16}, {"group": 2, "block_m": 16},
    {"splits": 5},
])  # fmt: skip
def test_any_schedule(config: dict[str, int]) -> None:
    product = Product(90, 200, 300, "blocks(64, 64)", gated=True, bias=True, activation="silu")
    check(replace(product, config=tuple(config.items())), H200)


@pytest.mark.parametrize("config", [
    {"block_m": 1, "block_n": 16, "step": 32}, {"block_m": 2, "block_n": 8, "step": 512}, {"block_m": 4, "splits": 3},
    {"block_m": 8, "block_n": 16}, {"block_m": 8, "splits": 2}, {"block_m": 16, "step": 16},
])  # fmt: skip
@pytest.mark.parametrize("values", ["", "int8", "int4"])
@pytest.mark.parametrize("layout", ["blocks(64, 64)", "blocks(24, 6)"])
def test_any_schedule_of_few_rows(config: dict[str, int], values: str, layout: str) -> None:
    product = Product(5, 90, 200, layout, values=values, gated=True, bias=True, activation="silu")
    check(replace(product, config=tuple(config.items())), H200)


def test_columns_of_x_that_no_block_names_are_not_multiplied() -> None:
    product = Product(5, 64, 96, "blocks(16, 16)", density=0.1)
    x, weights, _ = product.tensors()
    unused = ~weights[0].mask().any(0)
    assert unused.any()
    x = x.clone()
    x[:, unused] = torch.nan
    assert not run(product, H200, x, weights).isnan().any()


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_to_do(transposed: bool) -> None:
    for m, n, k in ((0, 32, 32), (3, 0, 32), (3, 32, 0)):
        check(Product(m, n, k, "blocks(16, 16)", bias=True, transposed=transposed), H200)


@pytest.mark.parametrize("layout", LAYOUTS + NARROW)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_gradients(layout: str, density: float) -> None:
    check_gradient(Product(70, 100, 300, layout, density=density), H200)


@pytest.mark.parametrize("config", [{"rows": 16, "columns": 16}, {"rows": 32, "columns": 256}, {"block_m": 16}])
def test_gradients_by_any_tiles(config: dict[str, int]) -> None:
    check_gradient(Product(40, 160, 400, "blocks(32, 48)", density=0.5), H200, **config)
    check_gradient(Product(40, 160, 400, "blocks(64, 64)", "float16", density=0.5), H200, **config)
