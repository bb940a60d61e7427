"""Two results of the same suite on the same hardware: what became faster, what slower, and what is noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from spgen.bench.result import OURS, Entry, Result, Row
from spgen.errors import SpgenError

_LEAST = 0.02  # a change below this share is none, however quiet the machine
_NOISES = 3.0  # nor is one within so many times the combined noise
# what makes two machines the same; a driver may change
_SAME = ("name", "kind", "arch", "cores", "threads", "multiprocessors", "memory_gb")
PLANNED, PLANNING = "planned", "with plan"


@dataclass(frozen=True)
class Change:
    """One contender's time in one case, before and after; `noise` is both results' together, as a share.

    `measure` says whether the plan was made before (`planned`) or in the timed region (`with plan`).
    """

    case: str
    contender: str
    measure: str
    before_ms: float
    after_ms: float
    noise: float

    @property
    def speed_up(self) -> float:
        """How many times as fast it is now."""
        return self.before_ms / self.after_ms

    @property
    def threshold(self) -> float:
        """The share by which it must change to count."""
        return max(_LEAST, _NOISES * self.noise)

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `same`."""
        if self.before_ms > self.after_ms * (1 + self.threshold):
            return "faster"
        return "slower" if self.after_ms > self.before_ms * (1 + self.threshold) else "same"


@dataclass(frozen=True)
class Comparison:
    """All changes; `gone` and `new`: cases of the old or new result alone, or of other sizes; `notes`: what differs."""

    changes: list[Change]
    gone: list[str]
    new: list[str]
    notes: list[str]

    @property
    def regressions(self) -> list[Change]:
        """Where ours became slower."""
        return [change for change in self.changes if change.contender == OURS and change.verdict == "slower"]

    def speed_ups(self) -> dict[tuple[str, str], float]:
        """The geometric mean of the speed-ups of each contender and measure."""
        groups: dict[tuple[str, str], list[float]] = {}
        for change in self.changes:
            groups.setdefault((change.contender, change.measure), []).append(change.speed_up)
        return {key: _geometric_mean(values) for key, values in groups.items()}


def _geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def check(old_name: str, old: Result, suite: str, hardware: dict[str, object]) -> None:
    """Raises SpgenError, naming both, unless `old` is of this suite and hardware."""
    if old.suite != suite:
        raise SpgenError(
            f"--compare {old_name}", given=f"a result of suite {old.suite}",
            allowed=f"one of suite {suite}, as measured now", remedy=_REMEDY,
        )  # fmt: skip
    differing = [key for key in _SAME if old.hardware.get(key) != hardware.get(key)]
    if differing:
        given, wanted = (", ".join(f"{key} {of.get(key)}" for key in differing) for of in (old.hardware, hardware))
        raise SpgenError(
            f"--compare {old_name}", given=f"a result of {old.hardware.get('name')} ({given})",
            allowed=f"one of {hardware.get('name')} ({wanted})", remedy=_REMEDY,
        )  # fmt: skip


_REMEDY = "to see the figures side by side nevertheless: --compare-anyway"


def compare(old: Result, new: Result) -> Comparison:
    """Cases of the same name and sizes, contender by contender."""
    before, after = ({_key(row): row for row in result.rows} for result in (old, new))
    changes = [change for key, row in after.items() if key in before for change in _changes(before[key], row)]
    gone = [row.case for key, row in before.items() if key not in after]
    added = [row.case for key, row in after.items() if key not in before]
    return Comparison(changes, gone, added, list(_notes(old, new)))


def _key(row: Row) -> tuple[str, str]:
    return row.case, repr(sorted(row.work.items()))


def _changes(before: Row, after: Row) -> Iterable[Change]:
    for name, entry in after.entries.items():
        if name in before.entries:
            yield from _change(after.case, name, before.entries[name], entry)


def _change(case: str, name: str, before: Entry, after: Entry) -> Iterable[Change]:
    if before.ms and after.ms:
        yield Change(case, name, PLANNED, before.ms, after.ms, _together(before.noise, after.noise))
    nothing_to_plan = after.plan_ms == 0  # it would be the same line again
    if before.with_plan_ms and after.with_plan_ms and not nothing_to_plan:
        noise = _together(before.with_plan_noise, after.with_plan_noise)
        yield Change(case, name, PLANNING, before.with_plan_ms, after.with_plan_ms, noise)


def _together(one: float | None, other: float | None) -> float:
    """Of independent readings; one that is not known counts as none."""
    return math.hypot(one or 0.0, other or 0.0)


def _notes(old: Result, new: Result) -> Iterable[str]:
    """Versions and settings that differ."""
    for name in dict.fromkeys([*old.versions, *new.versions]):
        yield from _differing(name, old.versions.get(name, "none"), new.versions.get(name, "none"))
    for name in ("quick", "rounds", "reading_ms"):
        yield from _differing(name, old.settings.get(name), new.settings.get(name))


def _differing(name: str, before: object, now: object) -> Iterable[str]:
    if before != now:
        yield f"{name}: {before} before, {now} now"


def show(found: Comparison) -> None:
    """The comparison on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    head = ("case", "contender", "measure", "before", "now", "speed-up", "counts beyond", "verdict")
    console = Console(highlight=False)
    longest = max((len(change.case) for change in found.changes), default=0)
    console = Console(highlight=False, width=max(console.width, longest + 100))
    table = Table(title="compared with before", box=box.SIMPLE_HEAD)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
    colour = {"faster": "green", "slower": "red", "same": None}
    for change in found.changes:
        table.add_row(
            change.case, change.contender, change.measure, f"{change.before_ms:.4g} ms", f"{change.after_ms:.4g} ms",
            f"{change.speed_up:.3f}×", f"±{change.threshold:.1%}", change.verdict, style=colour[change.verdict],
        )  # fmt: skip
    console.print(table)
    for (contender, measure), mean in found.speed_ups().items():
        console.print(f"{contender}, {measure}: {mean:.3f}× in the geometric mean", markup=False)
    lines = [f"new, or of other sizes: {case}" for case in found.new] + found.notes
    lines += [f"cases of the old result that the new one lacks: {len(found.gone)}"] if found.gone else []
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    count = len(found.regressions)
    console.print(f"[red]{OURS} became slower {count} times[/]" if count else f"{OURS} became slower nowhere")
