"""Products with sparse blocks through Triton, without a GPU: the interpreter, and compiling ahead of time."""

from __future__ import annotations

import re

import pytest

import spgen as sp
from spgen.backends.triton_binary import compile_ahead
from spgen.backends.triton_linear import build, build_sampled, default_config, sampled_config
from spgen.ir.kernel import option
from spgen.target import Target
from spgen.templates.gluon import linear as gluon_linear
from spgen.templates.triton import linear
from spgen.weights.compile import Request, Sizes, kernel_of, sampled_kernel_of
from spgen.weights.storage import Layout
from tests.interpreted import run_interpreted

TARGETS = ("sm_80", "sm_90", "gfx942")


def test_in_the_interpreter() -> None:
    run_interpreted("test_backend_triton_linear_interpreted.py")


def request(layout: str, target: str, dtype: str = "bfloat16", values: str = "", **options: object) -> Request:
    return Request(dtype, Layout.read(layout), values or dtype, bool(values), Target.of(target), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("m", [1, 8, 16, 64, 4096])
@pytest.mark.parametrize(("layout", "dtype"), [("blocks(128, 128)", "bfloat16"), ("blocks(32, 32)", "float32")])
def test_compiles_ahead_of_time(target: str, m: int, layout: str, dtype: str) -> None:
    one, sizes = request(layout, target, dtype, bias=True, activation="silu"), Sizes(m, 4096, 4096, 1000)
    kernel = build(kernel_of(one, sizes, default_config(one, sizes)), one.target)
    for entry in kernel.program.forms:
        binary = kernel.program.binary(entry)
        assert binary.code
        assert not binary.resources["spilled"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("values", ["int8", "int4", "float8_e4m3fn"])
def test_quantised_values_compile(target: str, values: str) -> None:
    for layout in ("blocks(64, 64)", "blocks(1, 16)"):
        one, sizes = request(layout, target, values=values), Sizes(4, 1024, 1024, 100)
        if target == "sm_80" and values.startswith("float8"):
            continue
        build(kernel_of(one, sizes, default_config(one, sizes)), one.target).program.binary("linear")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{"transposed": True}, {"gated": True, "activation": "silu"}])
def test_forms_compile(target: str, options: dict[str, object]) -> None:
    for m in (8, 512):
        one, sizes = request("blocks(64, 64)", target, **options), Sizes(m, 512, 512, 30)
        kernel = build(kernel_of(one, sizes, default_config(one, sizes)), one.target)
        for entry in kernel.program.forms:
            assert kernel.program.binary(entry, aligned=m == 512).code


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("layout", "dtype"), [("blocks(128, 128)", "bfloat16"), ("blocks(16, 16)", "float32")])
def test_gradients_compile(target: str, layout: str, dtype: str) -> None:
    one = request(layout, target, dtype)
    kernel = sampled_kernel_of(one, sampled_config(one, Sizes(4096, 4096, 4096, 1000)))
    assert build_sampled(kernel, one.target).program.binary("sampled").code


def test_few_long_lists_are_shared() -> None:
    for stored, m, shared in ((0.1, 16, False), (1.0, 16, True), (0.1, 1, False), (1.0, 1, False)):
        one, sizes = request("blocks(128, 128)", "h200"), Sizes(m, 1024, 4096, round(stored * 1024 * 4096))
        assert (default_config(one, sizes).option("splits") > 1) == shared


@pytest.mark.parametrize("m", [1, 2, 16, 64])
@pytest.mark.parametrize("layout", ["blocks(32, 32)", "blocks(64, 64)"])
def test_scales_are_those_of_sums(m: int, layout: str) -> None:
    one, sizes = request(layout, "h200", values="int8"), Sizes(m, 14336, 4096, 14336 * 410)
    step = default_config(one, sizes).option("step")
    assert m == 1 or step <= one.layout.cols


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("values", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"gated": True}])
def test_lanes_hold_columns_of_their_own(target: str, dtype: str, values: str, options: dict[str, object]) -> None:
    """Triton 3.6 gives some lanes the same columns of x again where a step has too few for what each of four reads."""
    if target == "sm_80" and values.startswith("float8"):
        return
    for m in (7, 16, 40):
        one, sizes = request("blocks(16, 16)", target, dtype, values, **options), Sizes(m, 520, 1000, 100)
        config = default_config(one, sizes).having(step=16, **({"tf32x3": 1} if dtype == "float32" else {}))
        kernel = kernel_of(one, sizes, config)
        program = build(kernel, one.target).program
        text = compile_ahead(program.specialised("linear"), one.target).asm["ttgir"]
        widths = [int(width) for width in re.findall(r"kWidth = (\d+)", text)]
        assert widths or "warp_group_dot" in text
        assert all(4 * width <= linear.shape_of(kernel).step for width in widths)


def test_kernels_are_shared() -> None:
    one, sizes = request("blocks(64, 64)", "h200"), Sizes(128, 512, 512, 30)
    kernel = kernel_of(one, sizes, default_config(one, sizes))
    assert build(kernel, one.target) is build(kernel, one.target)
    assert build(kernel, one.target) is not build(kernel, Target.of("sm_80"))


def test_tiles_that_do_not_fit() -> None:
    one, sizes = request("blocks(128, 128)", "sm_90"), Sizes(4096, 512, 512, 30)
    config = default_config(one, sizes).having(block_m=256, stages=5)
    kernel = build(kernel_of(one, sizes, config), one.target)
    assert kernel.hopper is not None
    with pytest.raises(sp.CompileError, match="shared memory"):
        kernel.hopper.program.binary("linear")


def test_alignment() -> None:
    one, sizes = request("blocks(64, 64)", "h200"), Sizes(8, 512, 512, 30)
    form = build(kernel_of(one, sizes, default_config(one, sizes)), one.target).program.forms["linear"]
    pointers = [16] * form.tensors
    assert form.allows(pointers, (512, 512, 512, 8, 8, 1))
    assert not form.allows(pointers, (513, 512, 512, 8, 8, 1))
    assert not form.allows([*pointers[1:], 8], (512, 512, 512, 8, 8, 1))


@pytest.mark.parametrize("layout", ["blocks(256, 256)", "blocks(64, 64)", "blocks(32, 32)", "blocks(16, 128)"])
@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"gated": True, "activation": "gelu", "bias": True}])
def test_hoppers_form_compiles(layout: str, options: dict[str, object]) -> None:
    one, sizes = request(layout, "h200", "float16", **options), Sizes(4096, 4096, 4096, 1000)
    kernel = build(kernel_of(one, sizes, default_config(one, sizes)), one.target)
    assert kernel.hopper is not None
    binary = kernel.hopper.program.binary("linear")
    assert binary.resources["spilled"] == 0
    assert kernel.program.binary("linear").code  # what serves tensors that tensor maps do not show


def test_hoppers_form_is_hoppers() -> None:
    for target, dtype in (("sm_80", "bfloat16"), ("sm_90", "float32"), ("gfx942", "bfloat16")):
        one, sizes = request("blocks(64, 64)", target, dtype), Sizes(4096, 4096, 4096, 1000)
        assert build(kernel_of(one, sizes, default_config(one, sizes)), one.target).hopper is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_hoppers_tiles_fit(transposed: bool, gated: bool) -> None:
    sides = (16, 32, 64, 128, 256)
    for rows in sides:
        for cols in sides:
            one = request(f"blocks({rows}, {cols})", "h200", transposed=transposed, gated=gated)
            sizes = Sizes(4096, 4096, 4096, 1000)
            kernel = kernel_of(one, sizes, default_config(one, sizes))
            lanes, width, per = gluon_linear.lanes(kernel), gluon_linear.width(kernel), gluon_linear.per(kernel)
            lists = 1 + gluon_linear.paired(kernel)
            step = (kernel["block_m"] + lists * width) * lanes * per
            elements = option(kernel, "stages", 0) * step + lists * kernel["block_m"] * width
            assert 2 * elements + 1024 <= one.target.smem_bytes, str(kernel)
