"""Products with sparse weights on this CPU, and as if it were another one, against float64."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spgen.backends import tvm_linear
from spgen.backends.tvm_linear import build, build_sampled
from spgen.errors import DeviceError, UnsupportedError
from spgen.ir.config import Config
from spgen.target import Target
from spgen.weights.compile import Request, Sizes, kernel_of, linear_kernel, sampled_kernel, sampled_kernel_of
from spgen.weights.storage import Layout, Stored, pack, quantized, values_dtype
from tests.cpu_kernels import CPU, HAS_AVX512, OTHERS

pytest.importorskip("tvm")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}
# of the result, beside what the sums of float32 lose
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
TYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["blocks(64, 64)", "blocks(32, 16)", "blocks(7, 5)", "blocks(1, 16)", "blocks(4, 40)", "n_of_m(2, 4)",
           "n_of_m(4, 8)", "n_of_m(1, 3)", "n_of_m(8, 16)", "bitmap()"]  # fmt: skip


def weight(
    n: int, k: int, text: str, share: float = 0.4, *, dtype: torch.dtype = torch.float32, values: str | None = None,
    seed: int = 0,
) -> Stored:  # fmt: skip
    """About `share` of the values of a weight [n, k]; of n_of_m, all that may be, unless it is less than half."""
    random = torch.Generator().manual_seed(seed)
    layout = Layout.read(text)
    r, c = layout.rows, layout.cols
    if layout.kind == "blocks":
        blocks = torch.rand(-(-n // r), -(-k // c), generator=random) < share
        mask = blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    elif layout.kind == "bitmap":
        mask = torch.rand(n, k, generator=random) < share
    else:
        rank = torch.rand(n, -(-k // c), c, generator=random).argsort(-1).argsort(-1)
        mask = (rank < r).flatten(1)[:, :k]
        mask &= (torch.rand(n, k, generator=random) < 2 * share) | (share > 0.3)
    stored = pack(torch.randn(n, k, generator=random).to(dtype), mask, layout)
    return stored if values is None else quantized(stored, values)


def check(
    stored: Stored, m: int, *, dtype: torch.dtype = torch.float32, target: Target = CPU, transposed: bool = False,
    up: Stored | None = None, bias: Tensor | None = None, activation: str = "none", x: Tensor | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Run a product over memory that was something else before, and compare."""
    n, k = stored.shape
    if x is None:
        x = torch.randn(m, n if transposed else k, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = [stored] if up is None else [stored, up]
    request = Request(
        str(dtype).removeprefix("torch."), stored.layout, values_dtype(stored), stored.scales is not None, target,
        transposed, up is not None, bias is not None, activation,
    )  # fmt: skip
    sizes = Sizes(m, n, k, stored.values.numel())
    found = torch.full((m, k if transposed else n), 7.0, dtype=dtype)
    kernel = linear_kernel(request, sizes) if config is None else build(kernel_of(request, sizes, config), target)
    kernel(x, weights, bias, found)
    expected, size = products(weights, x.double(), bias, activation, transposed)
    rounding = ROUNDING[dtype] * (1 + expected.abs()) + 1e-6 * size
    assert torch.all((found.double() - expected).abs() <= rounding)


def products(
    weights: list[Stored], x: Tensor, bias: Tensor | None, activation: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The product in float64, and the size of what was added up for it."""
    total, size = torch.ones(1), torch.ones(1)
    for n, stored in enumerate(weights):
        dense = stored.dense().double()
        dense = dense if transposed else dense.T
        one = x @ dense
        if n == 0:
            one = ACTIVATIONS[activation](one if bias is None else one + bias.double())
        total, size = total * one, size * (1 + x.abs() @ dense.abs())
    return total, size


@given(
    st.sampled_from(LAYOUTS), st.integers(1, 150), st.integers(1, 220), st.integers(0, 70),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(text: str, n: int, k: int, m: int, share: float, transposed: bool) -> None:
    check(weight(n, k, text, share), m, transposed=transposed)


@pytest.mark.parametrize("m", [1, 3, 16, 70])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_and_activations(activation: str, m: int) -> None:
    stored = weight(70, 90, "blocks(16, 32)")
    check(stored, m, bias=torch.randn(70), activation=activation)
    check(stored, m, bias=3 * torch.randn(70), activation=activation, up=weight(70, 90, "blocks(16, 32)", seed=1))


@pytest.mark.parametrize("m", [2, 33])
@pytest.mark.parametrize("text", ["n_of_m(2, 4)", "bitmap()", "blocks(1, 16)"])
def test_gates_of_other_storages(text: str, m: int) -> None:
    stored, up = (weight(70, 90, text, seed=seed) for seed in range(2))
    check(stored, m, up=up, bias=torch.randn(70), activation="silu")


def test_activations_of_extremes() -> None:
    stored = pack(torch.eye(16), torch.eye(16, dtype=torch.bool), Layout("blocks", 16, 16))
    x = torch.tensor(
        [-1e30, -100.0, -20.0, -9.0, -5.0, -1.0, -1e-3, -0.0, 0.0, 1e-20, 1e-3, 1.0, 5.0, 9.0, 100.0, 1e30]
    )
    for activation in ACTIVATIONS:
        check(stored, 1, x=x[None], activation=activation)
        check(stored, 40, x=x[None].expand(40, 16).contiguous(), activation=activation)


@pytest.mark.parametrize("dtype", TYPES[1:])
@pytest.mark.parametrize("m", [1, 6, 40])
@pytest.mark.parametrize("text", ["blocks(16, 16)", "blocks(7, 5)", "n_of_m(2, 4)", "bitmap()"])
def test_types_of_16_bits(text: str, m: int, dtype: torch.dtype) -> None:
    bias = torch.randn(50).to(dtype)
    check(weight(50, 100, text, dtype=dtype), m, dtype=dtype, bias=bias, activation="silu")
    check(weight(50, 100, text, dtype=dtype), m, dtype=dtype, transposed=True)


@pytest.mark.parametrize("values", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("m", [1, 6, 40])
@pytest.mark.parametrize("text", ["blocks(16, 16)", "blocks(7, 10)", "n_of_m(2, 4)", "n_of_m(2, 10)", "bitmap()"])
def test_quantized_values(text: str, m: int, values: str) -> None:
    if text == "bitmap()" and values == "int4":
        pytest.skip("no such storage")
    check(weight(50, 100, text, values=values), m)
    check(weight(50, 100, text, 0.1, values=values), m, dtype=torch.bfloat16)
    check(weight(50, 100, text, values=values), m, transposed=True)


def test_every_code_of_float8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    mask = torch.ones(16, 16, dtype=torch.bool)
    stored = pack(codes.view(16, 16), mask, Layout("blocks", 16, 16))
    check(quantized(stored, "float8_e4m3fn"), 3)


@pytest.mark.parametrize("m", [1, 5, 20])
def test_rows_of_x_at_any_distance(m: int) -> None:
    x = torch.randn(m, 300)[:, 7:135]
    check(weight(64, 128, "blocks(32, 32)"), m, x=x)
    check(weight(64, 128, "n_of_m(2, 4)"), m, x=x)


def test_values_beside_x_are_not_read() -> None:
    wide = torch.full((3, 96), float("nan"))
    wide[:, :50] = torch.randn(3, 50)
    for text in ("blocks(16, 16)", "blocks(7, 5)", "n_of_m(2, 4)", "bitmap()"):
        check(weight(40, 50, text), 3, x=wide[:, :50])


@HAS_AVX512
@pytest.mark.parametrize("isa", ["avx2", "sse2"])
@pytest.mark.parametrize("m", [1, 11, 24])
@pytest.mark.parametrize("text", ["blocks(16, 16)", "blocks(7, 5)", "n_of_m(2, 4)", "bitmap()"])
def test_narrower_vectors(text: str, m: int, isa: str) -> None:
    check(weight(50, 100, text), m, target=OTHERS[isa], bias=torch.randn(50), activation="gelu")
    check(weight(50, 100, text, values="int8"), m, target=OTHERS[isa], dtype=torch.float16)
    check(weight(50, 100, text), m, target=OTHERS[isa], transposed=True)


TARGETS = [CPU, *(pytest.param(OTHERS[isa], marks=HAS_AVX512) for isa in ("avx2", "sse2"))]
SPREAD = ["n_of_m(2, 4)", "n_of_m(1, 4)", "n_of_m(4, 8)", "n_of_m(4, 4)", "n_of_m(3, 12)", "bitmap()"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.isa)
@pytest.mark.parametrize("values", [None, "int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("text", SPREAD)
def test_values_that_are_spread(text: str, values: str | None, target: Target) -> None:
    """From groups that are full, and from others."""
    if (text, values) == ("bitmap()", "int4"):
        pytest.skip("no such storage")
    for share in (0.15, 1.0):
        check(weight(50, 260, text, share, values=values), 3, target=target)
        if text in ("n_of_m(2, 4)", "bitmap()"):
            check(weight(50, 260, text, share, values=values), 9, target=target, transposed=True)


@HAS_AVX512
@pytest.mark.parametrize("isa", ["avx2", "sse2"])
def test_pairs_in_a_byte_in_narrower_vectors(isa: str) -> None:
    check(weight(50, 100, "blocks(16, 16)", values="int4"), 3, target=OTHERS[isa])


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="pages as POSIX has them")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.isa)
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("text", ["blocks(16, 16)", "n_of_m(2, 4)", "n_of_m(4, 8)", "n_of_m(3, 12)", "bitmap()"])
def test_nothing_is_read_behind_the_values(text: str, values: str | None, target: Target) -> None:
    """They end where a page does that nobody may read."""
    if (text, values) == ("bitmap()", "int4"):
        pytest.skip("no such storage")
    for share in (0.15, 0.4):
        stored = weight(32, 192, text, share, values=values)
        ends = replace(stored, values=at_the_end_of_a_page(stored.values))
        check(ends, 2, target=target)
        check(ends, 17, target=target)


def at_the_end_of_a_page(tensor: Tensor) -> Tensor:
    """A copy, behind whose last byte begins a page that cannot be read."""
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + whole), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("text", ["n_of_m(1, 2)", "n_of_m(1, 4)", "n_of_m(2, 4)", "n_of_m(1, 8)", "n_of_m(3, 8)"])
def test_values_of_small_groups(text: str, values: str | None, share: float) -> None:
    check(weight(70, 200, text, share, values=values), 24, bias=torch.randn(70))


@pytest.mark.parametrize("m", [5, 8])
@pytest.mark.parametrize("text", ["n_of_m(2, 4)", "n_of_m(8, 16)", "n_of_m(1, 3)", "bitmap()"])
def test_more_columns_than_stay_near(text: str, m: int) -> None:
    check(weight(70, 2300, text), m, bias=torch.randn(70))


@HAS_AVX512
@pytest.mark.parametrize("target", [CPU, OTHERS["avx2"], OTHERS["sse2"]], ids=str)
@pytest.mark.parametrize(("n", "text"), [(128, "blocks(64, 64)"), (80, "blocks(7, 5)"), (77, "n_of_m(2, 4)")])
def test_large_results_go_past_the_caches(
    n: int, text: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(tvm_linear, "_STREAMED", 0)
    for m in (16, 50):
        stored = weight(n, 96, text)
        check(stored, m, target=target, bias=torch.randn(n), activation="relu")
        y = torch.full((m * n + 1,), 7.0)
        x = torch.randn(m, 96)
        request = Request("float32", stored.layout, "float32", False, target)
        linear_kernel(request, Sizes(m, n, 96, 0))(x, [stored], None, y[1:].view(m, n))  # at no whole place
        torch.testing.assert_close(y[1:].view(m, n), x @ stored.dense().T, atol=1e-4, rtol=1e-4)
        assert y[0] == 7


@pytest.mark.parametrize("device", ["aarch64", "riscv64"])
@pytest.mark.parametrize(
    ("text", "values"),
    [("blocks(32, 32)", "float32"), ("n_of_m(2, 4)", "float32"), ("n_of_m(2, 4)", "int8"), ("n_of_m(2, 4)", "int4"),
     ("bitmap()", "float8_e4m3fn")],
)  # fmt: skip
def test_other_processors_are_compiled_for(text: str, values: str, device: str) -> None:
    target = Target.of(device)
    for m in (1, 64):
        request = Request("float32", Layout.read(text), values, values != "float32", target, activation="gelu")
        kernel = linear_kernel(request, Sizes(m, 64, 64, 0))
        assert kernel.path.with_name("kernel.o").exists()
        with pytest.raises(DeviceError, match="one for this machine"):
            kernel(torch.zeros(1, 64), [weight(64, 64, text)], None, torch.zeros(1, 64))


def test_two_calls_give_the_same_bits() -> None:
    stored = weight(256, 512, "blocks(32, 32)")
    x, y, again = torch.randn(33, 512), torch.empty(33, 256), torch.empty(33, 256)
    request = Request("float32", stored.layout, "float32", False, CPU)
    kernel = linear_kernel(request, Sizes(33, 256, 512, stored.values.numel()))
    kernel(x, [stored], None, y)
    kernel(x, [stored], None, again)
    assert torch.equal(y, again)


def test_what_no_kernel_does_is_refused() -> None:
    request = Request("float32", Layout("blocks", 16, 16), "float32", False, CPU)
    sizes = Sizes(1, 64, 64, 0)
    with pytest.raises(UnsupportedError, match="block_m"):
        build(kernel_of(request, sizes, Config(CPU.simd + 1, 6)), CPU)
    with pytest.raises(UnsupportedError, match="block_m"):
        build(kernel_of(request, sizes, Config(64, 6, ("dots=1",))), CPU)
    with pytest.raises(UnsupportedError, match="dots"):
        build(kernel_of(Request("float32", Layout("blocks", 16, 16), "float32", False, CPU, True), sizes,
                        Config(1, 6, ("dots=1",))), CPU)  # fmt: skip
    with pytest.raises(UnsupportedError, match="float64"):
        build(kernel_of(Request("float64", Layout("blocks", 16, 16), "float64", False, CPU), sizes, Config(16, 6)), CPU)
    with pytest.raises(UnsupportedError, match="float8_e5m2"):
        build(kernel_of(Request("float32", Layout("blocks", 16, 16), "float8_e5m2", True, CPU), sizes, Config(16, 6)),
              CPU)  # fmt: skip


def check_gradient(
    stored: Stored, m: int, *, dtype: torch.dtype = torch.float32, values: torch.dtype | None = None,
    target: Target = CPU, distance: int = 0,
) -> None:  # fmt: skip
    n, k = stored.shape
    values = values or dtype
    random = torch.Generator().manual_seed(2)
    g, x = (torch.randn(m, size + distance, generator=random).to(dtype)[:, :size] for size in (n, k))
    names = [str(one).removeprefix("torch.") for one in (dtype, values)]
    request = Request(names[0], stored.layout, names[1], False, target)
    found = torch.full(stored.values.shape, 7.0, dtype=values)
    sampled_kernel(request, Sizes(m, n, k, found.numel()))(g, x, stored, found)
    whole = g.double().T @ x.double()
    ones = torch.ones(n, k, dtype=torch.bool)
    expected = pack(whole, stored.mask() & ones, stored.layout).values
    size = pack(g.double().abs().T @ x.double().abs(), stored.mask() & ones, stored.layout).values
    assert torch.all((found.double() - expected).abs() <= ROUNDING[values] * expected.abs() + 1e-6 * size)


@given(
    st.sampled_from(LAYOUTS[:5]), st.integers(1, 150), st.integers(1, 220), st.integers(0, 300),
    st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0, 3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_gradients_of_any_shape(text: str, n: int, k: int, m: int, share: float, distance: int) -> None:
    check_gradient(weight(n, k, text, share), m, distance=distance)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_gradients_of_16_bits(dtype: torch.dtype) -> None:
    for values in (dtype, torch.float32):
        check_gradient(weight(70, 90, "blocks(16, 32)"), 40, dtype=dtype, values=values)


@HAS_AVX512
@pytest.mark.parametrize("isa", ["avx2", "sse2"])
def test_gradients_in_narrower_vectors(isa: str) -> None:
    check_gradient(weight(70, 90, "blocks(16, 32)"), 140, target=OTHERS[isa])
    check_gradient(weight(70, 90, "blocks(7, 5)"), 9, target=OTHERS[isa], dtype=torch.float16)


def test_gradients_that_no_kernel_computes_are_refused() -> None:
    request = Request("bfloat16", Layout("blocks", 16, 16), "float16", False, CPU)
    with pytest.raises(UnsupportedError, match="gradient"):
        sampled_kernel(request, Sizes(1, 16, 16, 256))
    kernel = sampled_kernel_of(Request("float64", request.layout, "float64", False, CPU), Config(64, 1))
    with pytest.raises(UnsupportedError, match="float64"):
        build_sampled(kernel, CPU)
    with pytest.raises(UnsupportedError, match="block_m"):
        build_sampled(
            sampled_kernel_of(Request("float32", request.layout, "float32", False, CPU), Config(8192, 1)), CPU
        )
