"""The rendered Triton module: complete, readable, and without what a kernel does not need."""

from __future__ import annotations

import ast

import pytest

from spgen.errors import UnsupportedError
from spgen.ir.node import Op
from spgen.templates.render import render
from spgen.templates.triton import attention
from tests.kernel_cases import CASES, let, program, segment, table


def source(kernel: Op) -> str:
    return render("triton/attention.py.jinja", **attention.symbols(kernel))


def body(kernel: Op) -> str:
    return source(kernel).partition("def attention(")[2]


@pytest.mark.parametrize("name", CASES)
def test_takes_the_promised_parameters(name: str) -> None:
    kernel = CASES[name](64, 32).kernel
    module = ast.parse(source(kernel))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    taken = [argument.arg for argument in functions[attention.ENTRY].args.args]
    assert taken == [parameter.name for parameter in attention.parameters(kernel)]
    assert str(kernel).splitlines()[-1] in source(kernel)


@pytest.mark.parametrize("name", CASES)
def test_is_tidy(name: str) -> None:
    text = source(CASES[name](64, 32).kernel)
    assert "\n\n\n\n" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert text.endswith("\n")


def test_helpers_come_only_where_they_are_used() -> None:
    text = source(program(segment("0", "kv_len", full=("0", "kv_len"))))
    for name in ("load", "bit", "count_le", "floor_divide", "floor_modulo"):
        assert f"def {name}(" not in text


def test_a_full_loop_has_no_mask() -> None:
    full = body(program(segment("0", "kv_len", full=("0", "kv_len"), mask="j <= i"))).partition("num_stages=STAGES")[2]
    loop = full.partition("# rows without keys")[0]
    assert "mask=" not in loop
    assert "tl.where" not in loop


def test_a_loop_that_never_runs_is_left_out() -> None:
    short = (let("last", "min(kv_len, 31)"), segment("0", "kv_len", full=("0", "last"), mask="j <= i"))
    assert "n_full" not in body(program(*short, block_n=32))
    assert "n_full" in body(program(*short, block_n=16))


def test_columns_are_read_ahead_where_they_come_from_a_table() -> None:
    column = "load(blocks, tile, p // 64) * 64 + p % 64"
    listed = (table("blocks"), segment("0", "kv_len", full=("0", "kv_len"), column=column))
    text = body(program(*listed, options=["prefetch=1"]))
    assert "c_next = load(blocks_table, tile, p_next >> 6) * 64 + (p_next & 63)" in text
    assert "c_next" not in body(program(*listed))


def test_channels_are_masked_only_where_they_are_padded() -> None:
    assert "HEAD_DIM" not in body(program(segment("0", "kv_len"), head_dim=64, value_dim=64))
    text = body(program(segment("0", "kv_len"), head_dim=80, value_dim=64))
    assert "< HEAD_DIM" in text
    assert "< VALUE_DIM" not in text


def test_a_let_may_be_called_anything() -> None:
    names = ("acc", "q", "tile_", "load", "scores")
    lets = [let(name, "tile + 1") for name in names]
    text = body(program(*lets, segment("0", "acc + q", mask="j < load + scores")))
    assert "stop = let_acc + let_q" in text


def test_row_vectors_are_refused_outside_masks() -> None:
    with pytest.raises(UnsupportedError, match="segment run: stop"):
        attention.check(program(segment("0", "kv_len - i")))


@pytest.mark.parametrize(("channels", "lanes"), [(1, 16), (16, 16), (17, 32), (80, 128), (96, 128), (192, 256)])
def test_lanes(channels: int, lanes: int) -> None:
    assert attention.padded(channels) == lanes


@pytest.mark.parametrize(("dtype", "lanes"), [("bfloat16", 64), ("float16", 64), ("float32", 32)])
def test_rows_of_v_are_at_least_128_bytes(dtype: str, lanes: int) -> None:
    assert attention.value_lanes(16, dtype) == lanes
    assert attention.value_lanes(80, dtype) == 128
