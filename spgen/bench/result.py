"""What a run finds, and its JSON: a schema with a number, read strictly. docs/bench.md describes every field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from spgen.errors import SpgenError

SCHEMA = 1
OURS = "spgen"
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One contender in one case. Milliseconds; None for what was not measured.

    `ms` is the operation with its plan made before, `plan_ms` planning alone, `with_plan_ms` both in one timed region.
    Noise is half the distance of the quartiles over the median. `gflops` and `gb_s` count what the pattern needs, for
    every contender, over `ms` (over `with_plan_ms` where planning is inside every call). `of_floor` is the floor's time
    over the same time; `error` the largest difference to the oracle where `pairs` are the same.
    """

    ms: float | None
    noise: float | None = None
    plan_ms: float | None = None
    with_plan_ms: float | None = None
    with_plan_noise: float | None = None
    plan_mb: float | None = None
    gflops: float | None = None
    gb_s: float | None = None
    of_floor: float | None = None
    pairs: str = "same"
    error: float | None = None


@dataclass(frozen=True)
class Row:
    """One case: what it needs, what this machine can do at best (`floor_ms`), its contenders, and who was left out.

    `density` is the share of the causal pairs; `gflop` and `mbyte` are needed work; `peak_gflops` and `copy_gb_s` were
    measured in the same rounds.
    """

    case: str
    section: str
    pattern: str
    work: dict[str, Any]
    entries: dict[str, Entry]
    skipped: dict[str, str] = field(default_factory=dict)
    sparsity: float | None = None
    density: float | None = None
    gflop: float | None = None
    mbyte: float | None = None
    peak_gflops: float | None = None
    copy_gb_s: float | None = None
    floor_ms: float | None = None


@dataclass(frozen=True)
class Result:
    """One run of a suite. `launch` and `start` are what a call costs before its kernel runs (None: not measured)."""

    suite: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row]
    launch: dict[str, Any] | None = None
    start: dict[str, Any] | None = None

    @property
    def failures(self) -> dict[str, str]:
        """Cases in which our own contender failed or was wrong, and how."""
        return {row.case: row.skipped[OURS] for row in self.rows if OURS in row.skipped}


def write(result: Result, path: Path) -> None:
    """The result as a JSON file; raises SpgenError where it cannot be written."""
    text = json.dumps({"schema": SCHEMA, **asdict(result)}, indent=1, ensure_ascii=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as fault:
        raise unwritable(path, fault) from fault


def read(path: Path) -> Result:
    """The result in a file; raises SpgenError for a file that is none, or of another schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise SpgenError(str(path), given=fault.strerror or str(fault), allowed=_WANTED) from fault
    except ValueError as fault:
        raise SpgenError(str(path), given="a file that is no JSON", allowed=_WANTED) from fault
    if not isinstance(found, dict) or "schema" not in found:
        raise SpgenError(str(path), given="JSON without a schema number", allowed=_WANTED)
    if found.pop("schema") != SCHEMA:
        raise SpgenError(
            str(path), given="a result of another schema", allowed=f"schema {SCHEMA}",
            remedy="measure anew: spgen bench",
        )  # fmt: skip
    try:
        rows = [_row(row) for row in found.pop("rows")]
        return _made(Result, {**found, "rows": rows})
    except (TypeError, AttributeError, KeyError) as fault:
        raise SpgenError(str(path), given=f"a damaged result ({fault})", allowed=_WANTED) from fault


_WANTED = "a result that spgen bench --json wrote"


def _row(found: Mapping[str, Any]) -> Row:
    entries = {name: _made(Entry, entry) for name, entry in found["entries"].items()}
    return _made(Row, {**found, "entries": entries})


def _made(kind: type[T], found: Mapping[str, Any]) -> T:
    """A dataclass of exactly its fields."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if set(found) != known:
        wrong = sorted(set(found) ^ known)
        raise KeyError(f"{kind.__name__.lower()}: {', '.join(wrong)}")
    return kind(**found)


def check_writable(path: Path) -> None:
    """Raises SpgenError unless a file can be written there, which is tried; leaves nothing behind."""
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as fault:
        raise unwritable(path, fault) from fault


def unwritable(path: Path, fault: OSError) -> SpgenError:
    """The error for a file that cannot be written."""
    return SpgenError(
        str(path), given=fault.strerror or str(fault), allowed="a file that can be written",
        remedy="choose another place",
    )  # fmt: skip
