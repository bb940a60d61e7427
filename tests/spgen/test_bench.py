"""The benchmarks measure what they say; times themselves are never tested."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import spgen as sp
from spgen.autotune.measure import interleaved, per_call, wall
from spgen.bench import (
    SUITES,
    blocks,
    cpu_attention,
    gpu_attention,
    gpu_cases,
    gpu_patterns,
    peers,
    report,
    start,
    tokens,
)
from spgen.bench.peak import fma_loop, pair_loop
from spgen.errors import DeviceError

ROOT = Path(__file__).parent.parent.parent
WORK = blocks.Workload(heads=4, kv_heads=2, length=200, head_dim=16, block=32, dtype=torch.float32, device="cpu")

PATTERNS = blocks.Workload(4, 2, 256, 16, 32, torch.float32, "cpu")


def listed(sparsity: float = 0.5) -> blocks.BlockList:
    return blocks.BlockList.random(WORK, sparsity)


def test_all_forms_hold_the_same_pairs() -> None:
    from torch.nn.attention.flex_attention import create_mask

    chosen = listed()
    dense = chosen.mask(torch.arange(200))
    assert torch.equal(chosen.pattern().mask(200, q_heads=4, kv_heads=2), dense)
    flex = chosen.flex_mask()
    tiles = flex.to_dense()[0].bool()
    assert torch.equal(tiles, chosen.keep)
    causal = create_mask(flex.mask_mod, 1, 1, 200, 200, device="cpu")
    assert torch.equal(tiles.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :200, :200] & causal[0], dense[0])


def test_sparsity_is_that_of_the_blocks_below_the_diagonal() -> None:
    work = blocks.Workload(8, 8, 4096, 64, 64, torch.float32, "cpu")
    for sparsity in (0.0, 0.5, 0.95):
        keep = blocks.BlockList.random(work, sparsity).keep
        assert bool(keep.diagonal(dim1=1, dim2=2).all())
        assert not keep.triu(1).any()
        assert abs(float(keep.tril(-1).sum()) / (8 * 64 * 63 / 2) - (1 - sparsity)) < 0.02


def test_flops_count_the_diagonal_as_told() -> None:
    chosen = blocks.BlockList.random(WORK, 1.0)
    count = -(-200 // 32)
    assert chosen.flops(1.0) == 4 * 4 * count * 32 * 32 * 16
    assert chosen.flops(0.5) == chosen.flops(1.0) / 2


def test_errors_are_seen() -> None:
    q, k, v = WORK.tensors()
    chosen = listed()
    right = peers.sdpa_mask(chosen, q, k, v)()
    assert chosen.largest_error(right, q, k, v) < 1e-5
    assert chosen.largest_error(right + 1, q, k, v) == pytest.approx(1, abs=1e-4)


def test_rounds_are_interleaved() -> None:
    seen: list[str] = []
    interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=3)  # type: ignore[misc]
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"


def test_medians_and_calls_in_a_row() -> None:
    ticks = iter([1.0, 9.0, 2.0])
    assert interleaved({"a": lambda: None}, rounds=3, timer=lambda call: next(ticks)) == {"a": 2.0}
    count: list[int] = []
    assert per_call({"a": lambda: count.append(1)}, repeats=10, rounds=2)["a"] < wall(lambda: sum(range(10**6)))
    assert len(count) == 30


def test_the_peak_is_plausible() -> None:
    for loop in (fma_loop(0.01), pair_loop(0.01)):
        assert loop is None or 1e9 < loop.flops / wall(loop) < 1e14


def test_a_missing_peer_is_noted() -> None:
    missing: dict[str, str] = {}

    def broken() -> Any:
        raise RuntimeError("no compiler\nand more")

    assert peers.available(broken, "flex", missing) is None
    assert missing == {"flex": "RuntimeError: no compiler"}


def without_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> Any:
        raise RuntimeError("left out")

    monkeypatch.setattr(peers, "flex", none)


def test_the_cpu_suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    without_flex(monkeypatch)
    monkeypatch.setattr(cpu_attention, "QUICK", WORK)
    monkeypatch.setattr(cpu_attention, "SPARSITIES", (0.0, 0.9))
    monkeypatch.setattr(start, "_PATTERNS", ("causal()",))
    result = cpu_attention.run(quick=True)
    assert [row["sparsity"] for row in result["rows"]] == [0.0, 0.9]
    assert all(row["error"]["spgen"] < 1e-5 for row in [*result["rows"], *result["tokens"]])
    assert all(1e-5 < row["error"]["spgen"] < 2e-2 for row in result["bfloat16"])
    assert result["missing"] == {"flex": "RuntimeError: left out"}
    assert 0 < result["start"]["warm_cache_s"] < result["start"]["first_call_s"]
    assert 0 < result["launch"]["bare_us"] < result["launch"]["attend_us"]

    report.write(result, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    report.show(result)
    assert "quick" in capsys.readouterr().out


def test_the_rows_of_the_gpu_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm_ffi")
    without_flex(monkeypatch)
    missing: dict[str, str] = {}
    row = gpu_attention.measure(WORK, (0.5,), rounds=1, timer=wall, missing=missing)[0]
    assert set(missing) == {"flex", "cudnn causal"}
    assert (row["length"], row["sparsity"]) == (200, 0.5)
    assert row["error"]["spgen"] < 1e-5
    assert row["tflops"]["spgen"] == pytest.approx(listed().flops(0.5) / row["ms"]["spgen"] / 1e9, abs=0.1)


@pytest.mark.parametrize(
    "case",
    [
        gpu_cases.columns(PATTERNS, count=20),
        gpu_cases.vertical_slash(PATTERNS, vertical=9, bands=3, width=16),
        gpu_cases.streaming(PATTERNS, window=50, sink=5),
        gpu_cases.small_blocks(PATTERNS, sparsity=0.7),
        gpu_cases.tokens(PATTERNS, count=20, rows=64),
        gpu_cases.tokens(PATTERNS, count=7, rows=1),
        gpu_cases.permuted_keys(PATTERNS, sparsity=0.3),
        gpu_cases.permuted_keys(PATTERNS, sparsity=0.3, sort=64),
    ],
    ids=lambda case: case.name,
)
def test_the_patterns_of_the_gpu_are_what_they_say(case: gpu_cases.Case) -> None:
    pytest.importorskip("tvm_ffi")
    length = PATTERNS.length
    at = torch.arange(length)
    rows = case.rows(at[:, None], at[None]).expand(PATTERNS.heads, -1, -1)
    assert torch.equal(case.pattern.mask(length, q_heads=4, kv_heads=2)[0].expand_as(rows), rows)
    # a diagonal block counts half, and holds half a diagonal more
    assert case.pairs == pytest.approx(int(rows.sum()), abs=4 * length / 2 if "blocks of 32" in case.name else 0)
    missing: dict[str, str] = {}
    row = gpu_patterns.measure(replace(case, flex=None), rounds=1, timer=wall, missing=missing)
    assert row["error"]["spgen"] < 1e-5
    assert row["tflops"]["spgen"] == pytest.approx(case.flops / row["ms"]["spgen"] / 1e9, abs=0.1)
    assert not missing


def test_pairs_on_diagonals_are_counted() -> None:
    work = replace(WORK, length=150)
    for one in tokens.listed(work):
        mask = one.pattern.mask(150, q_heads=4)[0]
        tiles = torch.nn.functional.pad(mask, (0, 0, 0, 42)).unflatten(1, (3, 64))
        assert one.needed == mask.sum()
        assert one.visited in (one.needed, 64 * tiles.any(2).sum())
    assert one.visited == 64 * tiles.any(2).sum()


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match="bench gpu-attention"):
        gpu_attention.run(quick=True)
    with pytest.raises(DeviceError, match="bench gpu-patterns"):
        gpu_patterns.run(quick=True)


@pytest.mark.parametrize("suite", SUITES)
def test_committed_results_are_whole(suite: str) -> None:
    path = ROOT / "docs" / "bench" / f"{suite}.json"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert not result["quick"]
    assert result["suite"] == suite
    assert not result["missing"]
    for _, head, rows in report.tables(result):
        assert rows
        assert all(len(row) == len(head) for row in rows)
        assert "–" not in {cell for row in rows for cell in row}


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- bench: " in readme
    filled = report.filled(readme, ROOT / "docs" / "bench")
    assert readme == filled, "write them anew: python -m spgen.bench.report"


def test_a_table_is_filled_in_between_its_marks(tmp_path: Path) -> None:
    row = {
        "sparsity": 0.5, "ms": {"spgen": 1.0, "sdpa causal": 10.0, "sdpa mask": 20.0}, "gflops": 100.0,
        "peak_gflops": 0.0, "share_of_peak": None, "faster_than": {"sdpa causal": 10.0, "sdpa mask": 20.0},
        "error": {"spgen": 1e-6},
    }  # fmt: skip
    result = {
        "suite": "cpu-attention", "quick": False, "work": "work", "versions": {"torch": "2"}, "rows": [row],
        "machine": {"name": "a CPU", "kind": "cpu", "arch": "avx2", "threads": 4}, "missing": {"flex": "none"},
        "bfloat16": [row], "bfloat16_pairs": False, "pair_peak_gflops": None, "tokens": [], "stated_peak_gflops": 0.0,
        "launch": {"attend_us": 9.0, "overhead_us": 8.0},
        "start": {"first_call_s": 2.0, "warm_cache_s": 0.2},
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(result))
    text = report.filled("before\n<!-- bench: one -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text.startswith("before\n<!-- bench: one -->\nfloat32:\n\n| sparsity |")
    assert text.endswith("<!-- end -->\nafter")
    assert "| 50% | 1.00 ms | 100 | – | – | 10.0 ms (10.0×) | 20.0 ms (20.0×) | 1.0e-06 |" in text
    assert "flex is missing: none" in text
    assert "old" not in text


def test_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    from spgen.precompile import compile_text

    sizes: dict[str, Any] = {"q_shape": (1, 4, 100, 32), "kv_heads": 2, "kv_len": 100, "v_dim": 32}
    text = "causal() & window(7)"
    path = compile_text(text, **sizes, dtype="float32", target="cpu")
    assert path.exists()
    known = sp.compile_count()
    q, k, v = (torch.randn(1, heads, 100, 32) for heads in (4, 2, 2))
    sp.attention(sp.causal() & sp.window(7))(q, k, v)
    assert sp.compile_count() == known
