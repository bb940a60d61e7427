"""Records of what was measured: which configuration won where, as JSON files that a person can read and merge.

A record is found by the kind of its kernel (`Key`) and the nearest sizes (`Bucket`). It holds every configuration that
was tried, so that a tuning goes on where it was interrupted and predictions can be held against it.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from spgen.autotune.work import Resources
from spgen.errors import RecordError, SpgenError
from spgen.ir.config import Config

if TYPE_CHECKING:
    from spgen.autotune.measure import Sample


SCHEMA = 1
SHIPPED = Path(__file__).parent / "records"
EFFORTS = ("quick", "standard", "thorough")
# How far sizes may be apart, in weighted powers of two, before the default is the better guess
_FARTHEST = 4.0
_WEIGHTS = {"rows": 0.5, "keys": 0.5, "heads": 0.5, "width": 1.0}


@dataclass(frozen=True)
class Key:
    """The kind of a kernel: what must agree. `packed`: the heads of a group share row tiles."""

    structure: str
    dtype: str
    head_dim: int
    value_dim: int
    packed: bool = False
    operation: str = "attention"


@dataclass(frozen=True)
class Bucket:
    """Sizes of a call: rows and keys of a sequence, batch times query heads, and keys that a row has (0: unknown)."""

    rows: int
    keys: int
    heads: int
    width: int = 0

    def distance(self, other: Bucket) -> float:
        """Weighted powers of two between the sizes; an unknown width is a power of two from any other."""
        total = 0.0
        for name, weight in _WEIGHTS.items():
            a, b = getattr(self, name), getattr(other, name)
            total += weight * (abs(math.log2(a / b)) if a and b else float(a != b))
        return total


Identity: TypeAlias = "tuple[Key, Bucket, str]"


@dataclass(frozen=True)
class Trial:
    """One configuration's measurement, and what its kernel takes; `fault` says why there is none."""

    seconds: float = math.inf
    noise: float = 0.0
    fault: str = ""
    resources: Resources | None = None

    @staticmethod
    def of(sample: Sample, resources: Resources | None = None) -> Trial:
        """A trial that went well."""
        return Trial(sample.seconds, sample.noise, "", resources)

    def to_json(self) -> str | list[float]:
        """Microseconds, noise, and registers, shared memory and spilled bytes where they are known; or the fault."""
        taken = astuple(self.resources) if self.resources is not None else ()
        return self.fault or [float(f"{self.seconds * 1e6:.5g}"), round(self.noise, 4), *taken]

    @staticmethod
    def from_json(plain: str | list[float]) -> Trial:
        """The trial of `to_json`'s values."""
        if isinstance(plain, str):
            return Trial(fault=plain)
        seconds, noise, *taken = plain
        return Trial(seconds / 1e6, noise, "", Resources(*map(int, taken)) if taken else None)


class _Trials(Mapping[Config, Trial]):
    """Trials as a file holds them, read when they are asked for: a call needs the winner alone."""

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self._plain = dict(plain)

    @cached_property
    def _read(self) -> dict[Config, Trial]:
        return {Config.read(text): Trial.from_json(found) for text, found in self._plain.items()}

    def __getitem__(self, config: Config) -> Trial:
        return self._read[config]

    def __iter__(self) -> Iterator[Config]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._plain)


@dataclass(frozen=True)
class Record:
    """One tuned call. `effort` is empty until the tuning is finished; `facts` is what the cost model was told."""

    key: Key
    bucket: Bucket
    name: str
    default: Config
    config: Config
    toolchain: str
    effort: str = ""
    when: str = ""
    gain: float = 1.0  # time of the default over that of the winner, measured in turns
    trials: Mapping[Config, Trial] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    case: Mapping[str, Any] = field(default_factory=dict)  # the workload's case, as it was given

    @property
    def identity(self) -> Identity:
        """Of two records of the same call one is kept."""
        return self.key, self.bucket, self.name

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        trials = {str(config): trial.to_json() for config, trial in self.trials.items()}
        return plain | {
            "key": asdict(self.key), "bucket": asdict(self.bucket), "default": str(self.default),
            "config": str(self.config), "gain": round(self.gain, 4), "trials": trials, "facts": dict(self.facts),
            "case": dict(self.case),
        }  # fmt: skip

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Record:
        """The record of `to_json`'s values."""
        if plain["effort"] not in ("", *EFFORTS):
            raise ValueError(f"effort {plain['effort']!r}")
        return Record(**{
            **plain, "key": Key(**plain["key"]), "bucket": Bucket(**plain["bucket"]),
            "trials": _Trials(plain["trials"]),
            "default": Config.read(plain["default"]), "config": Config.read(plain["config"]),
        })  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Whose records these are: a kind of machine, its name, and the architecture whose kernels it runs."""

    kind: str
    name: str
    arch: str

    @property
    def slug(self) -> str:
        """The file's name, without its ending."""
        return "-".join("".join(c if c.isalnum() else " " for c in f"{self.name} {self.arch}".lower()).split())


@dataclass
class Records:
    """The records of one device."""

    device: Device
    found: dict[Identity, Record] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.found.values())

    def __len__(self) -> int:
        return len(self.found)

    def add(self, record: Record) -> None:
        """Keep `record` in the place of an older one of the same call."""
        self.found[record.identity] = record

    def merge(self, others: Iterable[Record]) -> int:
        """Take over what is new, finished with more effort, or as good and later; returns how many were taken."""
        taken = 0
        for other in others:
            own = self.found.get(other.identity)
            if own is None or _rank(other) > _rank(own):
                self.add(other)
                taken += 1
        return taken

    @staticmethod
    def load(path: Path) -> Records:
        """Read a file. Raises RecordError for one that holds no records, naming it."""
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["schema"] != SCHEMA:
                raise RecordError(str(path), given=f"schema {plain['schema']}", allowed=f"schema {SCHEMA}")
            records = Records(Device(**plain["device"]))
            for one in plain["records"]:
                records.add(Record.from_json(one))
        except OSError as fault:
            raise RecordError(str(path), given=fault.strerror or "no file", allowed="a readable file") from fault
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, SpgenError) as fault:
            if isinstance(fault, RecordError):
                raise
            raise RecordError(
                str(path), given=f"{type(fault).__name__}: {fault}", allowed="a file that `spgen autotune` wrote",
                remedy="delete it, or restore a copy",
            ) from fault  # fmt: skip
        return records

    @staticmethod
    def device_in(path: Path) -> Device:
        """Whose records a file holds, by its first line if it is as `save` writes it. Raises RecordError as `load`."""
        try:
            with path.open(encoding="utf-8") as file:
                plain = json.loads(file.readline().rstrip() + "]}")
            return Device(**plain["device"])
        except (OSError, KeyError, TypeError, ValueError):
            return Records.load(path).device

    def save(self, path: Path) -> None:
        """Write the file in one step. Raises RecordError where that is not possible."""
        records = sorted(self, key=lambda record: (record.name, str(record.identity)))
        lines = ",\n".join(json.dumps(record.to_json(), ensure_ascii=False) for record in records)
        head = json.dumps({"schema": SCHEMA, "device": asdict(self.device)}, ensure_ascii=False)
        text = f'{head[:-1]}, "records": [\n{lines}\n]}}\n'
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as fault:
            raise _not_writable(path, fault) from fault

    def update(self, path: Path, *own: Record) -> None:
        """Add records and save, together with what other processes have saved to the file meanwhile.

        They take turns. Of the calls of `own` these records are kept, of others as `merge` does. Raises RecordError
        where the file, or the lock beside it, cannot be written.
        """
        with _locked(path):
            for record in own:
                self.add(record)
            if path.exists():
                mine = {record.identity for record in own}
                self.merge(other for other in Records.load(path) if other.identity not in mine)
            self.save(path)

    def nearest(
        self, key: Key, bucket: Bucket, toolchain: str, suits: Callable[[Record], bool] = lambda record: True
    ) -> tuple[Record | None, int]:  # fmt: skip
        """The finished record with the nearest sizes, and how many were passed over: other compilers made them.

        Records that do not suit the call are none of its kind.
        """
        stale, best, least = 0, None, _FARTHEST
        for record in self:
            if record.key != key or not record.effort or not suits(record):
                continue
            distance = record.bucket.distance(bucket)
            if distance > least:
                continue
            if record.toolchain != toolchain:
                stale += 1
                continue
            best, least = record, distance
        return best, stale


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While one process at a time holds the lock beside a file."""
    import filelock

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as fault:  # the latter of a file system without locks
        raise _not_writable(path, fault) from fault
    try:
        yield
    finally:
        lock.release()


def _not_writable(path: Path, fault: Exception) -> RecordError:
    return RecordError(
        str(path), given=getattr(fault, "strerror", None) or "not writable", allowed="a file that can be written",
        remedy="choose another with --records or SPGEN_RECORDS",
    )  # fmt: skip


def _rank(record: Record) -> tuple[int, str]:
    return (EFFORTS.index(record.effort) if record.effort in EFFORTS else -1), record.when


def files(directories: Sequence[Path]) -> list[Path]:
    """The record files of some directories, in their order."""
    return [path for directory in directories if directory.is_dir() for path in sorted(directory.glob("*.json"))]
