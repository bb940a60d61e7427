"""Descriptions of processors, one small JSON file each; a GPU's is named like it (`h200.json`).

`gpu.json` holds the limits of GPU architectures, `cpu.json` vector extensions and the CPUs that kernels are compiled
for. Files are read when they are asked for, once. Peaks are the arithmetic limit of the data sheet (dense, no
structured sparsity), in FLOP/s; bandwidths in bytes/s. A number that is not known is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from spgen.errors import DeviceError

Description = Mapping[str, Any]

_FOLDER = Path(__file__).parent
_TABLES = ("cpu", "gpu")
# the fields of a description: what they hold, and whether it cannot do without them
_GPU = {
    "name": ("text", True), "arch": ("text", True), "multiprocessors": ("count", True), "bandwidth": ("number", True),
    "l2_bytes": ("count", False), "peaks": ("numbers", True), "limits": ("numbers", False),
    "model": ("numbers", False), "dense": ("numbers", False), "break_even": ("numbers", False),
}  # fmt: skip
_CPU = {
    "name": ("text", True), "kind": ("text", True), "isa": ("text", True), "triple": ("text", False),
    "cores": ("count", False), "bandwidth": ("number", False), "l1_bytes": ("count", False),
    "l2_bytes": ("count", False), "peaks": ("numbers", False), "model": ("numbers", False),
}  # fmt: skip
LIMITS = ("warp_size", "registers", "smem_bytes", "smem_total", "max_warps", "max_programs")


def names() -> tuple[str, ...]:
    """The GPUs that are described here."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json") if path.stem not in _TABLES))


@lru_cache(maxsize=64)
def table(name: str) -> Mapping[str, Any]:
    """`gpu`: the limits of each architecture. `cpu`: `isas`, `archs`, and what common servers move."""
    found: Mapping[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def slug(name: str) -> str:
    """A processor's name as that of a file."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@lru_cache(maxsize=64)
def named(name: str) -> Description | None:
    """The description of the GPU called `name`, which may be within a longer name (`NVIDIA H200`): the longest one."""
    inside = f"-{slug(name)}-"
    found = max((known for known in names() if f"-{known}-" in inside), key=len, default=None)
    return shipped(found) if found else None


def shipped(name: str) -> Description:
    """The description of one of `names()`."""
    return load(_FOLDER / f"{name}.json")


@lru_cache(maxsize=64)
def load(path: Path) -> Description:
    """The description in a file. Raises DeviceError for one that is none, naming the file and the field."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise _wrong(path, fault.strerror or "no file", "a file that can be read") from fault
    except ValueError as fault:
        raise _wrong(path, f"no JSON ({fault})", "a description as those in spgen/targets") from fault
    if not isinstance(found, dict):
        raise _wrong(path, type(found).__name__, "an object, as those in spgen/targets")
    _check(path, found)
    return found


def _check(path: Path, found: Description) -> None:
    is_cpu = found.get("kind") == "cpu"
    known = _CPU if is_cpu else _GPU
    for field, (holds, needed) in known.items():
        if field not in found:
            if needed:
                raise _wrong(f"{path}: {field}", "nothing", _ALLOWED[holds])
        elif not _holds(found[field], holds):
            raise _wrong(f"{path}: {field}", found[field], _ALLOWED[holds])
    for field in sorted(found.keys() - known.keys()):
        raise _wrong(f"{path}: {field}", found[field], f"no other fields than {', '.join(known)}")
    if is_cpu:
        if found["isa"] not in table("cpu")["isas"]:
            raise _wrong(f"{path}: isa", found["isa"], ", ".join(table("cpu")["isas"]))
    elif found["arch"] not in table("gpu"):
        _check_limits(path, found)


def _check_limits(path: Path, found: Description) -> None:
    """An architecture that is not listed brings its limits."""
    if not found["arch"].startswith(("sm_", "gfx")):
        raise _wrong(f"{path}: arch", found["arch"], f"sm_… or gfx…, as {', '.join(table('gpu'))}")
    for field in LIMITS:
        if field not in found.get("limits", {}):
            raise _wrong(f"{path}: limits: {field}", "nothing", f"a number, since {found['arch']} is not listed")


_ALLOWED = {
    "text": "a text", "count": "an integer of at least 0", "number": "a number of at least 0",
    "numbers": "an object whose values are numbers",
}  # fmt: skip


def _holds(value: Any, what: str) -> bool:
    if what == "text":
        return isinstance(value, str) and bool(value)
    if what == "numbers":
        return isinstance(value, dict) and all(_is_number(one) for one in value.values())
    return _is_number(value) and value >= 0 and (what == "number" or isinstance(value, int))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(subject: object, given: object, allowed: str) -> DeviceError:
    return DeviceError(str(subject), given=given, allowed=allowed)
