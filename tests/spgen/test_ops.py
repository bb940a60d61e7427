"""The PyTorch side: operators, compilation, gradients, plans and the errors of a call. Kernels run through TVM."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
import spgen.ops
from spgen import reference
from spgen.errors import (
    DataError,
    DeviceError,
    DtypeError,
    GradientError,
    PatternError,
    PlanError,
    ShapeError,
    TextError,
    UnsupportedError,
)

pytest.importorskip("tvm", reason="the CPU backend needs apache-tvm")

STREAMING = sp.causal() & (sp.sink(4) | sp.window(16))


def tensors(q_len: int = 40, kv_len: int = 40, heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(1, heads, q_len, 16),
        torch.randn(1, kv_heads, kv_len, 16),
        torch.randn(1, kv_heads, kv_len, 24),
    )


def op_arguments(pattern: sp.Pattern, return_lse: bool = True) -> tuple[object, ...]:
    rest = (None, None, None, None, None, None, None, None, None, return_lse)
    return (*tensors(), list(pattern.data), [], repr(pattern), *rest)


@pytest.mark.parametrize("pattern", [STREAMING, sp.causal() & sp.columns(torch.tensor([1, 5, 30]))], ids=repr)
@pytest.mark.parametrize("return_lse", [True, False])
def test_opcheck(pattern: sp.Pattern, return_lse: bool) -> None:
    torch.library.opcheck(torch.ops.spgen.attention.default, op_arguments(pattern, return_lse))


def test_opcheck_of_plans() -> None:
    pattern = sp.causal() & sp.columns(torch.tensor([1, 5, 30]))
    q, k, _ = tensors()
    torch.library.opcheck(torch.ops.spgen.plan.default, (q, k, list(pattern.data), repr(pattern), *[None] * 5))


def test_compiles_in_one_graph_for_all_lengths() -> None:
    attend = sp.attention(STREAMING)
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v) + 1, fullgraph=True, dynamic=True, backend=count)
    kernels = None
    for length in (33, 47, 64, 90):
        q, k, v = tensors(length, length)
        wanted = reference.attention(q * 2, k, v, STREAMING) + 1
        torch.testing.assert_close(compiled(q, k, v).double(), wanted, atol=1e-5, rtol=1e-5)
        kernels = kernels or sp.compile_count()
    assert graphs == 1
    assert sp.compile_count() == kernels


def test_a_new_length_compiles_nothing() -> None:
    attend = sp.attention(STREAMING)
    attend(*tensors(100, 100))
    before = sp.compile_count()
    for length in range(101, 121):
        attend(*tensors(length, length + 3))
    assert sp.compile_count() == before


def test_gradients_are_refused() -> None:
    q, k, v = tensors()
    out = sp.attention(STREAMING)(q.requires_grad_(), k, v)
    with pytest.raises(GradientError, match="no_grad"):
        out.sum().backward()


def test_exports_with_a_readable_graph() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sp.attention(STREAMING)(q, k, v)

    args = tensors()
    program = torch.export.export(Model(), args)
    assert repr(STREAMING) in str(program.graph)
    torch.testing.assert_close(program.module()(*args), sp.attention(STREAMING)(*args))


def test_plans_are_reused() -> None:
    pattern = sp.causal() & sp.block(8, mask=torch.rand(4, 5, 5) < 0.5)
    q, k, v = tensors()
    attend = sp.attention(pattern)
    plan = attend.plan(q, k)
    assert plan.nbytes > 0
    torch.testing.assert_close(attend(q, k, v, plan=plan), attend(q, k, v), atol=0, rtol=0)


def test_a_plan_knows_what_it_is_for() -> None:
    q, k, v = tensors()
    plan = sp.attention(sp.columns(torch.tensor([3]))).plan(q, k)
    other = sp.attention(sp.columns(torch.tensor([3])) | sp.sink(4))
    with pytest.raises(PlanError, match="plan: pattern"):
        other(q, k, v, plan=plan)
    q, k, v = tensors(41, 41)
    with pytest.raises(PlanError, match="plan: shape of q"):
        sp.attention(sp.columns(torch.tensor([3])))(q, k, v, plan=plan)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"q_offset": 3}, "plan: q_offset"),
        ({"q_offset": torch.tensor([3])}, "plan: no q_offset tensor"),
        ({"kv_lengths": torch.tensor([30])}, "plan: no kv_lengths"),
    ],
)
def test_a_plan_is_for_its_positions(options: dict[str, object], match: str) -> None:
    pattern = sp.causal() & sp.columns(torch.tensor([3, 9]))
    q, k, v = tensors()
    attend = sp.attention(pattern)
    with pytest.raises(PlanError, match=match):
        attend(q, k, v, plan=attend.plan(q, k), **options)  # type: ignore[call-overload]
    out = attend(q, k, v, plan=attend.plan(q, k, **options), **options)  # type: ignore[call-overload, arg-type]
    torch.testing.assert_close(out, attend(q, k, v, **options), atol=0, rtol=0)  # type: ignore[call-overload]


def test_the_result_has_the_layout_of_q() -> None:
    q, k, v = tensors()
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = sp.attention(STREAMING)(strided, k, v)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, sp.attention(STREAMING)(q, k, v))


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 8), (8, 0), (0, 0)])
def test_nothing_to_do(q_len: int, kv_len: int) -> None:
    out, lse = sp.attention(STREAMING)(*tensors(q_len, kv_len), return_lse=True)
    assert out.shape == (1, 4, q_len, 24)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_log_sum_exp() -> None:
    q, k, v = tensors()
    out, lse = sp.attention(STREAMING, scale=0.5)(q, k, v, return_lse=True)
    wanted, wanted_lse = reference.attention(q, k, v, STREAMING, scale=0.5, return_lse=True)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


def changed(**changes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple({**dict(zip("qkv", tensors(), strict=True)), **changes}.values())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (changed(q=torch.randn(4, 40, 16)), ShapeError, "q: got 3 axes"),
        (changed(k=torch.randn(1, 3, 40, 16), v=torch.randn(1, 3, 40, 16)), ShapeError, "divides the 4 heads"),
        (changed(k=torch.randn(2, 2, 40, 16)), ShapeError, "batch"),
        (changed(v=torch.randn(1, 2, 39, 16)), ShapeError, "v: "),
        (changed(k=torch.randn(1, 2, 40, 8)), ShapeError, "head size 8"),
        (changed(v=torch.randn(1, 2, 40, 257)), ShapeError, "1 to 256"),
        (changed(k=torch.randn(1, 2, 40, 16).half()), DtypeError, "k: "),
        (changed(**{n: t.double() for n, t in zip("qkv", tensors(), strict=True)}), DtypeError, "float64"),
        (changed(k=torch.randn(1, 2, 40, 16, device="meta")), DeviceError, "k: got meta"),
    ],
)
def test_bad_tensors(arguments: tuple[torch.Tensor, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sp.attention(STREAMING)(*arguments)


@pytest.mark.parametrize(
    ("pattern", "error", "match"),
    [
        (sp.per_head([sp.causal()] * 3), PatternError, "3 patterns"),
        (sp.block(8, mask=torch.ones(4, 5, 4, dtype=torch.bool)), ShapeError, "mask"),
        (sp.columns(torch.zeros(3, 5, dtype=torch.int32)), ShapeError, "columns"),
        (sp.columns(torch.zeros(5, dtype=torch.int32, device="meta")), DeviceError, "meta"),
        (sp.top_k(4, scores=sp.pooled()), UnsupportedError, "selection"),
    ],
)
def test_bad_data(pattern: sp.Pattern, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sp.attention(pattern)(*tensors())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 40])}, ShapeError, "q: got 4 axes"),
        ({"bias": torch.zeros(4)}, ShapeError, "bias"),
        ({"bias": torch.zeros(3, 40)}, ShapeError, "heads one of"),
        ({"bias": torch.zeros(40, dtype=torch.int32)}, DtypeError, "bias"),
        ({"bias": 3.0}, DtypeError, "sp.alibi"),
        ({"bias": sp.alibi(torch.ones(3))}, ShapeError, "slopes"),
        ({"sink_logits": torch.zeros(3)}, ShapeError, "one for each query head"),
        ({"sink_logits": torch.zeros(4, dtype=torch.int32)}, DtypeError, "sink_logits"),
        ({"sink_logits": torch.zeros(4, device="meta")}, DeviceError, "sink_logits"),
        ({"q_offset": torch.zeros(1)}, DtypeError, "q_offset"),
        ({"q_offset": torch.zeros(2, dtype=torch.int32)}, ShapeError, "one for each sequence"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int32)}, ShapeError, "kv_lengths"),
    ],
)
def test_bad_options(options: dict[str, torch.Tensor], error: type[Exception], match: str) -> None:
    attend = sp.attention(STREAMING)
    attend(*tensors())
    with pytest.raises(error, match=match):
        attend(*tensors(), **options)  # type: ignore[call-overload]


def test_indices_out_of_range_are_ignored_and_reported_on_request() -> None:
    pattern = sp.columns(torch.tensor([3, 400, -7]))
    q, k, v = tensors()
    wanted = reference.attention(q, k, v, sp.columns(torch.tensor([3])))
    torch.testing.assert_close(sp.attention(pattern)(q, k, v).double(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="400"):
        sp.attention(pattern)(q, k, v, check=True)


def test_an_operator_call_with_bad_text() -> None:
    arguments = list(op_arguments(STREAMING))
    arguments[5] = "causal() & open('x')"
    with pytest.raises(TextError):
        torch.ops.spgen.attention(*arguments)


def test_what_is_no_pattern() -> None:
    with pytest.raises(DtypeError, match="pattern"):
        sp.attention(lambda i, j: i >= j)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="scale"):
        sp.attention(STREAMING, scale=float("nan"))
    with pytest.raises(UnsupportedError, match="dense"):
        sp.attention(STREAMING, dense="always")


def test_autocast_is_that_of_scaled_dot_product_attention() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sp.attention(STREAMING)(q, k, v)
        assert (
            out.dtype
            == torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).dtype
            == torch.bfloat16
        )
    expected = reference.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), STREAMING)
    torch.testing.assert_close(out.double(), expected.double(), atol=2e-2, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors())
    with pytest.raises(DtypeError, match="float32, bfloat16, float16"):
        sp.attention(STREAMING)(q, k, v)


def test_calls_are_forgotten_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spgen.ops, "_MANY_CALLS", 4)
    monkeypatch.setattr(spgen.ops, "_ready", {})
    monkeypatch.setattr(spgen.ops, "_makers", {})
    attend = sp.attention(sp.causal() & sp.columns(torch.tensor([[3, 7]])))
    for length in range(20, 31):
        k = torch.randn(1, 2, length, 16)
        attend(k, k, k, plan=attend.plan(k, k))
        assert 1 <= len(spgen.ops._ready) <= 4
        assert 1 <= len(spgen.ops._makers) <= 4
