"""Comparing results: what counts as a change, and which results may be compared."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spgen.bench.compare import PLANNED, PLANNING, Change, check, compare, show
from spgen.bench.result import Entry, Result, Row
from spgen.errors import SpgenError

HARDWARE: dict[str, Any] = {"name": "a GPU", "kind": "cuda", "arch": "sm_90", "multiprocessors": 132, "driver": "1"}
WORK = {"batch": 1, "heads": 2, "kv_heads": 1, "length": 64, "head_dim": 16, "dtype": "bfloat16"}

times = st.floats(1e-3, 1e5)
noises = st.floats(0, 0.5)
entries = st.builds(
    Entry, ms=st.none() | times, noise=st.none() | noises, plan_ms=st.none() | st.just(0.0) | times,
    with_plan_ms=st.none() | times, with_plan_noise=st.none() | noises,
)  # fmt: skip


def row(name: str, own: dict[str, Entry], **work: int) -> Row:
    return Row(name, "a section", "causal()", {**WORK, **work}, own)


def result(*rows: Row, **changes: Any) -> Result:
    made = Result("attention", HARDWARE, {"torch": "2"}, {"quick": False, "rounds": 3, "reading_ms": 80}, list(rows))
    return replace(made, **changes)


def change(before: float, after: float, noise: float = 0.0) -> Change:
    return Change("a", "spgen", PLANNED, before, after, noise)


def test_two_percent_and_three_times_the_noise() -> None:
    assert change(100, 101.9).verdict == "same"
    assert change(100, 102.1).verdict == "slower"
    assert change(102.1, 100).verdict == "faster"
    assert change(100, 102.9, noise=0.01).verdict == "same"
    assert change(100, 103.1, noise=0.01).verdict == "slower"


@given(times, times, noises)
def test_a_change_and_its_reverse(before: float, after: float, noise: float) -> None:
    there, back = change(before, after, noise), change(after, before, noise)
    assert {"faster": "slower", "slower": "faster", "same": "same"}[there.verdict] == back.verdict
    assert there.speed_up * back.speed_up == pytest.approx(1)
    assert change(before, before, noise).verdict == "same"
    if there.verdict == "slower":
        assert after / before - 1 > max(0.02, 3 * noise) * (1 - 1e-9)


@given(st.lists(st.tuples(entries, entries), min_size=1, max_size=5))
def test_only_what_both_measured_is_compared(pairs: list[tuple[Entry, Entry]]) -> None:
    old = result(*(row(str(n), {"spgen": one, "flex": one}) for n, (one, _) in enumerate(pairs)))
    new = result(*(row(str(n), {"spgen": two}) for n, (_, two) in enumerate(pairs)))
    found = compare(old, new)
    assert not found.gone
    assert not found.new
    assert {one.contender for one in found.changes} <= {"spgen"}
    planned = [one for one in found.changes if one.measure == PLANNED]
    assert len(planned) == sum(one.ms is not None and two.ms is not None for one, two in pairs)
    for one in planned:
        before, after = pairs[int(one.case)]
        assert (one.before_ms, one.after_ms) == (before.ms, after.ms)
        assert one.noise == pytest.approx(math.sqrt((before.noise or 0) ** 2 + (after.noise or 0) ** 2))
    planning = sum(
        one.with_plan_ms is not None and two.with_plan_ms is not None and two.plan_ms != 0 for one, two in pairs
    )
    assert len(found.changes) - len(planned) == planning
    for (_, measure), mean in found.speed_ups().items():
        ratios = [one.speed_up for one in found.changes if one.measure == measure]
        assert min(ratios) * (1 - 1e-9) <= mean <= max(ratios) * (1 + 1e-9)
        assert mean == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-6)
    assert compare(new, new).regressions == []


def test_only_our_regressions_count() -> None:
    old = result(row("a", {"spgen": Entry(1.0, 0.0), "flex": Entry(1.0, 0.0)}))
    new = result(row("a", {"spgen": Entry(1.0, 0.0), "flex": Entry(2.0, 0.0)}))
    assert [one.verdict for one in compare(old, new).changes] == ["same", "slower"]
    assert compare(old, new).regressions == []
    slower = result(row("a", {"spgen": Entry(1.0, 0.0, with_plan_ms=2.0)}))
    before = result(row("a", {"spgen": Entry(1.0, 0.0, with_plan_ms=1.5)}))
    assert [one.measure for one in compare(before, slower).regressions] == [PLANNING]


def test_other_sizes_are_another_case(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"spgen": Entry(1.0)}
    found = compare(result(row("a", own), row("b", own)), result(row("a", own, length=128), row("c", own)))
    assert found.changes == []
    assert (found.gone, found.new) == (["a", "b"], ["a", "c"])
    show(found)
    shown = capsys.readouterr().out
    assert "new, or of other sizes: c" in shown
    assert "cases of the old result that the new one lacks: 2" in shown


def test_other_versions_are_noted() -> None:
    old, new = result(), result(versions={"torch": "3"}, settings={"quick": True, "rounds": 3, "reading_ms": 80})
    assert compare(old, new).notes == ["torch: 2 before, 3 now", "quick: False before, True now"]


def test_other_hardware_and_suites_are_refused() -> None:
    old = result()
    check("old.json", old, "attention", {**HARDWARE, "driver": "2"})  # a driver is no other machine
    with pytest.raises(SpgenError, match=r"(?s)--compare old.json: .*suite attention.*suite cpu.*--compare-anyway"):
        check("old.json", old, "cpu", HARDWARE)
    with pytest.raises(SpgenError, match=r"(?s)a result of a GPU \(name a GPU\).*one of B200 \(name B200\)"):
        check("old.json", old, "attention", {**HARDWARE, "name": "B200"})
    with pytest.raises(SpgenError, match=r"multiprocessors 132"):
        check("old.json", old, "attention", {**HARDWARE, "multiprocessors": 114})
