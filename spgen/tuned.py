"""Which configuration a call's kernel gets: that of the record with the nearest sizes, else a default for its sizes.

Records come from `spgen autotune`: the user's own (SPGEN_RECORDS), and those that are shipped for common machines. Only
shapes decide, so nothing is read from a device, and calls of the same shapes always get the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from spgen.compile import Request, default_config, is_packed, level_1
from spgen.ir.config import Config
from spgen.ir.kernel import FLOAT8
from spgen.ir.pattern import read_short, slots
from spgen.passes.schedule import Call
from spgen.passes.structure import structure, width
from spgen.settings import cache_home, logger, settings
from spgen.target import Target

if TYPE_CHECKING:
    from spgen.autotune.records import Bucket, Device, Key, Record, Records

T = TypeVar("T")

_MOST_POWERS = 48
_MOST_SPLITS = 64
_KEYS_OF_SPLIT = 512  # fewer are not worth adding up


@dataclass(frozen=True)
class Sizes:
    """What a call's shapes say: sequences, rows and keys of one (the mean of a packed batch), shapes of the data."""

    batch: int
    rows: int
    keys: int
    shapes: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True)
class Choice:
    """Where a configuration comes from: a record in a file, or (None) the default; `stale` were passed over.

    `other_form`: there are records of the call, but the default that they were compared with had another form.
    """

    record: Record | None = None
    path: Path | None = None
    stale: int = 0
    other_form: bool = False

    def __str__(self) -> str:
        passed = f"; {self.stale} of another compiler passed over" if self.stale else ""
        if self.record is None:
            why = "records of another form passed over" if self.other_form else "nothing was measured for such a call"
            return f"default: {why}{passed}"
        assert self.path is not None
        own = self.record
        sizes = f"{own.bucket.rows} rows x {own.bucket.keys} keys x {own.bucket.heads} heads"
        return (
            f"record {own.name or own.key.structure} of {self.path.name}: {sizes}, {own.gain:.2f} x the default there, "
            f"{len(own.trials)} configurations tried ({own.effort}){passed}"
        )


def request_for(pattern: str, call: Call, q_heads: int, kv_heads: int, target: Target, sizes: Sizes) -> Request:
    """What the kernel of a call is specialised for, its configuration included."""
    request = Request(pattern, call, q_heads, kv_heads, False, target)
    usual = default_config(request)
    if call.dtype != FLOAT8:  # whose kernels know no packed heads
        request = replace(request, packed=is_packed(pattern, q_heads, kv_heads, sizes.rows, usual.block_m))
    config = config_of(request, sizes)
    return request if config == usual else replace(request, config=config)


def config_of(request: Request, sizes: Sizes) -> Config:
    """What is known to be fast for such a call, or should be. Plans and calls agree on its tiles."""
    record = choice(request, sizes).record
    return default_of(request, sizes) if record is None else record.config


def default_of(request: Request, sizes: Sizes, *, plain: bool = False) -> Config:
    """The configuration of a call for which there is no record: short row tiles, and split keys, where rows are few.

    Where the row tiles would leave more than half of a GPU's multiprocessors empty, as many splits as fit share the
    keys: a program for each multiprocessor draws all of the memory's bandwidth (docs/notes/gpu-attention.md).
    `plain`: of the form that serves every kernel.
    """
    config = default_config(request, sizes.rows, plain=plain)
    splits = 1 if request.target.kind == "cpu" or request.call.dtype == FLOAT8 else _splits(request, sizes, config)
    if splits > 1 and config.option("warpgroups"):  # that form splits no keys
        return default_of(request, sizes, plain=True)
    return config if splits == 1 else config.having(splits=splits)


def _splits(request: Request, sizes: Sizes, config: Config) -> int:
    """A power of two; sizes are only compared."""
    group = request.q_heads // request.kv_heads if request.packed else 1
    height = config.block_m // group
    programs = sizes.batch * (request.q_heads // group) * ((max(sizes.rows, 1) + height - 1) // height)
    splits = 1
    while 2 * splits <= _MOST_SPLITS and 2 * splits * programs <= request.target.cores:
        splits *= 2
    keys = sizes.keys if splits == 1 else _width(request, sizes) or sizes.keys
    while splits > 1 and splits * _KEYS_OF_SPLIT > keys:
        splits //= 2
    return splits


def choice(request: Request, sizes: Sizes) -> Choice:
    """The record that a request's configuration comes from."""
    if not settings().records:
        return Choice()
    wanted = key_of(request)
    # sizes are looked at only where they matter: under torch.compile they may be symbols, which would become numbers
    known = _candidates(request.target, wanted)
    if not known:
        return Choice()
    bucket, compiler, default = bucket_of(request, sizes), toolchain(request.target), default_of(request, sizes)
    group = request.q_heads // request.kv_heads if request.packed else 1

    def of_call(record: Record) -> bool:
        """Keys say neither how large a group is nor how float32 is multiplied."""
        return record.default.option("tf32x3") == default.option("tf32x3") and record.config.block_m >= group

    def of_form(record: Record) -> bool:
        return is_of_form(record, default)

    found = _nearest(known, wanted, bucket, compiler, lambda record: of_call(record) and of_form(record))
    if found.record is not None:
        return found
    others = _nearest(known, wanted, bucket, compiler, lambda record: of_call(record) and not of_form(record))
    return replace(found, other_form=others.record is not None)


def record_of(target: Target, key: Key, bucket: Bucket, default: Config) -> Choice:
    """The record of a kind of kernels with the nearest sizes, of those that were compared with the call's `default`."""
    known = _candidates(target, key) if settings().records else ()
    compiler = toolchain(target) if known else ""
    return _nearest(known, key, bucket, compiler, lambda record: record.default == default) if known else Choice()


def is_of_form(record: Record, default: Config) -> bool:
    """Whether a record knows today's default: one that was made when the default had another form does not."""
    return record.default.option("warpgroups") == default.option("warpgroups")


def _nearest(
    known: Sequence[tuple[Path, Records]], key: Key, bucket: Bucket, toolchain: str, suits: Callable[[Record], bool]
) -> Choice:
    """Of files that are as good the first one's: the user's come before the shipped."""
    best, stale = Choice(), 0
    for path, records in known:
        record, passed = records.nearest(key, bucket, toolchain, suits)
        stale += passed
        if record is None:
            continue
        if best.record is None or record.bucket.distance(bucket) < best.record.bucket.distance(bucket):
            best = Choice(record, path)
    return replace(best, stale=stale)


def key_of(request: Request) -> Key:
    """The kind of a request's kernel. What a plan does not know is not part of it: a plan and its call must agree."""
    from spgen.autotune.records import Key

    call = request.call
    return Key(
        _structure(request.pattern), call.dtype, call.head_dim, call.value_dim, request.packed
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _structure(pattern: str) -> str:
    return structure(level_1(read_short(pattern)))


def bucket_of(request: Request, sizes: Sizes) -> Bucket:
    """The sizes of a call as powers of two."""
    from spgen.autotune.records import Bucket

    listed = _width(request, sizes)
    heads = _power(sizes.batch * request.q_heads)
    return Bucket(_power(sizes.rows), _power(sizes.keys), heads, listed and _power(listed))


def _width(request: Request, sizes: Sizes) -> int:
    """About how many keys a row has; 0 where data decide."""
    node = read_short(request.pattern)
    shapes = {
        slot.index: [_power(size) for size in shape] for slot, shape in zip(slots(node), sizes.shapes, strict=False)
    }
    return 0 if len(shapes) < len(slots(node)) else width(level_1(node), _power(sizes.keys), shapes)


def _power(size: int) -> int:
    """The power of two nearest to a size, in ratio; only compared, so a symbol stays one."""
    for n in range(_MOST_POWERS):
        if 5 * size < 7 * 2**n:
            return 1 << n
    return 1 << _MOST_POWERS


def toolchain(target: Target) -> str:
    """The compiler whose kernels were measured: others may make them faster or slower."""
    package = "apache-tvm" if target.kind == "cpu" else "triton"
    return f"{package} {'.'.join(_version(package).split('.')[:2])}"


@lru_cache(maxsize=4)
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def device_of(target: Target) -> Device:
    """Whose records a target's are: a GPU's by its name, a CPU's by its vector extension."""
    from spgen.autotune.records import Device

    if target.kind == "cpu":
        return Device("cpu", target.isa or target.arch, target.triple or target.arch)
    return Device(target.kind, target.name, target.arch)


def user_records() -> Path:
    """The directory of the user's own records."""
    given = settings().records
    return given if isinstance(given, Path) else cache_home() / "spgen" / "records"


def records_of(target: Target) -> list[Records]:
    """All known records of a target, the user's first; those of its architecture if there are none of its name."""
    return [records for _, records in _known(target, lambda records: True)] if settings().records else []


def _candidates(target: Target, key: Key) -> tuple[tuple[Path, Records], ...]:
    """Files with records of the kind."""
    return _known(target, lambda records: any(record.key == key for record in records))


def _known(target: Target, wanted: Callable[[Records], bool]) -> tuple[tuple[Path, Records], ...]:
    """Files of this device, else those of its architecture, as far as they are wanted; the user's first."""
    device, heads = device_of(target), _devices(user_records())
    for agrees in (is_same, _is_like):
        loaded = ((path, _loaded(path)) for path, theirs in heads if agrees(theirs, device))
        found = tuple((path, records) for path, records in loaded if records is not None and wanted(records))
        if found:
            return found
    return ()


def is_same(one: Device, other: Device) -> bool:
    """Names may carry the maker's before them, as NVIDIA H200."""
    ends = one.name.endswith(other.name) or other.name.endswith(one.name)
    return one.kind == other.kind and one.arch == other.arch and ends


def _is_like(one: Device, other: Device) -> bool:
    return one.kind == other.kind and one.arch == other.arch and one.kind != "cpu"


@lru_cache(maxsize=8)
def _devices(directory: Path) -> tuple[tuple[Path, Device], ...]:
    """The record files of a directory and the shipped ones, and whose they are; what cannot be read is left out."""
    from spgen.autotune.records import SHIPPED, Records, files

    found = ((path, _read(Records.device_in, path)) for path in files([directory, SHIPPED]))
    return tuple((path, device) for path, device in found if device is not None)


@lru_cache(maxsize=64)
def _loaded(path: Path) -> Records | None:
    """A file's records, None with a warning where it cannot be read."""
    from spgen.autotune.records import Records

    return _read(Records.load, path)


def _read(reader: Callable[[Path], T], path: Path) -> T | None:
    from spgen.errors import RecordError

    try:
        return reader(path)
    except RecordError as fault:
        logger().warning("%s", fault)
        return None


def forget() -> None:
    """Read the record files again at the next call; kernels that are already chosen stay.

    Tuning does not do so: a plan that was made before would have other tiles than calls that are prepared after it.
    """
    _devices.cache_clear()
    _loaded.cache_clear()
