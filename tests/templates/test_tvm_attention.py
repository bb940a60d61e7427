"""The rendered builder code: what the templates decide, and what they leave out."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from spgen.errors import UnsupportedError
from spgen.ir.config import Config
from spgen.target import Target
from spgen.templates.tvm.attention import attention_source
from spgen.templates.tvm.schedule import DTYPES, default_tiles, isa_of, key_rows, products, scratch_size, value_rows
from tests.kernel_cases import (
    CASES,
    MORE_CASES,
    causal,
    causal_parts,
    let,
    packed_causal,
    program,
    scalar_offset,
    segment,
    table,
)

AVX512 = Target(kind="cpu", name="test", arch="x86-64-v4", isa="avx512", simd=16, registers=32)
AVX2 = Target(kind="cpu", name="test", arch="x86-64-v3", isa="avx2", simd=8, registers=16)


def functions(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", [*CASES, *MORE_CASES])
@pytest.mark.parametrize("strided", [False, True])
def test_rendered_code_is_python_and_quotes_its_kernel(name: str, strided: bool) -> None:
    kernel = {**CASES, **MORE_CASES}[name](64, 64).kernel
    source = attention_source(kernel, AVX512, strided=strided)
    assert "attention" in functions(source)
    assert str(kernel) in (ast.get_docstring(ast.parse(source), clean=False) or "")
    assert "\n\n\n\n" not in source
    assert all(line == line.rstrip() for line in source.splitlines())


def test_rendering_is_deterministic() -> None:
    assert attention_source(causal(64, 64).kernel, AVX512) == attention_source(causal(64, 64).kernel, AVX512)


def test_absent_parts_leave_no_trace() -> None:
    source = attention_source(scalar_offset(64, 64).kernel, AVX512)
    assert 'T.arg("q_offset", T.int32())' in source
    assert '"lse"' not in source
    assert "kv_lengths[b]" not in source
    assert "column_of" not in source


def test_a_mask_keeps_what_it_reads() -> None:
    kernel = program(
        let("near", "i - 3", "row"), let("odd", "r % 2 == 1", "row"), segment("0", "9", mask="odd & (c < i)")
    )
    source = attention_source(kernel, AVX512)
    assert "near_of" not in source
    assert "odd_of = cells" in source
    assert "column_of = cells" in source


def test_what_a_mask_reads_of_tables_is_read_once_a_column() -> None:
    mask = "(word(bits, 0, 64 * tile - j) >> near & 1 != 0) & (bit(bits, 0, p) | (load(bits, 0, r) < c)) & (c < 5)"
    kernel = program(table("bits"), let("near", "i & 31", "row"), segment("0", "9", mask=mask))
    source = attention_source(kernel, AVX512)
    assert "column_1 = word(bits_table, 0, tile * 64 - j)" in source
    assert "column_2 = bit(bits_table, 0, p)" in source
    assert "store(column_2_of, lanes(x * LANES), number(column_2))" in source
    assert "unequal(column_1 >> near & 1, 0)" in source
    assert "unequal(column_2_of[x], 0)" in source
    assert "load(bits_table, 0, r)" in source
    assert "column_3" not in source


def test_one_copy_of_the_matrix_products_for_all_segments() -> None:
    many = program(*(segment(str(64 * n), str(64 * n + 64), name=f"run{n}") for n in range(9)))
    source = attention_source(many, AVX512)
    assert source.count("query[g] * key") == 1
    assert source.count("weight[g] * value") == 1


def test_names_of_lets_do_not_clash_with_the_template() -> None:
    clashing = ("scratch", "for", "end_1", "i_of", "x")
    lets = [let(name, "tile + 1") for name in clashing]
    source = attention_source(program(*lets, segment("0", " + ".join(clashing))), AVX512)
    assert 'stop_1 = opaque("stop_1", scratch_ + for_ + end_1_ + i_of_ + x_)' in source


def test_a_row_of_the_isa_table_decides_the_tile() -> None:
    source = attention_source(program(*causal_parts(32), block_m=32), AVX2)
    assert "LANES = 8" in source
    assert "scalef" not in source
    assert default_tiles(AVX2) == Config(16, 64, ("key_rows=6", "value_rows=6"))


@pytest.mark.parametrize(("value_dim", "rows"), [(64, 4), (80, 5), (50, 5), (7, 6), (128, 6), (1, 6)])
def test_register_tiles(value_dim: int, rows: int) -> None:
    kernel = program(segment("0", "9"), value_dim=value_dim)
    assert key_rows(kernel, isa_of(AVX512)) == 4
    assert value_rows(kernel, isa_of(AVX512)) == rows
    assert scratch_size(kernel, AVX512) == (64 + value_dim + 64) * 64


def test_the_schedule_overrides_register_tiles() -> None:
    kernel = program(segment("0", "9"), options=["key_rows=6", "value_rows=3"])
    assert (key_rows(kernel, isa_of(AVX512)), value_rows(kernel, isa_of(AVX512))) == (6, 3)
    assert scratch_size(kernel, AVX512) == (64 + 64 + 66) * 64


def test_packed_heads_share_a_tile() -> None:
    source = attention_source(packed_causal(64, 64).kernel, AVX512)
    assert "PACK = 3" in source
    assert "(at < ROWS * PACK)" in source


def test_what_the_products_multiply() -> None:
    isa, pairs = isa_of(AVX512), isa_of(replace(AVX512, isa="avx512_bf16"))
    kernels = {dtype: program(segment("0", "9"), dtype=dtype) for dtype in DTYPES}
    assert products(kernels["float32"], pairs, strided=True) == "direct"
    assert products(kernels["bfloat16"], pairs, strided=False) == "pairs"
    assert products(kernels["bfloat16"], pairs, strided=True) == "widened"
    assert products(kernels["bfloat16"], isa, strided=False) == "widened"
    assert products(kernels["float16"], pairs, strided=False) == "widened"
    odd = program(segment("0", "9"), dtype="bfloat16", head_dim=33)
    assert products(odd, pairs, strided=False) == "widened"


def test_only_what_is_needed_is_linked() -> None:
    sources = {dtype: attention_source(program(segment("0", "9"), dtype=dtype), AVX512) for dtype in DTYPES}
    assert "spgen_widen" not in sources["float32"]
    assert "fpext <16 x half>" in sources["float16"]
    assert "dpbf16" not in sources["bfloat16"]


def test_other_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        attention_source(program(segment("0", "9"), dtype="float64"), AVX512)
