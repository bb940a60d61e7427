"""Benchmarks: ours, the peers, dense and the floor, side by side in one run, each checked against the oracle.

`spgen bench` runs them; docs/bench/*.json are the results that the README shows.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

SUITES = ("cpu-attention", "gpu-attention", "gpu-patterns")


def run(suite: str | None = None, quick: bool = False) -> dict[str, Any]:
    """One suite's result, a JSON value; by default the suite of the GPU if there is one, else of the CPU."""
    if suite is None:
        import torch

        suite = SUITES[torch.cuda.is_available()]
    return cast("dict[str, Any]", import_module(f"spgen.bench.{suite.replace('-', '_')}").run(quick))
