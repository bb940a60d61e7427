"""The benchmarks measure what they say; times themselves are never tested."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import spgen as sp
from spgen.autotune.measure import interleaved, per_call, wall
from spgen.bench import cases, plot, report, runner, start, suites
from spgen.bench.ceilings import Ceiling, ceilings, fma_loop, pair_loop
from spgen.bench.peers import Contender
from spgen.bench.result import OURS, SCHEMA, Entry, Result, Row, read, write
from spgen.bench.suites import SUITES, Case, Suite, find, selected
from spgen.bench.workloads import Workload
from spgen.cli import app
from spgen.errors import DeviceError, SpgenError, ToolchainError

ROOT = Path(__file__).parent.parent.parent
COMMITTED = sorted((ROOT / "docs" / "bench").glob("*.json"))
WORK = Workload(heads=4, kv_heads=2, length=200, head_dim=16, dtype=torch.float32, device="cpu")
HARDWARE = {"name": "a CPU", "kind": "cpu", "arch": "avx2", "cores": 4, "threads": 4}
SETTINGS = {"quick": False, "only": "", "peers": ["flex"], "rounds": 9, "reading_ms": 0, "load": 0.1}


def tiny(device: str = "cpu", *peers: str) -> Suite:
    """Two sections of small cases."""
    work = replace(WORK, device=device, dtype=torch.bfloat16, head_dim=64, length=256) if device != "cpu" else WORK

    def listed(quick: bool) -> Iterator[Case]:
        yield from suites.swept("block lists", work, 128 if device != "cpu" else 32, (0.0,) if quick else (0.0, 0.9))
        yield Case("window, 200", "patterns", work, partial(cases.streaming, window=50, sink=5))

    return Suite("tiny", "small cases", device, listed, peers)


def made(*rows: Row, **changes: Any) -> Result:
    return replace(Result("cpu", HARDWARE, {"torch": "2"}, SETTINGS, list(rows)), **changes)


def row(name: str, own: float, sparsity: float | None = None, **others: float) -> Row:
    found = {
        who: Entry(ms, 0.01, 0.1, ms + 0.1, 0.01, 0.5, 1e3 / ms, 1 / ms, 0.5, error=1e-6)
        for who, ms in {OURS: own, **others}.items()
    }
    return Row(name, "a section", "causal()", WORK.record(), found, {}, sparsity, 0.25, 1.0, 2.0, 300.0, 20.0, 0.1)


# measuring


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


def test_the_ceilings_are_plausible() -> None:
    for loop in (fma_loop(0.01), pair_loop(0.01)):
        assert loop is None or 1e9 < loop.amount / wall(loop) < 1e14
    copy = ceilings(WORK)["copy"]
    assert 1e8 < copy.amount / wall(copy) < 1e13


def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    seen: list[str] = []
    result = runner.run(tiny("cpu", "sdpa", "sdpa-mask", "minference", "cudnn"), quick=True, progress=seen.append)
    assert seen == [row.case for row in result.rows] == ["blocks of 32, 0% left out, 200, fp32", "window, 200"]
    assert (result.launch, result.start, result.failures) == (None, None, {})
    for found in result.rows:
        assert list(found.entries) == [OURS, "sdpa", "sdpa-mask"]
        assert found.skipped["minference"] == "not installed (pip install minference)"
        assert found.skipped["cudnn"] == "does not serve this: its kernel is for GPUs"
        own, dense, masked = found.entries.values()
        assert own.error is not None
        assert own.error < 1e-5
        assert (dense.pairs, dense.error, masked.pairs) == ("causal", None, "same")
        assert masked.error is not None
        assert None not in (own.ms, own.plan_ms, own.with_plan_ms, own.noise, own.with_plan_noise, own.plan_mb)
        assert (dense.plan_ms, dense.with_plan_ms) == (0.0, dense.ms)
        assert_figures(found)
    problem = next(tiny().cases(True)).problem()
    assert result.rows[0].gflop == pytest.approx(problem.flops / 1e9, rel=1e-3)
    assert result.rows[0].mbyte == pytest.approx(problem.bytes / 1e6, rel=1e-3)
    assert result.rows[0].density == 1.0
    write(result, tmp_path / "result.json")
    assert read(tmp_path / "result.json") == result


def test_an_interruption_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    first = row("first", 1.0)

    def measured(case: Case, *arguments: Any) -> Row:
        if "window" in case.name:
            raise KeyboardInterrupt
        return first

    monkeypatch.setattr(runner, "measure", measured)
    result = runner.run(tiny("cpu"), quick=True)
    assert result.rows == [first]
    assert result.settings["left"] == 1
    assert "interrupted: 1 cases were not measured" in report.facts(result)
    with pytest.raises(KeyboardInterrupt):
        runner.run(tiny("cpu"), quick=True, only="window")


def assert_figures(found: Row) -> None:
    """Rates and the floor follow from the times."""
    assert found.gflop is not None
    assert found.mbyte is not None
    assert found.copy_gb_s is not None
    for entry in found.entries.values():
        time = entry.ms if entry.ms is not None else entry.with_plan_ms
        assert time is not None
        assert entry.gflops == pytest.approx(found.gflop / time * 1e3, rel=5e-3)
        assert entry.gb_s == pytest.approx(found.mbyte / time, rel=5e-3)
        if found.floor_ms is not None:
            assert entry.of_floor == pytest.approx(found.floor_ms / time, rel=5e-3)
    if found.peak_gflops is not None:
        floor = max(found.gflop / found.peak_gflops * 1e3, found.mbyte / found.copy_gb_s)
        assert found.floor_ms == pytest.approx(floor, rel=5e-3)


@pytest.mark.gpu
def test_a_run_on_a_gpu() -> None:
    result = runner.run(tiny("cuda", "cudnn", "flash", "flex"), quick=True)
    assert not result.failures
    for found in result.rows:
        assert list(found.entries) == [OURS, "cudnn", "flash", "flex"], found.skipped
        assert found.entries["flex"].error is not None
        assert_figures(found)


def measured(contender: Contender, monkeypatch: pytest.MonkeyPatch) -> Row:
    """A row in which ours is the contender."""
    monkeypatch.setattr(cases.Problem, "ours", lambda problem, q, k, v: contender)
    limits = {"compute": Ceiling(lambda: None, 1e6), "copy": Ceiling(lambda: None, 1e6)}
    return runner.measure(next(tiny().cases(True)), (), runner.Effort(2, 0), limits)


def right(plan: Any = None) -> torch.Tensor:
    problem = next(tiny().cases(True)).problem()
    found: torch.Tensor = sp.reference.attention(*problem.work.tensors(), problem.pattern)
    return found


def test_planning_inside_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(Contender(right, plans_inside=True), monkeypatch)
    entry = found.entries[OURS]
    assert (entry.ms, entry.plan_ms, entry.noise) == (None, None, None)
    assert entry.with_plan_ms is not None
    assert_figures(found)


def test_a_slow_plan_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SLOW", 0.0)
    entry = measured(Contender(right, lambda: None), monkeypatch).entries[OURS]
    assert None not in (entry.ms, entry.plan_ms, entry.with_plan_ms)
    assert (entry.noise, entry.with_plan_noise) == (None, None)  # of a single reading


@pytest.mark.parametrize("part", ["run", "whole"])
def test_a_wrong_result_is_no_figure(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (
        Contender(lambda plan: right() + 1) if part == "run" else Contender(right, whole=lambda: right() * torch.nan)
    )
    found = measured(wrong, monkeypatch)
    assert OURS not in found.entries
    assert found.skipped[OURS].startswith("failed: differs from the oracle by ")
    assert made(found).failures == {found.case: found.skipped[OURS]}
    for entry in (made(found, found), made(found, row("a", 1.0))):
        assert report.tables(entry)
        assert plot.description(entry)
        report.show(entry)


def test_our_own_failure_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: Any) -> torch.Tensor:
        raise RuntimeError("boom")

    assert measured(Contender(broken), monkeypatch).skipped == {OURS: "failed: RuntimeError: boom"}
    once = iter([right()])  # and then StopIteration
    assert measured(Contender(lambda plan: next(once)), monkeypatch).skipped == {OURS: "failed: StopIteration: "}


def test_launches_and_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm_ffi")
    monkeypatch.setattr(start, "_PATTERNS", ("causal()",))
    first = start.first_calls("cpu", torch.float32)
    assert first["warm_cache_s"] > 0
    assert first["first_call_s"] > 0
    assert first["patterns"] == ["causal()"]
    launch = start.launches("cpu", torch.float32)
    assert launch["bare_us"] > 0
    assert launch["overhead_us"] == pytest.approx(launch["attend_us"] - launch["bare_us"], abs=0.02)


# suites


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("quick", [False, True])
def test_suites_are_lists_of_cases(name: str, quick: bool) -> None:
    suite = SUITES[name]
    every = list(suite.cases(quick))
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    assert {case.work.device for case in every} == {suite.device}
    for section in {case.section for case in every}:  # a table sweeps sparsity or it does not
        assert len({case.sparsity is None for case in every if case.section == section}) == 1
    assert selected(suite, quick, names[-1].upper())[-1].name == names[-1]
    with pytest.raises(SpgenError, match=r"(?s)--only: got 'nothing like it'.*" + re.escape(names[0])):
        selected(suite, quick, "nothing like it")


@pytest.mark.parametrize("case", list(SUITES["cpu"].cases(True)), ids=lambda case: case.name)
def test_the_cases_of_the_cpu_suite_can_be_made(case: Case) -> None:
    assert 0 < case.problem().pairs <= case.work.causal_pairs


def test_unknown_suites_and_missing_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpgenError, match=r"(?s)suite 'gpu'.*attention \(.*cpu \("):
        find("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find().name == "cpu"
    with pytest.raises(DeviceError, match=r"(?s)bench attention: got no GPU.*without one there is: cpu"):
        find("attention")


# results


numbers = st.none() | st.floats(0, 1e9)
entries = st.builds(
    Entry, *[numbers] * 9, pairs=st.sampled_from(["same", "causal", "more"]), error=numbers
)  # fmt: skip
rows = st.builds(
    Row, st.text(), st.text(), st.text(), st.just(WORK.record()), st.dictionaries(st.text(), entries, max_size=3),
    st.dictionaries(st.text(), st.text(), max_size=2), *[numbers] * 7,
)  # fmt: skip


@given(st.lists(rows, max_size=3), st.none() | st.just({"attend_us": 9.0, "bare_us": 1.0, "overhead_us": 8.0}))
def test_results_round_trip(tmp_path_factory: pytest.TempPathFactory, found: list[Row], launch: Any) -> None:
    path = tmp_path_factory.mktemp("results") / "one.json"
    result = made(*found, launch=launch)
    write(result, path)
    assert read(path) == result
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: "no JSON", "no JSON"),
        (lambda found: [1, 2], "without a schema"),
        (lambda found: {"suite": "cpu"}, "without a schema"),
        (lambda found: found | {"schema": 0}, "another schema.*measure anew"),
        (lambda found: found | {"rows": 3}, "damaged"),
        (lambda found: found | {"more": 3}, "damaged result.*more"),
        (lambda found: {name: value for name, value in found.items() if name != "suite"}, "damaged result.*suite"),
        (lambda found: found | {"rows": [{"entries": {"spgen": {"ms": 1}}}]}, "damaged result.*noise"),
    ],
)
def test_what_is_no_result_is_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    content = change({"schema": SCHEMA, **asdict(made(row("a", 1.0)))})
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SpgenError, match=rf"(?s)old\.json: .*{message}"):
        read(path)
    with pytest.raises(SpgenError, match=r"(?s)gone\.json: .*that spgen bench --json wrote"):
        read(tmp_path / "gone.json")


# tables and plots


def test_tables_show_what_was_measured() -> None:
    first, second = report.tables(made(row("a", 2.0, 0.5, flex=6.0), row("b", 1.0, 0.9)))[0], row("c, 1K", 4.0)
    assert list(first.head) == [
        "length", "sparsity", "spgen", "GFLOP/s", "of the floor", "plan", "with plan", "FlexAttention", "error"
    ]  # fmt: skip
    assert list(first.rows[0]) == [
        "200", "50%", "2.00 ms", "500", "50%", "0.100 ms", "2.10 ms", "6.00 ms (3.0×)", "1.0e-06"
    ]  # fmt: skip
    assert first.rows[1][-2] == "–"
    inside = Entry(None, with_plan_ms=8.2, gflops=100.0, pairs="more")
    listed = report.tables(made(replace(second, entries={**second.entries, "minference": inside})))[0]
    assert list(listed.rows[0])[:2] == ["c, 1K", "25.0%"]
    assert listed.rows[0][-2] == "8.20 ms with plan (2.0×)"
    bare = report.tables(made(replace(second, entries={OURS: Entry(1.0)})))[0]
    assert list(bare.head) == ["pattern", "density", "spgen"]  # columns that say nothing are left out


def test_the_break_even_lies_between_two_sparsities() -> None:
    work = {"batch": 1, "heads": 2, "kv_heads": 1, "length": 2048, "head_dim": 16, "dtype": "bfloat16"}
    times = {0.0: 12.0, 0.5: 8.0, 0.9: 2.0}
    dense = {"cudnn": Entry(ms=10.0), "flash": Entry(ms=11.0)}
    rows = [
        Row("a", "lists", "", work, {"spgen": Entry(ms=ms), **dense}, sparsity=share) for share, ms in times.items()
    ]
    made = Result("attention", {"kind": "cuda"}, {}, {}, rows)
    assert report._break_evens(made) == ["as fast as dense attention at 25% of the blocks left out (2K bfloat16)"]
    assert report._break_evens(replace(made, rows=rows[1:])) == []  # it is faster at all of them


def test_facts_tell_who_was_left_out() -> None:
    left = {"flex": "failed: boom"}
    facts = report.facts(made(replace(row("a", 1.0), skipped=left), row("b", 1.0)))
    assert "FlexAttention, in 1 of 2 cases: failed: boom" in facts
    assert "FlexAttention: failed: boom" in report.facts(made(replace(row("a", 1.0), skipped=left)))
    assert any("quick" in fact for fact in report.facts(made(row("a", 1.0), settings={**SETTINGS, "quick": True})))
    assert any("busy" in fact for fact in report.facts(made(row("a", 1.0), settings={**SETTINGS, "load": 1.5})))


def test_a_table_is_filled_in_between_its_marks(tmp_path: Path) -> None:
    write(made(row("a", 2.0, 0.5)), tmp_path / "one.json")
    text = report.filled("before\n<!-- bench: one -->\nold\n<!-- end -->\nafter", tmp_path)
    assert text.startswith(
        "before\n<!-- bench: one -->\n![cpu: rates over sparsity, and of patterns](docs/bench/one.svg)\n"
    )
    assert "A section:\n\n| length | sparsity |" in text
    assert text.endswith("<!-- end -->\nafter")
    assert "old" not in text


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_whole(path: Path) -> None:
    result = read(path)
    assert result.suite == path.stem
    assert result.suite in SUITES
    assert not result.settings["quick"]
    assert not result.settings["only"]
    assert not result.failures
    for found in result.rows:
        assert found.entries[OURS].ms is not None
        assert found.entries[OURS].error is not None


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- bench: (\S+) -->", readme)) == {path.stem for path in COMMITTED}
    filled = report.filled(readme, ROOT / "docs" / "bench")
    assert readme == filled, "write them anew: python -m spgen.bench.report"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_plots_show_the_committed_results(path: Path) -> None:
    drawn = path.with_suffix(".svg").read_text(encoding="utf-8")
    assert plot.description(read(path)) in drawn, "draw them anew: python -m spgen.bench.report"


def test_a_plot_is_stale_when_a_figure_changes() -> None:
    result = made(row("a", 1.0, flex=2.0))
    other = made(row("a", 1.0, flex=2.5))
    assert plot.description(result) == plot.description(made(row("a", 1.0, flex=2.0)))
    assert plot.description(result) != plot.description(other)


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    work = {**WORK.record(), "length": 4096}
    swept = [row("a", 1.0, 0.0, flex=2.0), row("b", 1.0, 0.5), replace(row("c", 1.0, 0.5, odd=3.0), work=work)]
    result = made(*swept, replace(row("named", 1.0, cudnn=2.0), section="patterns", peak_gflops=None))
    first = plot.render(result, "svg")
    assert first == plot.render(result, "svg")
    text = first.decode()
    for wanted in (
        plot.description(result),
        "named",
        "FlexAttention",
        "a section, 4K",
        "GFLOP/s of needed work",
        "50%",
    ):
        assert wanted in text
    for some in (swept, swept[:1], [result.rows[-1]]):
        plot.save(made(*some), tmp_path / "one.PNG")
        assert (tmp_path / "one.PNG").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SpgenError, match=r"(?s)one\.pdf: got a name that ends in \.pdf.*\.png or \.svg"):
        plot.save(result, tmp_path / "one.pdf")
    with pytest.raises(SpgenError, match=r"one\.svg: got No such file"):
        plot.save(result, tmp_path / "nowhere" / "one.svg")


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ToolchainError, match=r"(?s)matplotlib.*spgen\[show\]"):
        plot.check(Path("one.svg"))


# the command


def run_command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    def file(name: str, result: Result) -> Path:
        write(result, tmp_path / name)
        return tmp_path / name

    return file


def test_the_command_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    monkeypatch.setitem(suites.SUITES, "tiny", tiny("cpu", "sdpa"))
    out, drawn = tmp_path / "new.json", tmp_path / "new.svg"
    done = run_command("tiny", "--quick", "--only", "window", "--peers", "none", "--json", out, "--plot", drawn)
    assert done.exit_code == 0, done.output
    result = read(out)
    assert [row.case for row in result.rows] == ["window, 200"]
    assert result.settings["peers"] == []
    assert list(result.rows[0].entries) == [OURS]
    assert "window, 200" in done.output
    assert "spgen" in done.output
    assert plot.description(result) in drawn.read_text(encoding="utf-8")
    again = run_command("tiny", "--quick", "--only", "window", "--compare", out)
    assert again.exit_code in (0, 1)  # the machine may be busy
    assert "geometric mean" in again.output


def test_the_command_compares(files: Callable[..., Path]) -> None:
    old = files("old.json", made(row("a", 1.0, flex=1.0), row("b", 2.0)))
    new = files("new.json", made(row("a", 1.0, flex=9.0), row("b", 1.0)))
    slow = files("slow.json", made(row("a", 1.0, flex=1.0), row("b", 2.2)))
    done = run_command("--from", new, "--compare", old)
    assert done.exit_code == 0, done.output
    assert "became slower nowhere" in done.output
    assert re.search(r"spgen, planned: 1\.414× in the geometric mean", done.output)
    worse = run_command("--from", slow, "--compare", old)
    assert worse.exit_code == 1
    assert "became slower 2 times" in worse.output


def test_a_wrong_result_of_ours_is_an_exit_code(files: Callable[..., Path]) -> None:
    wrong = replace(row("a", 1.0), entries={}, skipped={OURS: "failed: differs from the oracle by 1"})
    done = run_command("--from", files("new.json", made(wrong)))
    assert done.exit_code == 1
    assert "differs from the oracle" in done.output


def test_the_command_refuses_before_it_measures(
    files: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(runner, "measure", never)
    elsewhere = files("elsewhere.json", made(row("a", 1.0)))
    other = files("other.json", made(row("a", 1.0), suite="attention"))
    (tmp_path / "no.json").write_text("{")
    for arguments, message in (
        (("gpu",), r"suite 'gpu'.*attention \(.*cpu \("),
        (("--from", elsewhere, "--quick"), r"--from: got --quick beside it"),
        (("cpu", "--from", elsewhere), r"--from: got SUITE beside it"),
        (("cpu", "--peers", "felx"), r"--peers: got 'felx'.*sdpa, sdpa-mask, flex"),
        (("cpu", "--only", "nothing"), r"--only: got 'nothing'.*blocks of 64"),
        (("cpu", "--json", tmp_path / "nowhere" / "new.json"), r"new\.json: got No such file"),
        (("cpu", "--json", tmp_path), r"got Is a directory"),
        (("cpu", "--plot", tmp_path / "new.gif"), r"new\.gif: got a name that ends in \.gif"),
        (("cpu", "--compare", tmp_path / "no.json"), r"no\.json: got a file that is no JSON"),
        (("cpu", "--compare", elsewhere), r"elsewhere\.json: got a result of a CPU"),
        (("cpu", "--compare", other), r"other\.json: got a result of suite attention.*suite cpu"),
    ):
        done = run_command(*arguments)
        assert isinstance(done.exception, SpgenError), (arguments, done.output, done.exception)
        assert re.search(message, str(done.exception), re.DOTALL), str(done.exception)
    assert not (tmp_path / "new.gif").exists()


def test_other_hardware_is_compared_when_asked(files: Callable[..., Path]) -> None:
    old = files("old.json", made(row("a", 1.0), hardware={**HARDWARE, "threads": 8}))
    new = files("new.json", made(row("a", 1.0)))
    refused = run_command("--from", new, "--compare", old)
    assert isinstance(refused.exception, SpgenError)
    assert "threads 8" in str(refused.exception)
    assert run_command("--from", new, "--compare", old, "--compare-anyway").exit_code == 0


def test_the_help_names_every_suite() -> None:
    text = run_command("--help").output
    assert all(name in text for name in SUITES)


def test_neither_the_command_line_nor_matplotlib_is_needed() -> None:
    script = """
import sys
for name in ("typer", "rich", "matplotlib", "platformdirs", "tvm", "tvm_ffi", "flashinfer", "flash_attn", "minference"):
    sys.modules[name] = None
import pkgutil, importlib, spgen.bench
for module in pkgutil.walk_packages(spgen.bench.__path__, "spgen.bench."):
    importlib.import_module(module.name)
from spgen.bench import run, read, write
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_reading_and_comparing_need_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom spgen.bench import compare, plot, report, result\n"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


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
