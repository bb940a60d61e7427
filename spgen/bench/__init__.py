"""Benchmarks: ours, the peers, dense and the floor, side by side in one run, each checked against the oracle.

`spgen bench` runs them, and so does `run`, which needs neither typer nor rich; docs/bench/*.json are the results that
the README shows, and docs/bench.md says what the figures mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spgen.bench.result import Result, read, write
    from spgen.bench.runner import run

__all__ = ["Result", "read", "run", "write"]

_HOMES = {"run": "runner", "Result": "result", "read": "result", "write": "result"}


def __getattr__(name: str) -> object:
    """Import what is asked for, so that reading a result needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
