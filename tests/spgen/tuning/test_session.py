"""Tuning real kernels of this machine's CPU: small calls, few configurations; times are never tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spgen.autotune import search
from spgen.autotune.records import Record, Records, Trial
from spgen.autotune.search import Effort
from spgen.autotune.workloads import Case
from spgen.errors import SpgenError, WorkloadError
from spgen.ir.config import Config
from spgen.settings import settings
from spgen.target import Target
from spgen.tuned import device_of
from spgen.tuning import session as sessions
from spgen.tuning import subject as module
from spgen.tuning.compilers import Compilers
from spgen.tuning.measured import Place
from spgen.tuning.session import Session, Tuned

pytest.importorskip("tvm")

CASE = Case("small", "causal() & block(32, mask=$0: bool[1, 2, R, C])", 2, 200, 16, dtype="float32", density=0.4)
HERE = Place(Target.of("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    with Compilers(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.EFFORTS, "quick", Effort(favourites=3, steps=0, around=0, rounds=2))  # type: ignore[arg-type]


def session(path: Path, *cases: Case) -> tuple[Session, list[Record | str]]:
    found: list[Record | str] = []
    known = Records.load(path) if path.exists() else Records(device_of(HERE.target))
    return Session(
        cases, [HERE], known, path, "quick", lambda *args: None, lambda case, result: found.append(result)
    ), found  # fmt: skip


def test_a_session_finishes_saves_and_does_not_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    one, found = session(path, CASE)
    one.run()
    record = found[0]
    assert isinstance(record, Record)
    assert record.effort == "quick"
    assert record.gain >= 1
    assert len(record.trials) == 3
    assert record.case == dataclasses.asdict(CASE)
    assert set(record.facts["tiles"]) >= {f"{record.config.block_m}x{record.config.block_n}"}
    assert Records.load(path).found.keys() == {record.identity}
    measured: list[int] = []
    real = Tuned.measure

    def measure(self: Tuned, configs: list[Config], rounds: int) -> Any:
        measured.append(rounds)
        return real(self, configs, rounds)

    monkeypatch.setattr(Tuned, "measure", measure)
    session(path, CASE)[0].run()
    assert measured == [2, 2]  # the default, to compare with before, and the finalists


def test_several_devices_share_the_cases(tmp_path: Path) -> None:
    before = settings()
    cases = [replace(CASE, name=str(n), q_len=100 * (n + 1), kv_len=100 * (n + 1)) for n in range(3)]
    one, found = session(tmp_path / "mine.json", *cases)
    one.places = [HERE, HERE]
    one.run()
    assert {result.name for result in found if isinstance(result, Record)} == {"0", "1", "2"}
    assert {record.name for record in Records.load(tmp_path / "mine.json")} == {"0", "1", "2"}
    assert settings() is before  # threads leave the settings as they were


def test_sessions_of_other_processes_keep_their_records(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    one, _ = session(path, CASE)
    session(path, replace(CASE, name="other"))[0].run()
    one.run()
    assert {record.name for record in Records.load(path)} == {"small", "other"}


def test_a_fault_on_one_of_several_devices_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(sessions, "tune", broken)
    one, found = session(tmp_path / "mine.json", CASE, CASE)
    one.places = [HERE, HERE]
    with pytest.raises(RuntimeError, match="the driver is gone"):
        one.run()
    assert not found


def test_trials_outlive_their_default(compilers: Compilers) -> None:
    """Not what was concluded from them, and not another compiler's."""
    fresh = Tuned(CASE, HERE, compilers).record
    trials = {Config(64, 96): Trial(1e-3, 0.01)}
    known = replace(fresh, default=Config(64, 96), config=Config(64, 96), effort="thorough", gain=2.0, trials=trials)
    found = Tuned(CASE, HERE, compilers, known).record
    assert found == replace(fresh, trials=trials)
    assert Tuned(CASE, HERE, compilers, replace(known, toolchain="another")).record == fresh


def test_counts_are_those_of_the_kernel(compilers: Compilers) -> None:
    case = replace(CASE, pattern="causal()", q_len=256, kv_len=256)
    problem = Tuned(case, HERE, compilers)
    assert problem.subject.facts["tiles"]["64x64"] == [2 * 4, 2 * 6, 2 * 4, 0, 4, 2 * 10 * 64]
    assert problem.subject.facts["tiles"]["64x96"][-1] == 2 * 10 * 64  # tiles end where segments do


def test_a_configuration_with_other_results_is_a_fault(compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Tuned(CASE, HERE, compilers)
    other = next(config for config in problem.configs() if config != problem.default)
    assert not isinstance(problem.measure([problem.default], 1)[problem.default], str)
    problem._expected = problem._expected + 1  # type: ignore[operator]
    found = problem.measure([other], 1)[other]
    assert isinstance(found, str)
    assert "off those of" in found


def test_what_does_not_fit_the_memory_is_a_fault(compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Tuned(CASE, HERE, compilers)

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(problem, "launch", full)
    assert problem.measure([problem.default], 1) == {problem.default: "out of memory"}


def test_a_case_that_does_not_fit_is_skipped_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._arguments

    def tensors(case: Case, device: torch.device, values: bool) -> object:
        if case.name == "huge":
            raise torch.OutOfMemoryError("no")
        return real(case, device, values)

    monkeypatch.setattr(module, "_arguments", tensors)
    one, found = session(tmp_path / "mine.json", replace(CASE, name="huge"), CASE)
    one.run()
    assert one.faults == {"huge": "out of memory: the call itself does not fit"}
    assert isinstance(found[1], Record)


def test_a_pattern_that_cannot_be_read_names_the_case() -> None:
    with pytest.raises(WorkloadError, match=r"(?s)workload small: got .*windw"):
        module._arguments(replace(CASE, pattern="causal() & windw(4)"), HERE.device, False)
    with pytest.raises(SpgenError, match="workload small"):
        module._arguments(replace(CASE, density=2.0), HERE.device, False)


def test_a_fault_of_the_compiler_is_one_line(compilers: Compilers) -> None:
    problem = Tuned(CASE, HERE, compilers)
    wrong = replace(problem.default, block_m=7)
    assert next(fault for _, fault in problem.compiled([wrong])).startswith("schedule: block_m: got 7")
