"""What CPU kernels of sparse weights look like, as code for TVM's builder."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import pytest

from spgen.backends.tvm_linear import default_config
from spgen.errors import UnsupportedError
from spgen.ir.kernel import ACTIVATIONS
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.tvm.weights.linear import linear_source, sampled_source
from spgen.templates.tvm.weights.schedule import linear_tiles, sampled_tiles
from spgen.weights.compile import Request, Sizes, kernel_of, sampled_kernel_of
from spgen.weights.storage import Layout

AVX512 = Target(kind="cpu", name="test", arch="x86-64-v4", isa="avx512", simd=16, registers=32)
AVX2 = replace(AVX512, arch="x86-64-v3", isa="avx2", simd=8, registers=16)
NEON = replace(AVX512, arch="generic", isa="neon", simd=4)


def kernel(text: str = "blocks(64, 64)", m: int = 64, target: Target = AVX512, **given: Any) -> Op:
    given = {"dtype": "float32", "values": "float32", "scales": False, **given}
    request = Request(layout=Layout.read(text), target=target, **given)
    return kernel_of(request, Sizes(m, 256, 256, 0), default_config(request, Sizes(m, 256, 256, 0)))


def test_blocks_of_fp32_are_used_as_they_lie() -> None:
    source = linear_source(kernel(), AVX512)
    assert "values_0[block * T.int64(ROWS * COLS) + wide(j * COLS + d)]" in source
    assert "PANEL_STEP" not in source
    assert "d * COLS + j" in linear_source(kernel(transposed=True), AVX512)
    assert "PANEL_STEP" in linear_source(kernel(values="int8", scales=True), AVX512)


def test_few_rows_are_dot_products() -> None:
    few, many = (linear_source(kernel(m=m), AVX512) for m in (1, 100))
    assert "DOT_ROWS" in few
    assert "GROUPS" in many
    assert "DOT_ROWS" not in many


def test_sizes_fit_the_vector_extension() -> None:
    sizes = (1, 4, 5, 16, 33, 100, 512)
    assert [linear_tiles(m, "blocks", 64, False, AVX512).block_m for m in sizes] == [1, 4, 16, 16, 48, 64, 64]
    assert [linear_tiles(m, "bitmap", 1, False, AVX512).block_m for m in sizes] == [1, 4, 6, 16, 48, 64, 64]
    assert linear_tiles(100, "blocks", 64, False, AVX2).block_m == 16
    assert linear_tiles(1, "blocks", 64, True, AVX512).block_m == 16
    assert [linear_tiles(64, "blocks", rows, False, AVX512).block_n for rows in (64, 32, 5, 1)] == [4, 4, 5, 6]


def test_only_vectors_of_which_half_is_stored_choose_from_x() -> None:
    for text, m, target, wanted in (
        ("n_of_m(2, 4)", 1, AVX512, True), ("n_of_m(8, 16)", 8, AVX512, True), ("n_of_m(1, 4)", 1, AVX512, False),
        ("n_of_m(16, 32)", 1, AVX512, False), ("n_of_m(2, 4)", 64, AVX512, False), ("n_of_m(2, 4)", 1, AVX2, False),
    ):  # fmt: skip
        assert ("add_chosen" in linear_source(kernel(text, m, target), target)) == wanted


def test_values_of_small_groups_pick_their_rows_of_x() -> None:
    for text, m, target, given, wanted in (
        ("n_of_m(2, 4)", 64, AVX512, {}, True), ("n_of_m(1, 8)", 64, AVX2, {}, True),
        ("n_of_m(2, 4)", 1, AVX512, {}, False), ("n_of_m(3, 4)", 64, AVX512, {}, False),
        ("n_of_m(8, 16)", 64, AVX512, {}, False),
        ("n_of_m(1, 8)", 64, AVX512, {"values": "int8", "scales": True}, False),
        ("n_of_m(2, 4)", 64, AVX512, {"transposed": True}, False), ("bitmap()", 64, AVX512, {}, False),
    ):  # fmt: skip
        assert ("places_of_group" in linear_source(kernel(text, m, target, **given), target)) == wanted


def test_only_vectors_of_fp32_may_go_past_the_caches() -> None:
    assert "is_streamed" in linear_source(kernel(m=64), AVX512)
    assert "is_streamed" not in linear_source(kernel(m=1), AVX512)
    assert "is_streamed" not in linear_source(kernel(m=64, dtype="bfloat16", values="bfloat16"), AVX512)


@pytest.mark.parametrize("text", ["blocks(32, 32)", "blocks(7, 5)", "n_of_m(2, 4)", "n_of_m(1, 3)", "bitmap()"])
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("target", [AVX512, AVX2])
def test_rendered_code_is_the_same_each_time_and_parses(text: str, m: int, target: Target) -> None:
    for activation in ACTIVATIONS:
        given = kernel(text, m, target, activation=activation, bias=True, gated=True)
        source = linear_source(given, target)
        ast.parse(source)
        assert source == linear_source(given, target)
        assert f"LANES = {target.simd}" in source


def test_masks_are_expanded_by_instructions_where_there_are_any() -> None:
    half = kernel("n_of_m(2, 4)", 1, values="int4", scales=True)
    assert "mask.expand" in linear_source(half, AVX512)
    assert "expandload" in linear_source(kernel("bitmap()", 1), AVX512)
    for text in ("bitmap()", "n_of_m(1, 3)"):
        assert "avx2.permps" in linear_source(kernel(text, 1, AVX2), AVX2)
        assert "neon.tbl1" in linear_source(kernel(text, 1, NEON), NEON)
    for target in (AVX2, NEON):
        assert f"ashr <{target.simd} x i32>" in linear_source(half, target)


def test_groups_that_are_not_full_are_spread_by_tables() -> None:
    """Where a byte of bits, or a vector's, holds whole groups; else bit by bit."""
    for text, target, spread in (
        ("n_of_m(2, 4)", AVX512, True), ("n_of_m(4, 8)", AVX512, True), ("n_of_m(8, 16)", AVX512, False),
        ("n_of_m(4, 8)", AVX2, True), ("n_of_m(1, 3)", AVX2, False), ("n_of_m(2, 4)", NEON, True),
    ):  # fmt: skip
        source = linear_source(kernel(text, 1, target), target)
        assert ("spgen_table_of_spread" in source and "rank = cells" not in source) == spread
        assert ("stored_count" in source) == (target is AVX512 or not spread)


def test_gradients() -> None:
    request = Request("float32", Layout.read("blocks(64, 48)"), "float32", False, AVX512)
    source = sampled_source(sampled_kernel_of(request, sampled_tiles()), AVX512)
    assert "TILE_ROWS, TILE_VECTORS = 9, 3" in source
    with pytest.raises(UnsupportedError, match="float64"):
        linear_source(kernel(dtype="float64"), AVX512)
