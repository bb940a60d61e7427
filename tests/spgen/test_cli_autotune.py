"""The command autotune: what it runs, what it says without running, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spgen import cli
from spgen import tuned as tuned_module
from spgen.autotune.records import SHIPPED, Bucket, Key, Record, Records, Trial
from spgen.autotune.work import Resources
from spgen.autotune.workloads import Case, load, named
from spgen.cli import autotune as command
from spgen.ir.config import Config
from spgen.settings import override
from spgen.target import Target
from spgen.tuned import device_of, toolchain
from spgen.tuning import session as sessions
from spgen.weights import compile as products
from spgen.weights.storage import Layout

CPU = Target.of("cpu")
DEFAULT, OTHER = Config(64, 64), Config(64, 32)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["spgen", "autotune", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def record(case: Case, effort: str = "standard", **changes: Any) -> Record:
    trials = {DEFAULT: Trial(2e-3, 0.01), OTHER: Trial(1e-3, 0.01, "", Resources(100, 0, 0))}
    made = Record(
        Key("before", case.dtype, case.head_dim, case.value_dim), Bucket(1, 1, 1), case.name, DEFAULT, OTHER,
        toolchain(CPU), effort, "2026-01-01", 2.0, trials, {}, dataclasses.asdict(case),
    )  # fmt: skip
    return replace(made, **changes)


def keep(path: Path, *records: Record, target: Target = CPU) -> Path:
    found = Records(device_of(target))
    for one in records:
        found.add(one)
    found.save(path)
    return path


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the measuring; the names of the cases that were asked for."""
    asked: list[str] = []

    def work(self: sessions.Session) -> None:
        for number, case in enumerate(self.cases):
            asked.append(case.name)
            if "bad" in case.name:
                self.faults[case.name] = "out of memory"
                self.finished(case, "out of memory")
                continue
            self.said(case, "64x64", 1, 2)
            found = record(case, self.effort, bucket=Bucket(number + 1, 1, 1))
            self.records.add(found)
            self.records.save(self.path)
            self.finished(case, found)

    monkeypatch.setattr(sessions.Session, "run", work)
    return asked


def test_lists_the_workloads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in named())


def test_tunes_once(
    tuned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    arguments = ("-w", "cpu-encoder", "--records", str(path), "--effort", "quick")
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    names = [case.name for case in load("cpu-encoder")]
    assert tuned == names
    printed = capsys.readouterr().out
    assert "2.000 x the default in geometric mean" in printed
    assert "64x32" in printed
    assert len(Records.load(path)) == len(names)
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    assert tuned == names  # finished: nothing was asked again
    assert "2.000 x the default" in capsys.readouterr().out
    assert run("-w", "cpu-encoder", "--records", str(path), monkeypatch=monkeypatch) == 0
    assert tuned == names * 2  # with more effort it is


def test_another_compiler_measures_again(tuned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load("cpu-encoder")[0]
    path = keep(tmp_path / "mine.json", record(case, "thorough", toolchain="apache-tvm 0.1"))
    run("-w", "cpu-encoder", "--records", str(path), monkeypatch=monkeypatch)
    assert case.name in tuned


def test_a_pattern_of_the_command_line(tuned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    call = ("causal() & window(64)", "--q", "2x4x512x32", "--kv-heads", "2", "--density", "0.3")
    assert run(*call, "--records", str(path), monkeypatch=monkeypatch) == 0
    found = next(iter(Records.load(path))).case
    assert (found["pattern"], found["batch"], found["q_heads"], found["kv_heads"]) == ("causal() & window(64)", 2, 4, 2)
    assert (found["q_len"], found["kv_len"], found["head_dim"], found["density"]) == (512, 512, 32, 0.3)


def test_faults_are_reported_and_the_rest_goes_on(
    tuned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"pattern": "causal()", "q_heads": 1, "q_len": 8, "head_dim": 16, "dtype": "float32"}
    workload = tmp_path / "w.json"
    workload.write_text(json.dumps({"w": {"cases": [{**case, "name": "bad"}, {**case, "name": "good"}]}}))
    records = str(tmp_path / "mine.json")
    assert run("-w", str(workload), "--records", records, monkeypatch=monkeypatch) == 0
    captured = capsys.readouterr()
    assert "skipped w: bad: out of memory" in captured.err
    assert "w: good" in captured.out
    workload.write_text(json.dumps({"w": {"cases": [{**case, "name": "bad"}]}}))
    assert run("-w", str(workload), "--records", records, monkeypatch=monkeypatch) == 1


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: sessions.Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sessions.Session, "run", stopped)
    path = str(tmp_path / "mine.json")
    assert run("-w", "cpu-encoder", "--records", path, monkeypatch=monkeypatch) == 130
    assert f"interrupted; what was measured is in {path}" in capsys.readouterr().err.replace("\n", " ")


def test_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = load("cpu-encoder")
    own = keep(tmp_path / "mine.json", record(cases[0], "quick"))
    other = keep(
        tmp_path / "other.json", record(cases[0], "thorough"), record(cases[1], bucket=Bucket(2, 2, 2)),
    )  # fmt: skip
    assert run("--records", str(own), "--merge", str(other), monkeypatch=monkeypatch) == 0
    assert "2 of 2 records taken" in capsys.readouterr().out
    assert {one.effort for one in Records.load(own)} == {"thorough", "standard"}


def test_exports_what_calls_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = load("cpu-encoder")
    keep(tmp_path / "mine.json", record(cases[0]))
    keep(tmp_path / "more.json", record(cases[0], "quick"), record(cases[1], bucket=Bucket(2, 2, 2)))
    tuned_module.forget()
    with override(records=tmp_path):
        assert run("--export", str(tmp_path / "out" / "all.json"), monkeypatch=monkeypatch) == 0
    tuned_module.forget()
    found = Records.load(tmp_path / "out" / "all.json")
    assert {one.name for one in found} >= {cases[0].name, cases[1].name}
    assert (
        next(one for one in found if one.name == cases[0].name and one.bucket == Bucket(1, 1, 1)).effort == "standard"
    )
    assert f"{len(found)} records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "got nothing to tune"),
        (("-w", "cpu-encoderr"), "did you mean cpu-encoder"),
        (("--target", "h2000", "causal()"), "h200"),
        (("--target", "a100", "causal()"), "--offline"),
        (("--target", "aarch64", "causal()"), "--offline"),
        (("windw(3)", "--records", "RECORDS"), "windw"),
        (("causal()", "--records", "/proc/none/mine.json"), "/proc/none/mine.json"),
        (("causal()", "--records", "DAMAGED"), "a file that `spgen autotune` wrote"),
        (("--report", "--target", "riscv64"), "run spgen autotune first"),
        (("--report", "--target", "cpu", "--records", "OTHERS"), "records of a cuda device"),
        (("causal()", "--records", "OTHERS"), "records of NVIDIA H200"),
        (("--merge", "OTHERS", "--records", "RECORDS"), "records of NVIDIA H200"),
        (("causal()", "--target", "h200", "--devices", "0,x", "--records", "RECORDS"), "--devices: got '0,x'"),
        (("causal()", "--devices", "all", "--records", "RECORDS"), "leave it out, or say --target cuda"),
        (("--report", "--devices", "0", "--target", "cpu"), "--devices: got '0'"),
        (("causal()", "--plot", "model.png", "--records", "RECORDS"), "--plot: got model.png, without --report"),
        (("causal()", "--q", "1x8x64x16", "--kv-length", "0"), "64 rows and 0 keys"),
        (("causal()", "--q", "1x8x64x16", "--dtype", "float64", "--records", "RECORDS"), "dtype: got 'float64'"),
        (("causal()", "--q", "1x8x64x16", "--kv-heads", "3", "--records", "RECORDS"), "3"),
        (("causal()", "--q", "1x8x64x16", "--dtype", "int8", "--offline"), "dtype: got 'int8'"),
    ],
)
def test_bad_input_is_named(
    arguments: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    others = str(SHIPPED / "nvidia-h200-sm-90.json")
    places = {"RECORDS": str(tmp_path / "mine.json"), "DAMAGED": str(damaged), "OTHERS": others}
    code = run(*(places.get(text, text) for text in arguments), monkeypatch=monkeypatch)
    assert code in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("target", ["a100", "aarch64"])
def test_a_target_that_is_not_here_leaves_no_file(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("causal()", "--target", target, "--records", str(tmp_path / "mine.json"), monkeypatch=monkeypatch) == 2
    assert not list(tmp_path.iterdir())


def test_ranks_for_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from spgen.autotune import search

    brief = search.Effort(favourites=3, steps=0, around=0, rounds=1)
    monkeypatch.setitem(search.EFFORTS, "quick", brief)  # type: ignore[arg-type]
    call = ("causal() & block(64, indices=$0: int32[1, 2, R, K])", "--q", "1x2x512x64", "--dtype", "bfloat16")
    assert run(*call, "--target", "a100", "--offline", "--effort", "quick", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "registers" in printed
    assert printed.count(" ms ") == 3
    assert "times lie within a factor of" in printed


def test_a_default_of_another_form_measures_again() -> None:
    h200 = Target.of("h200")
    case = load("llama3-8b-prefill")[0]
    today = command._default(case, h200)
    assert today.option("warpgroups")
    for default, known in ((Config(128, 64, ("warps=8",)), False), (today, True)):
        made = record(case, default=default, toolchain=toolchain(h200))
        records = Records(device_of(h200))
        records.add(made)
        assert command._finished(records, case, h200, command.Effort.standard) == (made if known else None)


def test_a_product_whose_default_changed_is_measured_again() -> None:
    h200 = Target.of("h200")
    shipped = Records.load(SHIPPED / "nvidia-h200-sm-90.json")
    (known,) = [one for one in shipped if one.name == "llama3-8b-mlp: blocks of 128, 10 %"]
    (case,) = [one for one in load("llama3-8b-mlp") if one.name == known.name]
    made = replace(known, toolchain=toolchain(h200))
    for other, found in ((made, made), (replace(made, default=Config(64, 64, ("warps=8",))), None)):
        records = Records(device_of(h200))
        records.add(other)
        assert command._finished(records, case, h200, command.Effort.quick) == found


@pytest.mark.parametrize("layout", ["bitmap()", "blocks(64, 64)", "blocks(128, 128)"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 4096, 4096), (16, 1024, 4096), (4, 4096, 14336)])
def test_a_default_is_known_again_whatever_is_stored(layout: str, rows: int, outputs: int, inputs: int) -> None:
    h200 = Target.of("h200")
    request = products.Request("bfloat16", Layout.read(layout), "bfloat16", False, h200)
    for stored in range(outputs * inputs // 50, outputs * inputs, outputs * inputs // 25):
        sizes = products.Sizes(rows, outputs, inputs, stored)
        key, bucket = products.identity_of(request, sizes)
        default = products.default_of(request, sizes)
        case = {"rows": rows, "outputs": outputs, "inputs": inputs}
        record = Record(key, bucket, "", default, default, toolchain(h200), case=case)
        assert default in products.defaults_of_record(record, h200), sizes


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_a_finished_tuning_imports_no_torch(target: str, tmp_path: Path) -> None:
    device = Target.of(target)
    dtype = "float32" if target == "cpu" else "bfloat16"
    case = Case("causal()", "causal()", 2, 64, 16, 1, 2, 64, 16, dtype, 0.1)
    default = DEFAULT if target == "cpu" else command._default(case, device)
    made = record(case, default=default, toolchain=toolchain(device))
    path = keep(tmp_path / "mine.json", made, target=device)
    program = (
        "import sys; from spgen import cli; sys.argv = ['spgen', 'autotune', 'causal()', '--q', '1x2x64x16', "
        f"'--records', {str(path)!r}, '--target', {target!r}, '--dtype', {dtype!r}]\n"
        "try: cli.main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2.000" in done.stdout
