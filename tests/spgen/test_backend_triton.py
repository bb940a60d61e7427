"""The Triton backend without a GPU: binaries made ahead of time, and kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from spgen.backends import triton as backend
from spgen.backends.triton_compile import Variant, _register_cap, arguments, compile_variant, source_path
from spgen.cache import Cache
from spgen.errors import CompileError, ToolchainError, UnsupportedError
from spgen.ir.config import Config
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.settings import override
from spgen.target import Target
from tests.interpreted import run_interpreted
from tests.kernel_cases import CASES, MORE_CASES, causal, program, segment

CPU = Target.of("cpu")


def with_attributes(kernel: Op, **attrs: object) -> Op:
    """The same kernel with another dtype, head size or options."""
    return KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), **attrs})


def test_agrees_with_the_oracle_in_the_interpreter() -> None:
    run_interpreted("test_backend_triton_interpreted.py")


def test_the_interpreter_cannot_be_chosen_late(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ToolchainError, match="before the process starts"):
        backend.build(causal(16, 16).kernel, CPU)


def test_unequal_tiles_are_refused() -> None:
    kernel = program(segment("0", "kv_len"), block_m=48, block_n=64)
    with pytest.raises(UnsupportedError, match="block_m: got 48"):
        backend.build(kernel, CPU)


def test_the_source_is_a_file_that_is_kept() -> None:
    kernel = causal(64, 64).kernel
    built = backend.build(kernel, Target.of("sm_90"))
    assert built.path.read_text() == built.source
    assert source_path(kernel) == built.path
    assert backend.build(kernel, Target.of("sm_90")) is built


def test_a_new_variant_outlives_an_emptied_cache(tmp_path: Path) -> None:
    with override(cache_dir=tmp_path):
        built = backend.build(causal(64, 64).kernel, Target.of("sm_90"))
        assert built.path.is_file()
        Cache().clear()
        assert built.binary(Variant(negative=True)).code


def test_compiling_can_be_forbidden() -> None:
    from spgen.backends.triton_compile import binary

    kernel = causal(64, 32).kernel
    with override(no_compile=True), pytest.raises(CompileError, match="SPGEN_NO_COMPILE"):
        binary(kernel, source_path(kernel), Variant(), Target.of("sm_80"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_default_configurations_read_back(arch: str, head_dim: int, dtype: str) -> None:
    chosen = backend.default_config(head_dim, head_dim, dtype, Target.of(arch))
    assert Config.read(str(chosen)) == chosen
    assert chosen.option("warps") > 0


def test_products_of_float32_can_be_plain() -> None:
    target = Target.of("sm_90")
    assert "tf32x3=1" in backend.default_config(64, 64, "float32", target).options
    with override(float32="ieee"):
        chosen = backend.default_config(64, 64, "float32", target)
    assert "tf32x3=1" not in chosen.options
    kernel = with_attributes(causal(chosen.block_m, chosen.block_n).kernel, options=chosen.options)
    source = source_path(kernel)
    assert 'input_precision="ieee"' in source.read_text()
    assert "mma" not in compile_variant(kernel, source, Variant(aligned=True), target).asm["ptx"]


def test_registers_are_capped_where_it_helps() -> None:
    def cap(name: str, *options: str) -> int:
        return _register_cap(with_attributes(CASES[name](64, 64).kernel, options=("registers=128", *options)))

    assert cap("causal", "stages=1") == cap("gathered_columns", "stages=2") == 128
    assert cap("gathered_columns", "stages=1") == 168  # three programs of four warps instead of four
    assert cap("permuted") == 0  # its mask reads bits pair by pair


@pytest.mark.parametrize(
    ("arch", "name", "dtype", "head_dim"),
    [
        ("sm_80", "window_and_sink", "bfloat16", 128),
        ("sm_86", "causal", "float16", 256),
        ("sm_90", "causal", "bfloat16", 128),
        ("sm_90", "gathered_columns", "float32", 128),
        ("gfx942", "block_list", "float16", 128),
        ("sm_80", "biased_keys", "bfloat16", 128),
        ("sm_86", "packed_lists", "float32", 64),
        ("sm_90", "words", "bfloat16", 128),
        ("sm_90", "packed_alibi", "float16", 64),
        ("sm_100", "causal", "bfloat16", 128),
        ("sm_100", "packed_group", "float32", 128),
        ("gfx942", "capped_scores", "float32", 64),
        ("gfx942", "words", "bfloat16", 128),
    ],
)
def test_compiles_ahead_of_time(arch: str, name: str, dtype: str, head_dim: int) -> None:
    target = Target.of(arch)
    chosen = backend.default_config(head_dim, head_dim, dtype, target)
    kernel = (CASES | MORE_CASES)[name](chosen.block_m, chosen.block_n).kernel
    kernel = with_attributes(kernel, dtype=dtype, head_dim=head_dim, value_dim=head_dim, options=chosen.options)
    variant = Variant(aligned=True, tma=arch in ("sm_90", "sm_100") and dtype != "float32", cu_seqlens_k="i64")
    built = compile_variant(kernel, source_path(kernel), variant, target)
    assert built.metadata.shared <= target.smem_bytes
    if arch == "sm_90" and dtype != "float32":
        assert "wgmma.mma_async" in built.asm["ptx"]
    if variant.tma:
        assert "cp.async.bulk.tensor.4d" in built.asm["ptx"]
        assert sum(argument.type == "desc" for argument in arguments(kernel, variant)) == 2


def test_stages_give_way_to_shared_memory() -> None:
    kernel = with_attributes(causal(128, 128).kernel, dtype="float16", head_dim=256, options=("warps=8", "stages=3"))
    target = Target.of("sm_86")
    built = compile_variant(kernel, source_path(kernel), Variant(aligned=True), target)
    assert built.metadata.num_stages == 1
    assert built.metadata.shared <= target.smem_bytes


def test_a_tile_that_does_not_fit_is_an_error() -> None:
    kernel = with_attributes(causal(256, 128).kernel, dtype="float16", head_dim=256, options=("warps=8", "stages=2"))
    with pytest.raises(CompileError, match="shared memory"):
        compile_variant(kernel, source_path(kernel), Variant(aligned=True), Target.of("sm_86"))
