"""Explanations: counted pairs and tiles are those of the oracle and of the kernel; the text says what matters."""

from __future__ import annotations

import pytest
import torch

import spgen as sp
from spgen.explain import count_pairs, explain_text, tiles_of_programs, work_of
from spgen.patterns import Pattern
from tests.lowering import Lengths, lowered_builder

CLOSED = [
    sp.dense(),
    sp.causal() & (sp.sink(7) | sp.window(20)),
    sp.window(5, right=3) - sp.sink(9),
    sp.documents(torch.tensor([0, 5, 5, 30, 50])),
    sp.per_head([sp.causal() & sp.window(5), sp.causal() & sp.window(9), sp.dense(), sp.sink(3)]),
    sp.per_head([sp.window(5), sp.causal()]),
]


@pytest.mark.parametrize("pattern", CLOSED, ids=repr)
@pytest.mark.parametrize(("q_len", "kv_len"), [(60, 60), (13, 60), (60, 13)])
def test_pairs_of_closed_forms_are_counted_exactly(pattern: Pattern, q_len: int, kv_len: int) -> None:
    levels, builder = lowered_builder(pattern, Lengths(q_len, kv_len, 4, 2))
    assert count_pairs(levels.terms, builder) == pattern.mask(q_len, kv_len, q_heads=4, kv_heads=2).sum()


@pytest.mark.parametrize("pattern", [*CLOSED, sp.stripe(3), sp.causal() & sp.columns([3, 9, 11])], ids=repr)
def test_packed_batches(pattern: Pattern) -> None:
    rows, keys = torch.tensor([0, 40, 40, 47]), torch.tensor([0, 60, 70, 90])
    q, k, v = (torch.randn(n, heads, 16) for n, heads in ((47, 4), (90, 2), (90, 2)))
    found = sp.attention(pattern).explain(q, k, v, cu_seqlens_q=rows, cu_seqlens_k=keys)
    wanted = pattern.mask(40, 60, q_heads=4, kv_heads=2, batch=3, q_lengths=rows.diff(), kv_lengths=keys.diff())
    assert found.cost is not None
    assert found.cost.needed_pairs == wanted.sum()
    assert found.cost.visited_pairs >= found.cost.needed_pairs
    assert "3 packed sequences" in str(found)


def test_density_of_long_calls_is_measured_on_some_rows() -> None:
    mask = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    q, k, v = (torch.empty(1).expand(1, heads, 4096, 64) for heads in (4, 1, 1))
    found = sp.attention(sp.block(64, mask=mask)).explain(q, k, v)
    assert found.sampled
    assert found.density == pytest.approx(float(mask.float().mean()), abs=0.02)


def test_other_pairs_have_no_symbolic_count() -> None:
    levels, builder = lowered_builder(sp.stripe(3), Lengths(20, 20))
    assert count_pairs(levels.terms, builder) is None


def text_of(pattern: str, **options: object) -> str:
    call = {
        "q_shape": (1, 8, 4096, 64), "kv_heads": 8, "kv_len": 4096, "v_dim": 64, "dtype": "bfloat16",
        "target": "sm_90", "ir": False, "source": False,
    }  # fmt: skip
    return explain_text(pattern, **{**call, **options})  # type: ignore[arg-type]


def test_text() -> None:
    text = text_of("causal() & (sink(64) | window(1024))")
    for part in ("pattern    causal()", "density    2", "segments   s0 range", "GFLOP computed", "predicted", "kernel"):
        assert part in text


def test_the_prediction_is_that_of_the_cost_model() -> None:
    pattern = sp.causal() & sp.window(1024)
    q, k, v = (torch.empty(1).expand(1, 8, 4096, 64) for _ in range(3))
    report = sp.attention(pattern).explain(q, k, v)
    assert report.prediction is not None
    line = next(line for line in str(report).splitlines() if line.startswith("predicted"))
    assert f"limited by {report.prediction.bound}; {report.prediction.sureness}, within a factor of" in line
    texts = [text_of("causal()", q_shape=(1, 8, length, 64), kv_len=length) for length in (16384, 32768)]
    short, long = (float(text.split("predicted")[1].split()[0]) for text in texts)
    assert 2.5 * short < long < 6 * short


def test_work_is_counted_by_programs() -> None:
    levels, builder = lowered_builder(sp.causal(), Lengths(256, 256, 2, 2))
    tiles = tiles_of_programs(levels, builder)
    work = work_of(levels.kernel, tiles, 1.0, 2.0)
    rows, keys = levels.kernel["block_m"], levels.kernel["block_n"]
    assert work.programs == 2 * (256 // rows)
    assert work.longest == 256 // keys
    assert work.tiles == 2 * sum(-(-(n + 1) * rows // keys) for n in range(256 // rows))
    assert work.columns == 2 * sum((n + 1) * rows for n in range(256 // rows))
    assert (work.flops, work.bytes, work.gathered) == (1.0, 2.0, 0)


def test_data_leave_counts_open() -> None:
    text = text_of("causal() & block(128, mask=$0: bool[8, R, C])")
    assert "depends on the data" in text
    assert "units_0, splits_s0" in text


def test_long_masks_are_named_by_their_tables() -> None:
    text = text_of("causal() & vertical_slash(columns=$0: int32[8, K], offsets=$1: int32[8, K])")
    assert "every tile is masked by what bits_0, diagonal_bits_1, diagonal_ends_1 say" in text
    assert "every tile is masked by" in text_of("causal() & where((i + j) % 3 == 0)")


def test_all_levels_are_shown() -> None:
    text = text_of("causal()", ir=True)
    for operation in ("pattern.causal", "pattern.union", "tiles.segment", "kernel.attention"):
        assert operation in text


def test_short_calls_are_packed() -> None:
    assert "4 heads of a group share a row tile" in text_of("causal()", q_shape=(1, 8, 4, 64), kv_heads=2)


@pytest.mark.parametrize("length", [40, 3000])
def test_explaining_a_call(length: int) -> None:
    pytest.importorskip("tvm", reason="the CPU backend needs apache-tvm")
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    pattern = sp.causal() & (sp.window(4) | sp.columns(torch.tensor([1, 5, 7])))
    report = sp.attention(pattern).explain(q, k, v)
    assert report.cost is not None
    assert report.cost.needed_pairs <= report.cost.visited_pairs
    exact = float(pattern.mask(length, length).double().mean())
    assert report.density == pytest.approx(exact, rel=0.05)
    assert report.sampled == (length > 2896)
