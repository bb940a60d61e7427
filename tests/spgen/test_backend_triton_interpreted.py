"""Kernels in Triton's interpreter against the oracle: they run in a process of their own (TRITON_INTERPRET=1).

Started by test_backend_triton.py; the interpreter changes Triton for the rest of its process.
"""

from __future__ import annotations

import math

import pytest
import torch

from spgen.backends import triton as backend
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.settings import override, triton_interpreted
from spgen.target import Target
from tests.agreement import assert_agrees
from tests.kernel_cases import CASES, MORE_CASES, Case, causal
from tests.kinds import KINDS, LENGTH

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")
CPU = Target.of("cpu")
ALL = CASES | MORE_CASES


def with_attributes(kernel: Op, **attrs: object) -> Op:
    """The same kernel with another dtype, head size or options."""
    return KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), **attrs})


def run(case: Case, target: Target = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of one call, NaN where nothing was written."""
    out = case.q.new_full((*case.q.shape[:3], case.v.shape[3]), math.nan)
    lse = torch.full(case.q.shape[:3], math.nan, device=case.q.device)
    kernel = backend.build(case.kernel, target)
    wanted = lse if case.kernel["lse"] else None
    kernel(case.q, case.k, case.v, out, wanted, case.tables, case.q_offset, case.kv_lengths, case.scale, case.extras)
    return out, lse


def check(case: Case, out: torch.Tensor, lse: torch.Tensor, tolerance: float) -> None:
    expected = case.expected()
    written = expected.written
    torch.testing.assert_close(out.cpu().double()[written], expected.out[written], atol=tolerance, rtol=tolerance)
    assert out.cpu()[~written].isnan().all()
    if case.kernel["lse"]:
        torch.testing.assert_close(lse.cpu().double()[written], expected.lse[written], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_oracle(name: str) -> None:
    case = ALL[name](32, 32)
    check(case, *run(case), tolerance=1e-5)


@pytest.mark.parametrize("name", ["packed_causal", "block_list", "gathered_columns"])
def test_unequal_tiles(name: str) -> None:
    case = CASES[name](64, 16)
    check(case, *run(case), tolerance=1e-5)


def test_half_precision() -> None:
    case = causal(32, 32)
    case.kernel = with_attributes(case.kernel, dtype="float16")
    case.q, case.k, case.v = case.q.half(), case.k.half(), case.v.half()
    check(case, *run(case), tolerance=3e-3)


def test_any_strides() -> None:
    case = causal(32, 32)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    case.k = case.k.mT.contiguous().mT
    case.v = torch.cat([torch.full_like(case.v, math.nan), case.v], 3)[..., 64:]
    check(case, *run(case), tolerance=1e-5)


@pytest.mark.parametrize("scale", [0.0, -2.0, 40.0])
def test_any_scale(scale: float) -> None:
    case = causal(32, 32)
    case.__dict__["scale"] = scale
    check(case, *run(case), tolerance=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the NaN that this test brings
@pytest.mark.parametrize("name", ["causal", "packed_causal"])
def test_nan_stays_in_its_row(name: str) -> None:
    case = CASES[name](32, 32)
    clean, _ = run(case)
    case.q[0, 1, 17] = math.nan
    out, _ = run(case)
    assert out[0, 1, 17].isnan().all()
    out[0, 1, 17] = clean[0, 1, 17]
    assert torch.equal(out, clean)


def test_nothing_to_do() -> None:
    case = causal(32, 32)
    case.q = case.q[:, :, :0]
    run(case)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_calls(kind: str) -> None:
    """Every kind of pattern, from the language to the result."""
    q = torch.randn(1, 4, LENGTH, 16)
    k, v = (torch.randn(1, 2, LENGTH, 16) for _ in range(2))
    with override(backend="triton"):
        assert_agrees(KINDS[kind], q, k, v, tolerance=1e-5)
