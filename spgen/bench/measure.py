"""How times are taken: interleaved, so that a machine that slows down slows all contenders alike; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Call: TypeAlias = Callable[[], Any]
Timer: TypeAlias = Callable[[Call], float]


def wall(call: Call) -> float:
    """Seconds of one call, by the clock on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def on_gpu(milliseconds: int = 100) -> Timer:
    """A timer for kernels: the median over calls that fill `milliseconds`, the L2 cache emptied before each."""
    from triton.testing import do_bench

    def timer(call: Call) -> float:
        return float(do_bench(call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")) / 1e3

    return timer


def interleaved(calls: Mapping[str, Call], *, rounds: int, timer: Timer = wall, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each call over `rounds`; every round takes each call once, in changing order."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            taken[name].append(timer(calls[name]))
        order = order[1:] + order[:1]
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def per_call(
    calls: Mapping[str, Call], *, repeats: int = 500, rounds: int = 15, settle: Call | None = None
) -> dict[str, float]:
    """Median host seconds of one call of each, measured over `repeats` calls in a row.

    `settle` waits for the device between measurements; the calls themselves should not wait.
    """

    def repeated(call: Call) -> Call:
        def run() -> None:
            for _ in range(repeats):
                call()

        return run

    def timer(call: Call) -> float:
        if settle is not None:
            settle()
        return wall(call) / repeats

    return interleaved({name: repeated(call) for name, call in calls.items()}, rounds=rounds, timer=timer)
