"""Products with n-of-m and bitmap weights without a GPU: the interpreter, and compiling ahead of time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import spgen as sp
from spgen.backends import cusparselt
from spgen.backends.gluon_bits import ExpandedProduct
from spgen.backends.triton_binary import compile_ahead
from spgen.backends.triton_bits import BitsProduct, LibraryProduct
from spgen.ir.config import Config
from spgen.target import Target
from spgen.weights import ops
from spgen.weights.compile import Request, ResultKernel, Sizes, config_of, kernel_of
from spgen.weights.storage import Layout
from tests.interpreted import run_interpreted

SMALL = Sizes(1, 64, 64, 9)
TARGETS = ("sm_80", "sm_90", "gfx942")


def test_in_the_interpreter() -> None:
    run_interpreted("test_backend_triton_bits_interpreted.py")


def built(request: Request, sizes: Sizes) -> BitsProduct:
    return BitsProduct(kernel_of(request, sizes, config_of(request, sizes)), request.target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("layout", "m"),
    [("n_of_m(2, 4)", 1), ("n_of_m(2, 4)", 16), ("n_of_m(4, 8)", 4), ("bitmap()", 1), ("bitmap()", 512)],
)
def test_compiles_ahead_of_time(target: str, m: int, layout: str) -> None:
    request = Request(
        "bfloat16", Layout.read(layout), "bfloat16", False, Target.of(target), bias=True, activation="silu"
    )
    kernel = built(request, Sizes(m, 4096, 4096, 1000))
    for entry in kernel.program.forms:
        binary = kernel.program.binary(entry, aligned=m > 1)
        assert binary.code
        assert not binary.resources["spilled"]


@pytest.mark.parametrize(
    ("target", "values", "m"),
    [("sm_90", "float8_e4m3fn", 1), ("sm_90", "int4", 16), ("sm_90", "int8", 1), ("sm_80", "int8", 1),
     ("gfx942", "int4", 1), ("gfx942", "float8_e4m3fn", 512)],
)  # fmt: skip
def test_quantised_values_compile(target: str, values: str, m: int) -> None:
    request = Request("bfloat16", Layout.read("n_of_m(2, 4)"), values, True, Target.of(target), gated=True)
    kernel = built(request, Sizes(m, 1024, 1024, 100))
    for entry in kernel.program.forms:
        assert kernel.program.binary(entry).code


@pytest.mark.parametrize(
    ("target", "values", "m", "cores"),
    [("sm_90", "bfloat16", 1, 1), ("sm_80", "bfloat16", 8, 1), ("sm_90", "int8", 1, 1), ("sm_90", "int4", 1, 0),
     ("sm_80", "int4", 8, 0),
     ("gfx942", "bfloat16", 8, 0), ("sm_90", "bfloat16", 512, 0)],
)  # fmt: skip
def test_where_sparse_tensor_cores_are_used(target: str, values: str, m: int, cores: int) -> None:
    scales = values != "bfloat16"
    request = Request("bfloat16", Layout.read("n_of_m(2, 4)"), values, scales, Target.of(target))
    assert config_of(request, Sizes(m, 14336, 1024, 100)).option("cores") == cores
    assert config_of(request, Sizes(m, 14336, 1023, 100)).option("cores") == 0


@pytest.mark.parametrize(
    ("m", "values", "gated", "options"),
    [(64, "bfloat16", False, ("shares=2", "stages=2")), (256, "bfloat16", False, ("stages=2",)),
     (128, "float8_e4m3fn", True, ("stages=3",)), (8, "int4", False, ("shares=2", "together=2")),
     (16, "int8", True, ("shares=2",)), (64, "bfloat16", False, ("shares=2", "x_stages=4", "stages=2", "programs=2")),
     (64, "bfloat16", False, ("shares=2", "splits=1")), (16, "int4", True, ("shares=1", "splits=1")),
     (32, "bfloat16", False, ("shares=2", "x_stages=4", "together=2", "programs=2", "splits=1")),
     (4, "float8_e4m3fn", False, ("shares=2", "x_stages=8", "together=2", "programs=2")),
     (4, "int4", False, ("shares=2", "x_stages=8", "together=2", "programs=2")),
     (16, "float8_e4m3fn", True, ("shares=2",)),
     (16, "float8_e4m3fn", False, ("shares=2", "x_stages=8", "together=2", "programs=2", "splits=1"))],
)  # fmt: skip
def test_expanded_weights_compile(m: int, values: str, gated: bool, options: tuple[str, ...]) -> None:
    scales = values != "bfloat16"
    request = Request(
        "bfloat16", Layout.read("n_of_m(2, 4)"), values, scales, Target.of("sm_90"), gated=gated, bias=True
    )
    warpgroups = "warpgroups=1" if "programs=2" in options else "warpgroups=2"
    one = kernel_of(request, Sizes(m, 8192, 4096, 2048), Config(m, 128, (warpgroups, *options)))
    kernel = ExpandedProduct(one, request.target)
    for entry in kernel.program.forms:
        assert not kernel.program.binary(entry).resources["spilled"]


@pytest.mark.parametrize(("m", "values"), [(8, "bfloat16"), (32, "int4"), (64, "float8_e4m3fn"), (16, "int8")])
def test_weights_are_read_before_they_are_replaced(m: int, values: str) -> None:
    """Copies by tensor maps are ordered behind what threads have read by a fence alone."""
    request = Request("bfloat16", Layout.read("n_of_m(2, 4)"), values, values != "bfloat16", Target.of("sm_90"))
    sizes = Sizes(m, 14336, 4096, 2048)
    program = ExpandedProduct(kernel_of(request, sizes, config_of(request, sizes)), request.target).program
    text = compile_ahead(program.specialised("linear"), request.target).asm["ptx"]
    last = ""
    for one in re.findall(r"ld\.shared\.v|fence\.proxy\.async|mbarrier\.arrive\.shared", text):
        assert (last, one) != ("ld.shared.v", "mbarrier.arrive.shared")
        last = one
    assert {"ld.shared.v", "fence.proxy.async"} <= set(re.findall(r"ld\.shared\.v|fence\.proxy\.async", text))


def test_where_weights_are_expanded() -> None:
    request = Request("bfloat16", Layout.read("n_of_m(2, 4)"), "bfloat16", False, Target.of("sm_90"))
    for m, n, k, splits in ((64, 14336, 4096, 0), (3, 14336, 4096, 0), (64, 4096, 14336, 1), (1, 4096, 14336, 1)):
        config = config_of(request, Sizes(m, n, k, 2048))
        assert config.option("warpgroups") == (1 if m < 64 else 2)
        assert config.option("splits") == splits
    few = Request("bfloat16", Layout.read("n_of_m(2, 4)"), "float8_e4m3fn", True, Target.of("sm_90"))
    for m, rows, programs in ((1, 4, 2), (16, 16, 2), (32, 32, 0), (64, 64, 0), (100, 128, 0)):
        config = config_of(few, Sizes(m, 14336, 4096, 2048))
        assert (config.block_m, config.option("programs")) == (rows, programs)
    for m, n, k in ((1, 14336, 4096), (512, 14336, 4096), (64, 14336, 4095), (64, 14336, 4160)):
        assert config_of(request, Sizes(m, n, k, 2048)).option("warpgroups") == 0
    ampere = Request("bfloat16", Layout.read("n_of_m(2, 4)"), "bfloat16", False, Target.of("sm_80"))
    asked = kernel_of(ampere, Sizes(64, 14336, 4096, 2048), Config(64, 128, ("warpgroups=2",)))
    assert BitsProduct(asked, ampere.target).kernel["options"][0] == "cores=1"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("dtype", "values", "m", "gated"),
    [("bfloat16", "", 1, True), ("float32", "", 4, False), ("float16", "", 8, False), ("bfloat16", "int8", 2, True),
     ("bfloat16", "float8_e4m3fn", 1, False)],
)  # fmt: skip
def test_bitmaps_that_are_walked_compile(target: str, dtype: str, values: str, m: int, gated: bool) -> None:
    """x alone is in shared memory, whose beginning the walk takes for x's."""
    request = Request(
        dtype, Layout("bitmap"), values or dtype, bool(values), Target.of(target), gated=gated, bias=True,
        activation="gelu",
    )  # fmt: skip
    kernel = built(request, Sizes(m, 4096, 5000, 1000))
    config = config_of(request, Sizes(m, 4096, 5000, 1000))
    assert config.option("walk")
    for aligned in (True, False):
        binary = kernel.program.binary("linear", aligned)
        assert binary.resources["shared"] == m * 64 * 4 * int(config.option("words") or 0)
        assert not binary.resources["spilled"]


@pytest.mark.parametrize(
    ("m", "share", "target", "transposed", "walks"),
    [(1, 0.1, "sm_90", False, True), (3, 0.3, "sm_80", False, True), (8, 0.1, "sm_90", False, True),
     (1, 0.6, "sm_90", False, False), (8, 0.3, "sm_90", False, False), (9, 0.05, "sm_90", False, False),
     (1, 0.1, "gfx942", False, False), (1, 0.1, "sm_90", True, False)],
)  # fmt: skip
def test_where_bitmaps_are_walked(m: int, share: float, target: str, transposed: bool, walks: bool) -> None:
    for gated in (False, True) if not transposed else (False,):
        request = Request("bfloat16", Layout("bitmap"), "bfloat16", False, Target.of(target), transposed, gated)
        stored = round(share * 1024 * 512) * (1 + gated)
        assert bool(config_of(request, Sizes(m, 1024, 512, stored)).option("walk")) == walks


def test_sparse_products_are_in_the_binary() -> None:
    request = Request("bfloat16", Layout.read("n_of_m(2, 4)"), "bfloat16", False, Target.of("sm_90"))
    kernel = built(request, Sizes(1, 1024, 1024, 100))
    assert "mma.sp::ordered_metadata" in kernel.program.path.read_text(encoding="utf-8")


def test_cusparselt_is_refused_without_a_gpu_or_where_it_does_not_fit() -> None:
    request = Request("bfloat16", Layout.read("n_of_m(2, 4)"), "bfloat16", False, Target.of("sm_90"))
    for one in (Target.of("cpu"), Target.of("gfx942")):
        assert not cusparselt.is_there(one)
    assert not cusparselt.serves(request, Sizes(512, 1024, 1000, 100))
    gated = Request("bfloat16", Layout.read("n_of_m(2, 4)"), "bfloat16", False, Target.of("sm_90"), gated=True)
    assert not cusparselt.serves(gated, Sizes(512, 1024, 1024, 100))


def test_a_kernel_may_make_the_result_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __call__(self, x: Any, weights: Any, bias: Any, y: torch.Tensor) -> None:
            raise AssertionError("its result would be copied")

        def precompile(self) -> dict[str, int]:
            return {}

        def result(self, x: torch.Tensor, weights: Any, bias: torch.Tensor | None) -> torch.Tensor:
            return torch.nn.functional.linear(x, weights[0].dense(), bias)

    kernel = built(Request("bfloat16", Layout.read("bitmap()"), "bfloat16", False, Target.of("sm_90")), SMALL)
    assert not isinstance(kernel, ResultKernel)
    assert isinstance(LibraryProduct(kernel.kernel, kernel.target), ResultKernel)
    monkeypatch.setattr(ops, "linear_kernel", lambda request, sizes: Library())
    monkeypatch.setattr(ops, "_ready", {})
    layer = sp.linear(torch.randn(24, 40), sp.n_of_m(2, 4), bias=torch.randn(24))
    for shape in ((40,), (5, 40), (2, 3, 40), (0, 40)):
        x = torch.randn(shape)
        wanted = torch.nn.functional.linear(x, layer.weight.stored.dense(), layer.bias)
        torch.testing.assert_close(layer(x), wanted)


def test_kernels_of_different_tiles_have_different_sources() -> None:
    request = Request("bfloat16", Layout.read("bitmap()"), "bfloat16", False, Target.of("sm_90"))
    paths = {
        BitsProduct(kernel_of(request, Sizes(1, 64, 64, 9), Config(1, rows, ("warps=4",))), request.target).program.path
        for rows in (4, 8)
    }
    assert len(paths) == 2


def test_products_of_many_rows_render_what_they_launch() -> None:
    """Not the product with a tile of theirs, which has a line for each row of x and each row of weights."""
    request = Request("bfloat16", Layout.read("bitmap()"), "bfloat16", False, Target.of("sm_90"))
    text = built(request, Sizes(512, 1024, 1024, 100)).program.path.read_text(encoding="utf-8")
    assert "def unpack(" in text
    assert "def linear(" not in text
    assert text.count("\n") < 300
