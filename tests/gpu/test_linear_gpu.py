"""Products with sparse blocks against the oracle, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

import spgen as sp
from spgen.target import Target
from tests.products import ACTIVATIONS, Product, backend_of, check, check_gradient, kernel_of, run

pytestmark = pytest.mark.gpu

LAYOUTS = (
    "blocks(128, 128)",
    "blocks(64, 64)",
    "blocks(32, 32)",
    "blocks(16, 128)",
    "blocks(48, 7)",
    "blocks(256, 16)",
)
NARROW = ("blocks(1, 16)", "blocks(3, 8)", "blocks(8, 64)")


def target() -> Target:
    return Target.of("cuda")


@pytest.mark.parametrize("layout", LAYOUTS + NARROW)
@pytest.mark.parametrize("m", [1, 6, 16, 50, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(layout: str, m: int, transposed: bool) -> None:
    check(Product(m, 1000, 520, layout, "bfloat16", transposed=transposed), target(), "cuda")
    check(Product(m, 333, 777, layout, "bfloat16", transposed=transposed, bias=True), target(), "cuda")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(dtype: str, activation: str) -> None:
    for m in (1, 5, 500):
        product = Product(m, 520, 1000, "blocks(64, 64)", dtype, bias=True, activation=activation)
        check(product, target(), "cuda")
        check(replace(product, gated=True), target(), "cuda")


@pytest.mark.parametrize("values", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["blocks(64, 64)", "blocks(32, 32)", "blocks(16, 16)", "blocks(1, 16)"])
def test_quantised_values(values: str, layout: str) -> None:
    for m in (1, 7, 40, 200):
        check(Product(m, 520, 1000, layout, "bfloat16", values), target(), "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_rows_without_blocks(layout: str, density: float) -> None:
    for m in (8, 600):
        product = Product(m, 1024, 512, layout, "bfloat16", density=density, bias=True, activation="gelu")
        check(product, target(), "cuda")


def test_the_same_bits_again() -> None:
    for m, layout in (
        (1, "blocks(32, 32)"),
        (3, "blocks(1, 16)"),
        (16, "blocks(64, 64)"),
        (1000, "blocks(128, 128)"),
        (999, "blocks(32, 32)"),
    ):
        product = Product(m, 2048, 2048, layout, "bfloat16", config=(("splits", 4),) if m == 16 else ())
        x, weights, _ = product.tensors("cuda")
        first = run(product, target(), x, weights)
        assert all(torch.equal(run(product, target(), x, weights), first) for _ in range(20))


@pytest.mark.parametrize("layout", ["blocks(32, 32)", "blocks(16, 64)", "blocks(64, 16)", "blocks(16, 16)"])
@pytest.mark.parametrize("transposed", [False, True])
def test_lists_by_twos(layout: str, transposed: bool) -> None:
    """Odd numbers of lists, lists without blocks, all blocks, several row tiles."""
    config = (("paired", 1), ("warpgroups", 2), ("stages", 3))
    for m, n, k, density in ((1000, 32 * 7, 64 * 5, 0.4), (300, 2048, 1024, 0.02), (257, 200, 328, 1.0)):
        product = Product(m, n, k, layout, "bfloat16", transposed=transposed, density=density, config=config, bias=True)
        check(product, target(), "cuda")


def test_lists_by_twos_are_made_again() -> None:
    """Of changed columns; and not while a graph is captured, which has plain Triton's kernel."""
    product = Product(500, 1024, 1024, "blocks(32, 32)", "bfloat16", density=0.3)
    x, weights, _ = product.tensors("cuda")
    (weight,) = weights
    wanted = x.double() @ weight.dense().double().T
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        captured = run(product, target(), x, weights)
    for y in (captured, run(product, target(), x, weights)):
        assert (y.double() - wanted).norm() <= 4e-3 * wanted.norm()
    weight.index[1].copy_(31 - weight.index[1])  # mirrored, which leaves each list's columns apart
    wanted = x.double() @ weight.dense().double().T
    assert (run(product, target(), x, weights).double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("m", [4, 400])
def test_in_a_graph(m: int) -> None:
    product = Product(m, 1024, 1024, "blocks(64, 64)", "bfloat16")
    x, weights, _ = product.tensors("cuda")
    request, sizes = product.request(weights, target()), product.sizes(weights)
    backend = backend_of(target())
    kernel = backend.build(kernel_of(request, sizes, backend.default_config(request, sizes)), target())
    y = torch.empty(m, 1024, device="cuda", dtype=torch.bfloat16)
    kernel(x, weights, None, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(x, weights, None, y)
    wanted = y.clone()
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # which torch makes to keep its pool
@pytest.mark.parametrize("pattern", [sp.block(32, density=0.3), sp.n_of_m(2, 4)])
def test_compiled_into_graphs(pattern: sp.Pattern) -> None:
    """What is kept of a weight must not come from the pools of graphs."""
    layer = sp.linear(torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16) / 32, pattern)
    x = torch.randn(500, 1024, device="cuda", dtype=torch.bfloat16)
    wanted = x.double() @ layer.weight.dense().double().T
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(5):
            assert (compiled(x).double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("warm", [0, 1, 3])
@pytest.mark.parametrize("layout", ["blocks(32, 32)", "n_of_m(2, 4)"])
def test_captured_at_once(layout: str, warm: int) -> None:
    """Graphs of weights that were never used, or not often enough for their own form."""
    product = Product(500, 1024, 1024, layout, "bfloat16", density=0.3)
    x, weights, _ = product.tensors("cuda")
    other = Product(500, 1024, 1024, layout, "bfloat16", density=0.3, seed=1).tensors("cuda")[1]
    for _ in range(4):
        run(product, target(), x, other)  # what is compiled or searched once
    for _ in range(warm):
        run(product, target(), x, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(product, target(), x, weights)
    graph.replay()
    wanted = x.double() @ weights[0].dense().double().T
    assert (y.double() - wanted).norm() <= 4e-3 * wanted.norm()


def test_wide_addresses() -> None:
    product = Product(40000, 64, 64, "blocks(64, 64)", "bfloat16", density=1.0)
    x, weights, _ = product.tensors("cuda")
    apart = torch.zeros(40000, 65536, device="cuda", dtype=torch.bfloat16)[:, :64]
    apart.copy_(x)
    assert torch.equal(run(product, target(), apart, weights), run(product, target(), x, weights))


@pytest.mark.parametrize("layout", LAYOUTS + NARROW)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients(layout: str, dtype: str) -> None:
    check_gradient(Product(1000, 520, 700, layout, dtype), target(), "cuda")
    check_gradient(Product(33, 333, 777, layout, dtype, density=0.05), target(), "cuda")
