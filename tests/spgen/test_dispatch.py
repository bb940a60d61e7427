"""dense="auto": what may be ignored, when it is, and that the answer is then dense attention's."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import spgen as sp
from spgen import dispatch as module
from spgen import reference
from spgen.arguments import Arguments
from spgen.compile import level_1
from spgen.dispatch import verdict
from spgen.errors import UnsupportedError
from spgen.ops import request_of
from spgen.passes.hull import hull
from spgen.patterns import Pattern
from spgen.settings import logger


def tensors(rows: int = 128, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    keys = rows if keys is None else keys
    return torch.randn(1, 4, rows, 32), torch.randn(1, 2, keys, 32), torch.randn(1, 2, keys, 32)


def arguments(pattern: Pattern, rows: int = 128, keys: int | None = None, **more: object) -> Arguments:
    return Arguments(*tensors(rows, keys), pattern.data, repr(pattern), **more)  # type: ignore[arg-type]


def blocks(width: int, count: int = 4) -> Pattern:
    """The first `width` blocks of 32 keys for each of `count` blocks of rows."""
    return sp.block(32, indices=torch.arange(width, dtype=torch.int32).expand(1, 4, count, width))


@pytest.fixture
def break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pairs."""
    monkeypatch.setattr(module, "_limit", lambda *args: 0.5)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (sp.causal() & blocks(2), sp.causal()),
        (blocks(2), sp.dense()),
        (sp.causal() & (blocks(1) | sp.window(16)), sp.causal()),
        (sp.causal() & (blocks(1) | sp.columns(torch.tensor([3, 5])) | sp.diagonals(torch.tensor([0]))), sp.causal()),
        (sp.causal() - blocks(1), sp.causal()),
        (sp.causal() & sp.window(16), sp.causal() & sp.window(16)),
    ],
)
def test_the_hull_keeps_closed_forms(pattern: Pattern, wanted: Pattern) -> None:
    form = module._dense_form(hull(level_1(pattern.node)), 128, 128)
    expected = {repr(sp.causal()): "causal", repr(sp.dense()): "all"}.get(repr(wanted))
    assert form == expected


@pytest.mark.usefixtures("break_even")
@pytest.mark.parametrize(
    ("pattern", "dense"),
    [
        (sp.causal() & blocks(4), True),
        (sp.causal() & blocks(2), True),  # 64 keys of 128: three quarters of the causal pairs
        (sp.causal() & blocks(1), False),
        (blocks(2), True),
        (blocks(1), False),
        (sp.causal() & sp.window(128), True),  # longer than the call: exactly causal
        (sp.causal() & sp.window(100), False),  # closed forms are never ignored
        (sp.causal() & sp.block(32, mask=torch.ones(4, 4, dtype=torch.bool)), False),  # only the data know
        (sp.documents(torch.tensor([0, 50, 128])) & blocks(4), False),
        (sp.permuted(blocks(4), k=torch.randperm(128)), True),
    ],
)
def test_shapes_decide(pattern: Pattern, dense: bool) -> None:
    call = arguments(pattern)
    assert verdict(call, request_of(call), False).dense == dense, str(verdict(call, request_of(call), False))


@pytest.mark.usefixtures("break_even")
@pytest.mark.parametrize(
    ("more", "name"),
    [({"q_offset": 3}, "q_offset"), ({"kv_lengths": torch.tensor([5])}, "kv_lengths"), ({"softcap": 3.0}, "softcap")],
)
def test_what_dense_attention_does_not_know_stays_sparse(more: dict[str, object], name: str) -> None:
    call = arguments(sp.causal() & blocks(4), **more)
    found = verdict(call, request_of(call), False)
    assert not found.dense
    assert name in found.reason
    assert "return_lse" in verdict(arguments(blocks(4)), request_of(arguments(blocks(4))), True).reason


@pytest.mark.usefixtures("break_even")
def test_rows_behind_a_cache_are_not_torchs_causal() -> None:
    call = arguments(sp.causal() & blocks(4, 2), 64, 128)
    assert not verdict(call, request_of(call), False).dense


@pytest.mark.usefixtures("break_even")
def test_the_call_runs_dense_is_logged_and_compiles(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = tensors()
    pattern = sp.causal() & blocks(2)
    attend = sp.attention(pattern, dense="auto", scale=0.3)
    everything = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    logger()  # sets its level when it is asked for first
    with caplog.at_level(logging.INFO, "spgen"):
        torch.testing.assert_close(attend(q, k, v), everything)
    assert "runs as dense attention: 75% of the pairs of causal attention, break-even at 50%" in caplog.text
    assert "dense      dense: 75% of the pairs" in str(attend.explain(q, k, v))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), everything)
    # with a plan, or with "never", the pattern is the definition
    exact = reference.attention(q, k, v, pattern.mask(128, 128, q_heads=4), scale=0.3).float()
    torch.testing.assert_close(attend(q, k, v, plan=attend.plan(q, k)), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sp.attention(pattern, scale=0.3)(q, k, v), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("break_even")
def test_compiled_graphs_of_changing_lengths_decide_call_by_call() -> None:
    pattern = sp.causal() & sp.columns(torch.arange(96))
    attend = sp.attention(pattern, dense="auto")
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, dense in ((128, True), (100, True), (500, False)):
        q, k, v = tensors(rows)
        mask = (sp.causal() if dense else pattern).mask(rows, rows, q_heads=4)
        torch.testing.assert_close(compiled(q, k, v), reference.attention(q, k, v, mask).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("break_even")
@pytest.mark.parametrize(
    "pattern",
    [
        sp.per_head([sp.causal(), sp.causal() & sp.window(16)]) & blocks(4),
        blocks(4) & sp.where(lambda i, j: (i + j) % 3 == 0),
        sp.causal() & sp.block(32, indices=torch.zeros(1, 4, 4, 0, dtype=torch.int32)),
    ],
)
def test_what_heads_predicates_and_empty_lists_say_stays_sparse(pattern: Pattern) -> None:
    call = arguments(pattern)
    assert not verdict(call, request_of(call), False).dense


def test_other_words_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r'(?s)dense: got .*always.*"never" or "auto"'):
        sp.attention(sp.causal(), dense="always")


def test_a_kernel_that_is_always_faster_runs_with_all_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_limit", lambda *args: 1.0)
    call = arguments(sp.causal() & blocks(4))
    found = verdict(call, request_of(call), False)
    assert (found.dense, found.density, found.break_even) == (False, 1.0, 1.0)
    assert str(found) == "sparse: 100% of the pairs of causal attention, which is predicted to be slower at any share"


def test_the_prediction_is_used() -> None:
    call = arguments(sp.causal() & blocks(4))
    found = verdict(call, request_of(call), False)
    assert found.break_even is not None
    assert 0 <= found.break_even <= 1
