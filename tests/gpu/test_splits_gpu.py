"""Calls of few rows on a GPU, whose keys are split: against the oracle, captured, and the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spgen as sp
from spgen import ops, tuned
from spgen.arguments import Arguments
from spgen.ops import request_of
from spgen.settings import override
from spgen.target import Target
from tests.agreement import assert_agrees
from tests.gpu.test_triton_attention import ALL, check, on_device, run, with_attributes
from tests.kinds import KINDS, LENGTH

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def decode(
    batch: int = 1, rows: int = 1, keys: int = 5000, dtype: torch.dtype = torch.bfloat16,
    dims: tuple[int, int] = (128, 128),
) -> list[torch.Tensor]:  # fmt: skip
    torch.manual_seed(0)
    shapes = ((8, rows, dims[0]), (2, keys, dims[0]), (2, keys, dims[1]))
    return [torch.randn(batch, *shape, device="cuda", dtype=dtype) for shape in shapes]


def splits_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: sp.Pattern, **options: Any) -> int:
    config = request_of(Arguments(q, k, v, list(pattern.data), repr(pattern), **options)).config
    return 1 if config is None else config.option("splits", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = on_device(ALL[name](32, 32), dtype)
    case.kernel = with_attributes(case.kernel, options=("warps=4", "stages=3", "prefetch=1", "splits=3"))
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding(batch: int, rows: int, dtype: torch.dtype) -> None:
    q, k, v = decode(batch, rows, dtype=dtype)
    assert splits_of(q, k, v, sp.causal()) > 1
    assert_agrees(sp.causal(), q, k, v, tolerance=TOLERANCE[dtype])
    assert_agrees(sp.dense(), q.mT.contiguous().mT, k, v, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [(64, 64), (80, 48), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    assert_agrees(sp.causal(), *decode(dtype=dtype, dims=dims), tolerance=TOLERANCE[dtype])


def few_rows(rows: int) -> dict[str, sp.Pattern]:
    """Patterns for `rows` rows over LENGTH keys: closed forms, and data of each row or key."""
    generator = torch.Generator().manual_seed(0)

    def mask(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.4

    tokens = torch.randint(-2, 160, (4, rows, 40), generator=generator)
    order = torch.randperm(LENGTH, generator=generator)
    names = ("dense", "streaming", "stripes", "relative stripes", "vertical and slash", "documents", "mixture")
    return {name: KINDS[name] for name in names} | {
        "pages": sp.causal() & sp.block(1, 16, mask=mask(4, rows, 10)),
        "lists": sp.block(32, 16, indices=torch.randint(-1, 11, (2, 1, 6), generator=generator)),
        "tokens": sp.causal() & sp.top_k(tokens),
        "permuted": sp.permuted(sp.block(16, mask=mask(2, 1, 10)), k=order),
        "permuted rows": sp.permuted(sp.block(1, 16, mask=mask(rows, 10)), q=torch.randperm(rows), k=order),
        "everything": (sp.block(16, mask=mask(1, 10)) | sp.columns(tokens[0, 0]) | sp.window(3))
        - sp.diagonals(torch.tensor([0, 4])),
    }


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (5, torch.float32)])
@pytest.mark.parametrize("kind", few_rows(1))
@pytest.mark.parametrize("splits", [None, 3])
def test_few_rows_of_every_kind(
    kind: str, rows: int, dtype: torch.dtype, splits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low row tiles, packed where heads agree, whole and split."""
    default = tuned.default_of
    monkeypatch.setattr(tuned, "default_of", lambda *call: default(*call).having(splits=splits))
    ops._ready.clear()
    shapes = ((4, rows), (2, LENGTH), (2, LENGTH))
    q, k, v = (torch.randn(2, *shape, 64, device="cuda", dtype=dtype) for shape in shapes)
    with override(records=False):
        assert_agrees(few_rows(rows)[kind].to("cuda"), q, k, v, tolerance=TOLERANCE[dtype])
    ops._ready.clear()


def test_caches_sinks_and_caps() -> None:
    q, k, v = decode(3, keys=9000)
    lengths = torch.tensor([9000, 0, 4711], device="cuda")
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    options: dict[str, Any] = {"kv_lengths": lengths, "sink_logits": torch.randn(8, device="cuda")}
    assert_agrees(sp.causal(), q, k, v, tolerance=4e-2, softcap=20.0, **options)
    assert_agrees(sp.causal(), q, k, v, tolerance=4e-2, bias=sp.alibi(torch.rand(8, device="cuda")), kv_lengths=lengths)


def test_packed_batches() -> None:
    ends = torch.tensor([0, 1, 1, 4, 6], device="cuda"), torch.tensor([0, 3000, 3500, 9000, 9700], device="cuda")
    q, k, v = (
        torch.randn(n, heads, 64, device="cuda", dtype=torch.bfloat16) for n, heads in ((7, 8), (9800, 2), (9800, 2))
    )
    options: dict[str, Any] = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    assert splits_of(q, k, v, sp.causal(), **options) > 1
    assert_agrees(sp.causal(), q, k, v, tolerance=4e-2, **options)


def test_pages_with_a_plan() -> None:
    q, k, v = decode(keys=20000)
    pattern = sp.causal() & sp.block(1, 64, mask=torch.rand(2, 1, 313, device="cuda") < 0.1)
    attend = sp.attention(pattern)
    assert splits_of(q, k, v, pattern) > 1
    assert_agrees(pattern, q, k, v, tolerance=4e-2)
    assert torch.equal(attend(q, k, v, plan=attend.plan(q, k)), attend(q, k, v))


def test_calls_are_captured() -> None:
    q, k, v = decode()
    attend = sp.attention(sp.causal())
    attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, return_lse=True)
    q.copy_(torch.randn_like(q))
    out.fill_(torch.nan)
    graph.replay()
    again, lse_again = attend(q, k, v, return_lse=True)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def test_same_inputs_same_bits() -> None:
    q, k, v = decode(keys=20000)
    attend = sp.attention(sp.causal())
    first = attend(q, k, v)
    assert all(torch.equal(attend(q, k, v), first) for _ in range(200))


def test_other_numbers_of_splits_share_a_binary() -> None:
    case = on_device(ALL["causal"](32, 32), torch.bfloat16)
    options = ("warps=4", "stages=2")
    whole = run(case)[0]
    for splits in (2, 3, 8):
        case.kernel = with_attributes(case.kernel, options=(*options, f"splits={splits}"))
        torch.testing.assert_close(run(case)[0], whole, atol=4e-2, rtol=4e-2)
    assert Target.of(case.q.device).kind == "cuda"
