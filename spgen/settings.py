"""The only place where environment variables are read.

| variable | meaning | default |
|---|---|---|
| `SPGEN_CACHE_DIR` | where compiled kernels are kept | the user's cache directory |
| `SPGEN_BACKEND` | `auto`, `tvm` or `triton` | `auto`: by the tensors' device |
| `SPGEN_NO_COMPILE` | `1` forbids compiling: a kernel that is not in the cache is an error | `0` |
| `SPGEN_FLOAT32` | float32 on GPUs: `tf32x3` (three tensor-core products, float32's accuracy) or `ieee` | `tf32x3` |
| `SPGEN_RECORDS` | where the user's tuning records are; `off`: none, not even the shipped | `~/.cache/spgen/records` |
| `SPGEN_LOG` | `debug`, `info`, `warning`, `error` or `off` | `warning` |

Of variables that belong to others, `XDG_CACHE_HOME`, `CC` and `TRITON_INTERPRET` are honoured.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from spgen.errors import SpgenError

BACKENDS = ("auto", "tvm", "triton")
FLOAT32 = ("tf32x3", "ieee")
LOG_LEVELS = ("debug", "info", "warning", "error", "off")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, read once; see the table at the head of this file."""

    cache_dir: Path | None = None
    backend: str = "auto"
    no_compile: bool = False
    float32: str = "tf32x3"
    records: Path | bool = True  # a directory; True: the usual one; False: none, not even the shipped ones
    log: str = "warning"


_current: Settings | None = None


def settings() -> Settings:
    """The settings in force; the environment is read at the first call only."""
    global _current
    if _current is None:
        _current = _from_environment()
    return _current


@contextmanager
def override(**changes: Any) -> Iterator[Settings]:
    """Change fields of the settings for the length of a `with` block (for the whole process, not one thread)."""
    global _current
    before = settings()
    _current = replace(before, **changes)
    try:
        yield _current
    finally:
        _current = before


@lru_cache(maxsize=1)
def logger() -> logging.Logger:
    """The logger `spgen`, at the level of `SPGEN_LOG`; what is more detailed than a warning goes to stderr."""
    log = logging.getLogger("spgen")
    level = settings().log
    log.setLevel(logging.CRITICAL + 1 if level == "off" else level.upper())
    # a program that configures logging itself sees the records through its own handlers
    if level in ("debug", "info") and not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("spgen %(levelname)s: %(message)s"))
        log.addHandler(handler)
    return log


def cache_home() -> Path:
    """Where this user's programs keep what they can make again: `XDG_CACHE_HOME`, else `~/.cache`."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if Path(chosen).is_absolute() else Path("~/.cache").expanduser()


def c_compiler() -> str | None:
    """The C compiler's path: `CC` if set (and found), else the first of cc, gcc and clang; None if there is none."""
    chosen = os.environ.get("CC", "")
    return next(filter(None, map(shutil.which, [chosen] if chosen else ["cc", "gcc", "clang"])), None)


def triton_interpreted() -> bool:
    """Whether Triton runs kernels in its Python interpreter (`TRITON_INTERPRET=1`), on the CPU and slowly.

    Read at each call: Triton decides when a kernel is decorated, and tests set the variable in between.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def _from_environment() -> Settings:
    directory = os.environ.get("SPGEN_CACHE_DIR", "")
    records = os.environ.get("SPGEN_RECORDS", "")
    return Settings(
        cache_dir=Path(directory).expanduser() if directory else None,
        backend=_choice("SPGEN_BACKEND", "auto", BACKENDS),
        no_compile=_switch("SPGEN_NO_COMPILE"),
        float32=_choice("SPGEN_FLOAT32", "tf32x3", FLOAT32),
        records=records.lower() != "off" if records.lower() in ("", "off") else Path(records).expanduser(),
        log=_choice("SPGEN_LOG", "warning", LOG_LEVELS),
    )


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").lower() or default
    if value not in allowed:
        raise SpgenError(name, given=repr(value), allowed=", ".join(allowed), remedy=f"unset {name} or correct it")
    return value


def _switch(name: str) -> bool:
    value = os.environ.get(name, "").lower()
    if value not in _TRUE + _FALSE:
        raise SpgenError(name, given=repr(value), allowed="0 or 1", remedy=f"unset {name} or correct it")
    return value in _TRUE
