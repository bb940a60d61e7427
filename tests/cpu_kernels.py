"""Runs level-3 kernels on this CPU, also as if it were another one, and compares them with their oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spgen.backends.tvm import build, default_config
from spgen.ir.kernel import KERNEL
from spgen.target import Target, _cpuinfo
from tests.kernel_cases import CASES, MORE_CASES, Case

ALL_CASES = {**CASES, **MORE_CASES}
CPU = Target.of("cpu")
BLOCK_M: int = default_config(64, 64, "float32", CPU).block_m
OTHERS = {
    "avx2": replace(CPU, isa="avx2", arch="x86-64-v3", features="", simd=8, registers=16),
    "sse2": replace(CPU, isa="sse2", arch="x86-64", features="", simd=4, registers=16),
    "avx512_bf16": replace(CPU, isa="avx512_bf16", arch="x86-64-v4", features="+avx512bf16", simd=16, registers=32),
}
FLAGS = _cpuinfo().get("flags", "").split()
HAS_PAIRS = pytest.mark.skipif("avx512_bf16" not in FLAGS, reason="runs AVX-512 with bf16")
HAS_AVX512 = pytest.mark.skipif("avx512f" not in FLAGS, reason="forces narrower vectors")
# half a unit in the last place of the result; where weights are rounded to bf16 as well, one more in the sum of |w v|
ROUNDING = {"float32": (4e-6, 4e-6), "bfloat16": (4e-6, 2**-8), "float16": (4e-6, 2**-10)}


def run(case: Case, target: Target = CPU, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result over memory that was something else before."""
    if out is None:
        out = torch.full((*case.q.shape[:3], case.v.shape[3]), 7.0, dtype=case.q.dtype)
    lse = torch.full(case.q.shape[:3], 7.0)
    build(case.kernel, target)(
        case.q, case.k, case.v, out, lse, case.tables, case.q_offset, case.kv_lengths, case.scale, case.extras
    )
    return out, lse


def check(case: Case, target: Target = CPU, out: torch.Tensor | None = None) -> None:
    expected = case.expected()
    found, lse = run(case, target, out)
    written = expected.written
    atol, rtol = ROUNDING[case.kernel["dtype"]]
    if target.isa == "avx512_bf16" and case.q.dtype == torch.bfloat16:
        atol = 2**-8 * float(case.v.nan_to_num().abs().max())
    torch.testing.assert_close(found[written].double(), expected.out[written], atol=atol, rtol=rtol)
    if case.kernel["lse"]:
        torch.testing.assert_close(lse[written].double(), expected.lse[written], atol=4e-6, rtol=4e-6)


def typed(case: Case, dtype: str) -> Case:
    """The same kernel and call on elements of another type."""
    case.kernel = KERNEL.make("attention", *case.kernel.operands, **{**dict(case.kernel.attrs), "dtype": dtype})
    case.q, case.k, case.v = (x.to(getattr(torch, dtype)) for x in (case.q, case.k, case.v))
    return case
