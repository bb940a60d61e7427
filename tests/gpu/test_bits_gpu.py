"""n-of-m and bitmap weights, and active neurons, against tensor operations on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spgen.backends import cusparselt
from spgen.backends.triton_bits import BitsProduct
from spgen.backends.triton_neurons import compact, down, up
from spgen.ir.config import Config
from spgen.target import Target
from spgen.weights import ops
from spgen.weights.compile import Sizes, kernel_of
from spgen.weights.storage import Layout, Stored, pack, quantized
from tests.neurons import Neurons
from tests.neurons import check as check_neurons
from tests.products import Product, check, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYOUTS = ("n_of_m(2, 4)", "n_of_m(1, 4)", "n_of_m(4, 8)", "n_of_m(6, 16)", "n_of_m(9, 64)", "n_of_m(2, 6)", "bitmap()")


def target() -> Target:
    return Target.of("cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2, 4, 7, 16, 50, 64, 300])
def test_products(layout: str, m: int) -> None:
    for k in (256, 1000, 77):
        check(Product(m, 333, k, layout, "bfloat16", density=0.6, bias=True), target(), "cuda")
        check(Product(m, 320, k, layout, "bfloat16", gated=True, bias=True, activation="silu"), target(), "cuda")
    check(Product(m, 333, 500, layout, "float32", activation="gelu"), target(), "cuda")
    check(Product(m, 333, 500, layout, "float16", transposed=True), target(), "cuda")


@pytest.mark.parametrize("values", ["float8_e4m3fn", "int8", "int4"])
@pytest.mark.parametrize("m", [1, 3, 8, 16, 64, 200])
def test_quantised_values(values: str, m: int) -> None:
    for k in (512, 322):
        for gated in (False, True):
            product = Product(
                m, 200, k, "n_of_m(2, 4)", "bfloat16", values, density=0.6, gated=gated, activation="relu"
            )
            check(product, target(), "cuda")
    if values != "int4":
        check(Product(m, 200, 322, "bitmap()", "bfloat16", values), target(), "cuda")


def test_all_places_of_a_group() -> None:
    """Every choice of up to two of four places, in every group of a chunk."""
    codes = [code for code in range(16) if code.bit_count() <= 2]
    for values in ("", "float8_e4m3fn", "int4"):
        for m in (1, 8, 16):
            product = Product(m, 16 * len(codes), 128, "n_of_m(2, 4)", "bfloat16", values, density=1.0)
            x, _, _ = product.tensors("cuda")
            row = torch.arange(16 * len(codes))[:, None]
            code = torch.tensor(codes)[(row + torch.arange(32)) % len(codes)]
            kept = (code[..., None] >> torch.arange(4) & 1).bool().flatten(1)
            weight = packed(kept, product)
            y = run(product, target(), x, [weight]).double()
            wanted = x.double() @ weight.dense().double().T
            assert (y - wanted).norm() <= 6e-3 * wanted.norm()


OTHERS = ("cores", "warps", "steps", "cusparselt", "dense", "programs", "splits", "together", "x_stages")
EXPANDED = (("warpgroups", 2), ("shares", 1), ("stages", 3), *((name, None) for name in OTHERS))


@pytest.mark.parametrize(
    ("values", "m"),
    [
        *((values, m) for values in ("", "float8_e4m3fn", "int8", "int4") for m in (8, 32, 64, 128, 256)),
        *((values, 4) for values in ("float8_e4m3fn", "int4")),  # tiles of 4 rows are for x in two parts
    ],
)
def test_expanded_weights(values: str, m: int) -> None:
    """Rows of x and of weights, and columns, that fill no tile; with one and with two warpgroups to a row."""
    for shares in (1, 2) if m <= 64 else (1,):
        for rows, n, k in ((m, 256, 1024), (m - 3, 328, 1152), (m - 1, 72, 384)):
            config = {**dict(EXPANDED), "block_m": m, "shares": shares}
            plain = Product(rows, n, k, "n_of_m(2, 4)", "bfloat16", values, density=0.7, config=tuple(config.items()))
            check(plain, target(), "cuda")
            check(replace(plain, bias=True, activation="silu"), target(), "cuda")
            if m < 256 and (shares == 1 or m <= 32):
                check(replace(plain, gated=True, bias=True, activation="gelu_tanh"), target(), "cuda")


@pytest.mark.parametrize("values", ["", "float8_e4m3fn", "int8", "int4"])
@pytest.mark.parametrize(("warpgroups", "programs"), [(1, 2), (2, 1)])
def test_weights_are_read_before_they_are_replaced(values: str, warpgroups: int, programs: int) -> None:
    """The same sums at each call: copies overtake reads only now and then, most often of two programs side by side."""
    options = {"warpgroups": warpgroups, "programs": programs, "shares": 2, "stages": 2, "together": 2, "x_stages": 8}
    config = {**dict(EXPANDED), **options, "block_m": 32}
    x, (rows,), _ = Product(32, 128, 4096, "n_of_m(2, 4)", "bfloat16", values, density=1.0).tensors("cuda")
    times = 112  # programs side by side on most multiprocessors
    scales = None if rows.scales is None else rows.scales.repeat(times)
    tall = (128 * times, 4096)
    weight = Stored(rows.layout, tall, rows.values.repeat(times, 1), (rows.index[0].repeat(times, 1),), scales)
    product = Product(32, *tall, "n_of_m(2, 4)", "bfloat16", values, density=1.0, config=tuple(config.items()))
    y = run(product, target(), x, [weight])
    wanted = (x.double() @ rows.dense().double().T).repeat(1, times)
    assert (y.double() - wanted).norm() <= 6e-3 * wanted.norm()
    for _ in range(200):
        assert torch.equal(run(product, target(), x, [weight]), y)


@pytest.mark.parametrize("values", ["", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("m", [8, 64, 128])
def test_tiles_that_programs_share(values: str, m: int) -> None:
    """From a step for each program to several tiles, two calls with the same counters, and in a graph."""
    for warpgroups in (1, 2):
        config = {**dict(EXPANDED), "block_m": m, "shares": 2 if m <= 64 else 1, "splits": 1, "warpgroups": warpgroups}
        for rows, n, k in ((m, 256, 1024), (m - 3, 328, 1152), (3 * m, 72, 256), (2 * m + 1, 9000, 512)):
            plain = Product(rows, n, k, "n_of_m(2, 4)", "bfloat16", values, density=0.7, config=tuple(config.items()))
            y = check(plain, target(), "cuda")
            x, weights, _ = plain.tensors("cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = run(plain, target(), x, weights)
            for _ in range(3):
                again.zero_()
                graph.replay()
                assert torch.equal(again, y)
        if m <= 32:
            gated = Product(m, 328, 1152, "n_of_m(2, 4)", "bfloat16", values, 0.7, config=tuple(config.items()))
            check(replace(gated, gated=True, bias=True, activation="silu"), target(), "cuda")


@pytest.mark.parametrize("values", ["float8_e4m3fn", "int4"])
def test_x_in_parts_of_float8(values: str) -> None:
    """Rows of any size, of zeros, with outliers, with infinity: the rounding of y is all that is left."""
    for m in (1, 6, 33):
        product = Product(m, 200, 4224, "n_of_m(2, 4)", "bfloat16", values, density=1.0)
        x, weights, _ = product.tensors("cuda")
        x *= 2.0 ** torch.arange(-60, 60, 120 / m, device="cuda")[:m, None]
        x[-1, 7] = 3e3 * x[-1].abs().max()
        x[0, ::2] *= 1e-3
        if m > 2:
            x[2] = 0.0
        y = run(product, target(), x, weights).double()
        wanted = x.double() @ weights[0].dense().double().T
        rounding = (wanted.bfloat16().double() - wanted).norm(dim=1)
        assert ((y - wanted).norm(dim=1) <= 1.2 * rounding + 2.0**-18 * wanted.abs().amax(1)).all()
        x[0, 5] = float("inf")
        again = run(product, target(), x, weights)
        assert again[0].isnan().all()
        assert torch.equal(again[1:].double(), y[1:])


def test_expanded_weights_that_no_tensor_map_expresses() -> None:
    config = tuple({**dict(EXPANDED), "block_m": 64}.items())
    check(Product(33, 200, 300, "n_of_m(2, 4)", "bfloat16", config=config), target(), "cuda")


def packed(kept: torch.Tensor, product: Product) -> Stored:
    weight = torch.randn(kept.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    stored = pack(weight.cuda(), kept.cuda(), Layout("n_of_m", 2, 4))
    return quantized(stored, product.values) if product.values else stored


@pytest.mark.skipif(not torch.cuda.is_available() or not cusparselt.is_there(Target.of("cuda")), reason="no cuSPARSELt")
@pytest.mark.parametrize("m", [65, 512, 1000])
def test_cusparselt(m: int) -> None:
    product = Product(m, 256, 512, "n_of_m(2, 4)", "bfloat16", density=0.9, bias=True)
    check(product, target(), "cuda")
    x, weights, _ = Product(m, 256, 512, "n_of_m(2, 4)", "bfloat16", density=0.9).tensors("cuda")
    plain = Product(m, 256, 512, "n_of_m(2, 4)", "bfloat16", density=0.9)
    first = run(plain, target(), x, weights)
    for _ in range(4):  # from the third call on with the library's form as it was kept
        torch.testing.assert_close(run(plain, target(), x, weights), first)
    weights[0].values.mul_(2)  # it is made anew
    for _ in range(4):
        torch.testing.assert_close(run(plain, target(), x, weights), 2 * first)
    with torch.inference_mode():
        inferred = [replace(one, values=one.values.clone()) for one in weights]
        for _ in range(4):
            torch.testing.assert_close(run(plain, target(), x, inferred), 2 * first)
    y = ops.product(x.view(1, m, 512), tuple(weights), None, "none")
    assert y.is_contiguous()
    assert torch.equal(y[0], 2 * first)


def test_graphs_and_bits() -> None:
    """The same bits at each replay, for weights and inputs that changed in place."""
    product = Product(16, 1024, 1024, "n_of_m(2, 4)", "bfloat16")
    x, weights, _ = product.tensors("cuda")
    run(product, target(), x, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(product, target(), x, weights)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run(product, target(), x, weights))


@pytest.mark.parametrize(("m", "rows"), [(1, 1), (5, 1), (9, 4), (16, 16), (64, 64), (70, 16), (300, 100), (500, 500)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neurons(m: int, rows: int, dtype: str) -> None:
    for positive, gated in ((False, True), (True, False)):
        call = Neurons(m, rows, 3000, 264, 520, dtype, positive, gated, bias=True, threshold=1.2)
        check_neurons(call, "cuda")
        check_neurons(Neurons(m, rows, 997, 77, 131, dtype, positive, gated, threshold=9.0, on_device=True), "cuda")
    check_neurons(Neurons(m, rows, 997, 264, 131, dtype, gated=False, twofold=True, bias=True), "cuda")


def test_neurons_in_two_graphs_at_once() -> None:
    """Graphs that run beside each other share no counters."""
    t = Neurons(1, 1, 4096, 256, 2048, "bfloat16").tensors("cuda")

    def call() -> torch.Tensor:
        index, count = compact(t["scores"], 1.0)
        return down(up(t["x"], t["w_up"], index, count, t["scores"]), t["w_down"], index, count)

    wanted = call()
    graphs, results = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            results.append(call())
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in results)


WALK = (("walk", 1), ("warps", 16), ("words", 64))


@pytest.mark.parametrize(
    ("m", "density"), [(1, 0.0), (1, 0.04), (1, 1.0), (2, 0.3), (3, 0.0), (3, 0.2), (4, 1.0), (8, 0.1)]
)
def test_bitmaps_are_walked(m: int, density: float) -> None:
    for k in (77, 256, 1000, 4096, 9001):
        product = Product(m, 333, k, "bitmap()", "bfloat16", density=density, bias=True, activation="silu", config=WALK)
        check(product, target(), "cuda")
    for dtype in ("float32", "float16"):
        check(Product(m, 100, 500, "bitmap()", dtype, density=density, gated=True, config=WALK), target(), "cuda")
    for values in ("int8", "float8_e4m3fn"):
        product = Product(m, 200, 4200, "bitmap()", "bfloat16", values, density, gated=m > 2, config=WALK)
        check(product, target(), "cuda")


@pytest.mark.parametrize(("m", "rows"), [(1, 16), (5, 48)])
def test_bitmaps_whose_rows_differ(m: int, rows: int) -> None:
    """Every place of a word alone, empty and full rows; a row's NaN stays there; more rows of x than a kernel's."""
    kept = torch.eye(192, dtype=torch.bool)
    kept[3], kept[5], kept[190] = False, True, True
    weight = torch.randn(192, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[7, 7] = torch.nan
    stored = pack(weight.cuda(), kept.cuda(), Layout("bitmap"))
    request = Product(m, 192, 192, "bitmap()", "bfloat16").request([stored], target())
    config = Config(2 if m > 1 else 1, rows, ("walk=1", "warps=16", "words=32"))
    x = torch.randn(m, 192, device="cuda", dtype=torch.bfloat16)
    y = torch.full_like(x, torch.inf)
    BitsProduct(kernel_of(request, Sizes(m, 192, 192, 576), config), target())(x, [stored], None, y)
    wanted = x.double() @ torch.where(kept, weight, 0).cuda().double().T
    assert y[:, 7].isnan().all()
    others = torch.arange(192) != 7
    assert (y.double() - wanted)[:, others].norm() <= 6e-3 * wanted[:, others].norm()
