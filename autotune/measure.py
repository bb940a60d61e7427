"""How times are taken: interleaved, so that a machine that slows down slows all contenders alike.

Medians; on a CPU that others use at the same time the fastest reading, since what they take only adds to it (Chen and
Revels, Robust benchmarking in noisy environments, 2016).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Call: TypeAlias = Callable[[], Any]
Timer: TypeAlias = Callable[[Call], float]

# So many L2 caches are read between two calls: what is written may be on its way to memory during a call.
_FLUSHED = 4
# That takes longer than the host to launch what follows, or is repeated: a device that waits would time the host.
_AHEAD, _MOST_FLUSHES = 1.5, 16
_FEW = 5  # readings, whose quartiles say little
_MOST = 300  # calls behind one reading


@dataclass(frozen=True)
class Sample:
    """Readings of one call: their median in seconds, and the noise as a share of it.

    The noise is half the distance of the quartiles; of fewer than five readings, of the extremes.
    """

    seconds: float
    noise: float
    count: int

    @staticmethod
    def of(readings: Sequence[float]) -> Sample:
        """Median and noise of seconds; noise 0 of a single reading."""
        middle = statistics.median(readings)
        if len(readings) < 2 or not middle:
            return Sample(middle, 0.0, len(readings))
        if len(readings) < _FEW:
            low, high = min(readings), max(readings)
        else:
            low, _, high = statistics.quantiles(readings, n=4, method="inclusive")
        return Sample(middle, (high - low) / 2 / middle, len(readings))

    @staticmethod
    def fastest(readings: Sequence[float]) -> Sample:
        """The fastest reading; the noise is by how much the lower quartile lies above it, 0 of a single reading."""
        least = min(readings)
        if len(readings) < 2 or not least:
            return Sample(least, 0.0, len(readings))
        quartile = statistics.quantiles(readings, n=4, method="inclusive")[0]
        return Sample(least, (quartile - least) / least, len(readings))


Summary: TypeAlias = Callable[[Sequence[float]], Sample]


def wall(call: Call) -> float:
    """Seconds of one call, by the clock on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def on_cpu(milliseconds: int = 20) -> Timer:
    """A timer for calls that block: the fastest of the calls that fill `milliseconds`."""

    def timer(call: Call) -> float:
        taken = [wall(call)]
        while sum(taken) < milliseconds / 1e3 and len(taken) < _MOST:
            taken.append(wall(call))
        return min(taken)

    return timer


def on_gpu(milliseconds: int = 100, device: int | None = None, *, fewest: int = 3) -> Timer:
    """A timer for kernels: the median over calls that fill `milliseconds`, the L2 cache emptied before each.

    A reading has at least `fewest` calls, which tell how many fill the time; those that fill it alone are the reading.
    """
    import torch

    def timer(call: Call) -> float:
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
            flushed = torch.zeros(_flush_bytes(index) // 4, device=f"cuda:{index}")
            first, flush, host = _events(call, flushed, fewest)
            estimate = statistics.median(first)
            count = min(max(fewest, int(milliseconds / 1e3 / max(estimate, 1e-6))), _MOST)
            if count == fewest:
                return estimate
            flushes = min(max(math.ceil(_AHEAD * host / max(flush, 1e-6)), 1), _MOST_FLUSHES)
            return statistics.median(_events(call, flushed, count, flushes)[0])

    return timer


def _flush_bytes(index: int) -> int:
    import torch

    found = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0)
    return _FLUSHED * int(found or 64 << 20)


def _events(call: Call, flushed: Any, count: int, flushes: int = 1) -> tuple[list[float], float, float]:
    """Seconds of each of `count` calls on the device, the L2 cache emptied before each by so many `flushes`.

    Then the fastest flush, and what the host took to launch a call and a flush.
    """
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(count)]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for before, start, end in events:
        before.record()
        for _ in range(flushes):
            flushed.amax()
        start.record()
        call()
        end.record()
    host = (time.perf_counter() - begun) / count
    torch.cuda.synchronize()
    taken = [start.elapsed_time(end) / 1e3 for _, start, end in events]
    return taken, min(before.elapsed_time(start) for before, start, _ in events) / 1e3, host


def samples(
    calls: Mapping[str, Call], *, rounds: int, timer: Timer = wall, warm_up: int = 1, summary: Summary = Sample.of
) -> dict[str, Sample]:
    """Readings of each call over `rounds`, summed up; every round takes each call once, in changing order."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            taken[name].append(timer(calls[name]))
        order = order[1:] + order[:1]
    return {name: summary(readings) for name, readings in taken.items()}


def interleaved(calls: Mapping[str, Call], *, rounds: int, timer: Timer = wall, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each call over `rounds`, as `samples` takes them."""
    found = samples(calls, rounds=rounds, timer=timer, warm_up=warm_up)
    return {name: sample.seconds for name, sample in found.items()}


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
