"""Workloads: calls that are tuned together, named ones or those of a file.

A file holds `{"name": {"about": "…", "call": {…}, "cases": [{…}, …]}}`: `call` is what the cases have in common, and a
case says the rest. Fields are those of :class:`Case`, for attention, or of :class:`ProductCase`, which has `outputs`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from spgen.errors import WorkloadError

_SHIPPED = Path(__file__).parent / "workloads.json"


@dataclass(frozen=True)
class Case:
    """One call. Slots of the pattern's text are filled at random: `density` of them, in runs of `run` neighbours.

    `kv_heads`, `kv_len` and `value_dim` of 0 are those of the queries.
    """

    name: str
    pattern: str
    q_heads: int
    q_len: int
    head_dim: int
    batch: int = 1
    kv_heads: int = 0
    kv_len: int = 0
    value_dim: int = 0
    dtype: str = "bfloat16"
    density: float = 0.1
    run: int = 1

    def __post_init__(self) -> None:
        for name in ("kv_heads", "kv_len", "value_dim"):
            same = {"kv_heads": self.q_heads, "kv_len": self.q_len, "value_dim": self.head_dim}[name]
            object.__setattr__(self, name, getattr(self, name) or same)


@dataclass(frozen=True)
class ProductCase:
    """A product of `rows` rows of x with sparse weights, from `inputs` to `outputs` features.

    `pattern` selects from random weights: `block(64, density=0.1)`; `values` quantises them. `form` is "linear",
    "gated" (two weights at a time), or "transposed" (the gradient of x).
    """

    name: str
    pattern: str
    rows: int
    outputs: int
    inputs: int
    dtype: str = "bfloat16"
    values: str = ""
    form: str = "linear"


AnyCase: TypeAlias = "Case | ProductCase"
_TYPES = {"str": str, "int": int, "float": (int, float)}


def named() -> Mapping[str, str]:
    """The shipped workloads and what they are."""
    return {name: str(one["about"]) for name, one in _shipped().items()}


def load(name: str) -> list[AnyCase]:
    """The cases of a shipped workload, or of all workloads in a JSON file.

    Raises WorkloadError for an unknown name (it lists the known ones), and for a file that cannot be read, naming the
    case and the field.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        found = _read(path)
        return [case for workload, one in found.items() for case in _cases(f"{path}: {workload}", workload, one)]
    if name not in _shipped():
        near = difflib.get_close_matches(name, _shipped(), 1)
        raise WorkloadError(
            "workload", given=repr(name), allowed=", ".join(_shipped()) + ", or a JSON file",
            remedy=f"did you mean {near[0]}?" if near else "spgen autotune --list shows what they hold",
        )  # fmt: skip
    return _cases(name, name, _shipped()[name])


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    return _read(_SHIPPED)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise WorkloadError(str(path), given=fault.strerror or "no file", allowed="a readable file") from fault
    except ValueError as fault:
        raise WorkloadError(str(path), given=str(fault), allowed="JSON") from fault
    if not isinstance(found, dict):
        raise WorkloadError(str(path), given=type(found).__name__, allowed='{"name": {"cases": […]}}')
    return found


def _cases(subject: str, workload: str, one: Any) -> list[AnyCase]:
    if not isinstance(one, dict) or not isinstance(one.get("cases"), list) or not one["cases"]:
        raise WorkloadError(subject, given="no cases", allowed='{"call": {…}, "cases": [{…}]}')
    call = one.get("call", {})
    return [_case(f"{subject}: case {n}", workload, {**call, **each}) for n, each in enumerate(one["cases"])]


def _case(subject: str, workload: str, given: Mapping[str, Any]) -> AnyCase:
    made = ProductCase if "outputs" in given else Case
    known = {field.name: field for field in fields(made)}
    unknown = sorted(set(given) - set(known))
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    if unknown or missing:
        raise WorkloadError(
            subject, given=f"the unknown field {unknown[0]!r}" if unknown else f"no {missing[0]!r}",
            allowed=", ".join(known),
        )  # fmt: skip
    for name, value in given.items():
        kind = str(known[name].type)
        if not isinstance(value, _TYPES[kind]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise WorkloadError(f"{subject}: {name}", given=repr(value), allowed=kind)
        if kind != "str" and value <= 0:
            raise WorkloadError(f"{subject}: {name}", given=value, allowed="a number above 0")
    return made(**{**given, "name": f"{workload}: {given['name']}"})
