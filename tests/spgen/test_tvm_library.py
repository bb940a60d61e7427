"""How CPU kernels come to be: the cache, the tools, what is compiled for processors elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from spgen import targets
from spgen.backends import tvm_compile, tvm_library
from spgen.backends.tvm import AttentionKernel, build, default_config
from spgen.errors import CacheWarning, CompileError, DeviceError, ToolchainError
from spgen.precompile import compile_text
from spgen.settings import override
from spgen.target import Target
from tests.cpu_kernels import ALL_CASES, BLOCK_M, CPU, run
from tests.kernel_cases import causal, dense, program, segment

pytest.importorskip("tvm")

# ELF's numbers of machines, and the multiply-add of a vector and a broadcast number
MACHINES = {"aarch64": (183, "fmla"), "riscv64": (243, "vfmacc.vf"), "x86_64": (62, "vfmadd231ps")}


def test_equal_kernels_are_built_once() -> None:
    assert build(causal(BLOCK_M, 64).kernel, CPU) is build(causal(BLOCK_M, 64).kernel, CPU)


def test_the_source_is_a_file() -> None:
    kernel = build(causal(BLOCK_M, 64).kernel, CPU)
    assert kernel.path is not None
    assert kernel.path.read_text() == kernel.source
    assert str(kernel.kernel) in kernel.source


def test_compiling_may_be_forbidden(tmp_path: Path) -> None:
    kernel = dense(BLOCK_M, 64).kernel
    with override(cache_dir=tmp_path, no_compile=True), pytest.raises(CompileError, match="SPGEN_NO_COMPILE"):
        AttentionKernel(kernel, CPU)


def test_missing_tvm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with override(cache_dir=tmp_path), pytest.raises(ToolchainError, match=r"pip install 'spgen\[cpu\]'"):
        AttentionKernel(dense(BLOCK_M, 64).kernel, CPU)


def test_without_a_linker_kernels_are_compiled_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tvm_compile, "linker", lambda: None)
    case = dense(BLOCK_M, 64)
    with override(cache_dir=tmp_path, log="off"):
        kernel = AttentionKernel(case.kernel, CPU)
    assert kernel.path is None
    assert "def attention" in kernel.source
    out = torch.empty(*case.q.shape[:3], 64)
    lse = torch.empty(case.q.shape[:3])
    kernel(case.q, case.k, case.v, out, lse, (), None, None, case.scale)
    torch.testing.assert_close(out, run(case)[0])


def test_a_linker_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tvm_compile, "linker", lambda: ["ld", "--no-such-option"])
    with override(cache_dir=tmp_path), pytest.raises(CompileError, match="linking with ld --no-such-option"):
        AttentionKernel(dense(BLOCK_M, 64).kernel, CPU)


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    case = dense(BLOCK_M, 64)
    with override(cache_dir=tmp_path):
        first = AttentionKernel(case.kernel, CPU)
        assert first.path is not None
        library = first.path.with_name("kernel.so")
        library.unlink()  # the first stays mapped
        library.write_bytes(bytes(library.with_name("kernel.py").stat().st_size))
        with pytest.warns(CacheWarning, match="damaged"):
            AttentionKernel(case.kernel, CPU)


def test_a_warm_process_imports_no_compiler(tmp_path: Path) -> None:
    program_text = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from spgen.backends.tvm import build
from spgen.ir.kernel import KERNEL
from spgen.target import Target, _cpuinfo
kernel = build(KERNEL.read(sys.stdin.read()), Target.of("cpu"))
q, out = torch.randn(1, 4, 8, 64), torch.empty(1, 4, 8, 64)
kernel(q, q, q, out, torch.empty(1, 4, 8), (), None, None, 0.125)
print(sorted({{"tvm", "jinja2", "sympy", "networkx", "triton"}} & set(sys.modules)))
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
"""
    case = causal(BLOCK_M, 64)
    with override(cache_dir=tmp_path):
        AttentionKernel(case.kernel, CPU)
        tvm_library.openmp._library()
    environment = {**os.environ, "SPGEN_CACHE_DIR": str(tmp_path), "SPGEN_NO_COMPILE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program_text], input=str(case.kernel), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arch", sorted(targets.table("cpu")["archs"]))
def test_an_object_file_for_another_processor(arch: str, tmp_path: Path) -> None:
    number, _ = MACHINES[Target.of(arch).triple.partition("-")[0]]
    with override(cache_dir=tmp_path):
        path = compile_text(
            "causal() & (sink(4) | window(64))", q_shape=(1, 4, 512, 64), kv_heads=2, kv_len=512, v_dim=64,
            dtype="bfloat16", target=arch,
        )  # fmt: skip
    elf = path.read_bytes()
    assert path.name == "kernel.o"
    assert (elf[:4], int.from_bytes(elf[18:20], "little")) == (b"\x7fELF", number)
    assert b"__tvm_ffi_attention" in elf
    assert path.with_name("kernel.py").exists()


@pytest.mark.parametrize("arch", ["aarch64", "riscv64", "x86-64-v3"])
@pytest.mark.parametrize("name", ["causal", "biased_keys", "packed_lists"])
def test_vectors_of_another_processor_are_used(arch: str, name: str) -> None:
    target = Target.of(arch)
    kernel = ALL_CASES[name](default_config(64, 64, "float32", target).block_m, 64).kernel
    source = tvm_library.render_source(kernel, target, strided=False)
    assembly = tvm_compile.compile_source(source, Path("kernel.py"), "attention", target).inspect_source("asm")
    instructions = Counter(re.findall(r"^\t([a-z][\w.]*)", assembly, re.MULTILINE))
    assert instructions[MACHINES[target.triple.partition("-")[0]][1]] >= 16
    called = set(re.findall(r"^\t(?:bl|call|callq)\s+([\w@]+)", assembly, re.MULTILINE))
    assert not {name for name in called if re.match("fma|exp|tanh|__(?!tvm)", name)}


def test_a_kernel_for_another_processor_does_not_run_here() -> None:
    target = Target.of("aarch64")
    kernel = program(segment("0", "kv_len"), block_m=default_config(64, 64, "float32", target).block_m, lse=False)
    q = torch.randn(1, 1, 3, 64)
    with pytest.raises(DeviceError, match="aarch64-linux-gnu"):
        build(kernel, target)(q, q, q, torch.empty_like(q), None, (), None, None, 1.0)
