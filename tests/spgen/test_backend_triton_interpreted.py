"""Kernels in Triton's interpreter against the oracle: they run in a process of their own (TRITON_INTERPRET=1).

Started by test_backend_triton.py; the interpreter changes Triton for the rest of its process.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import DataObject, data, integers, lists

from spgen.backends import triton as backend
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from spgen.settings import override, triton_interpreted
from spgen.target import Target
from tests.agreement import assert_agrees
from tests.kernel_cases import CASES, MORE_CASES, Case, causal, causal_parts, program, tensors
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


def split(case: Case, splits: int) -> Case:
    """The case with its keys split."""
    case.kernel = with_attributes(case.kernel, options=(*case.kernel["options"], f"splits={splits}"))
    return case


@pytest.mark.parametrize("name", ALL)
def test_split_keys_agree_with_the_oracle(name: str) -> None:
    """The first rows of every case: the interpreter takes its time to add up parts, row by row."""
    case = split(ALL[name](32, 32), 3)
    case.q = case.q[:, :, :40]
    check(case, *run(case), tolerance=1e-5)


@pytest.mark.parametrize(("name", "splits"), [("causal_long_rows", 40), ("sink_logits", 7), ("lengths_and_offsets", 2)])
def test_any_number_of_splits(name: str, splits: int) -> None:
    """Rows without keys, sinks, sequences without keys; more splits than tiles and than are read at once."""
    case = split(ALL[name](64, 32), splits)
    case.q = case.q[:, :, :90]
    check(case, *run(case), tolerance=1e-5)


def test_rows_outside_a_row_map_are_left_alone() -> None:
    case = split(CASES["permuted"](32, 32), 2)
    case.tables[0][0, 0, 0, ::3] = -1
    out, lse = run(case)
    check(case, out, lse, tolerance=1e-5)
    assert int(lse.isnan().sum()) == 2 * len(range(0, 140, 3))


@settings(max_examples=12, deadline=None)
@given(data())
def test_drawn_lengths_and_splits(drawn: DataObject) -> None:
    """Decoding with a group of heads in a tile: any lengths, any number of splits."""
    rows, keys, splits = (drawn.draw(integers(1, high), label) for high, label in ((5, "rows"), (90, "keys"), (9, "n")))
    lengths = torch.tensor(drawn.draw(lists(integers(0, keys + 3), min_size=2, max_size=2), "lengths"))
    parts = causal_parts(16 // 2)
    kernel = program(*parts, block_m=16, block_n=16, pack=2, kv_lengths=True, head_dim=16, value_dim=20)
    case = split(Case(kernel, *tensors(2, 4, 2, rows, keys, 16, 20), kv_lengths=lengths), splits)
    for b, length in enumerate(lengths.tolist()):
        case.k[b, :, length:] = case.v[b, :, length:] = math.nan
    check(case, *run(case), tolerance=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the NaN that this test brings
def test_nan_stays_in_its_row_of_split_keys() -> None:
    case = split(CASES["packed_causal"](32, 32), 3)
    clean, _ = run(case)
    case.q[0, 1, 17] = math.nan
    out, lse = run(case)
    assert out[0, 1, 17].isnan().all()
    assert lse[0, 1, 17].isnan()
    out[0, 1, 17] = clean[0, 1, 17]
    assert torch.equal(out, clean)


def test_half_precision_of_split_keys_into_a_view() -> None:
    case = split(causal(32, 32), 4)
    case.kernel = with_attributes(case.kernel, dtype="float16")
    case.q, case.k, case.v = case.q.half(), case.k.half(), case.v.half()
    wide = case.q.new_full((1, 130, 4, 70), math.nan)
    view = wide[..., :64].transpose(1, 2)
    backend.build(case.kernel, CPU)(case.q, case.k, case.v, view, torch.empty(1, 4, 130), (), None, None, case.scale)
    torch.testing.assert_close(view.double(), case.expected().out, atol=3e-3, rtol=3e-3)
    assert wide[..., 64:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_calls(kind: str) -> None:
    """Every kind of pattern, from the language to the result."""
    q = torch.randn(1, 4, LENGTH, 16)
    k, v = (torch.randn(1, 2, LENGTH, 16) for _ in range(2))
    with override(backend="triton"):
        assert_agrees(KINDS[kind], q, k, v, tolerance=1e-5)
