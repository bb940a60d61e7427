"""Measuring: a case's contenders take turns with each other and with the floor, and are held against the oracle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spgen.autotune.measure import Call, Sample, Timer, on_cpu, on_gpu, samples, wall
from spgen.bench.ceilings import Ceiling, ceilings
from spgen.bench.machine import hardware, versions
from spgen.bench.peers import SAME, AnyProblem, Contender, attempt, available, failure
from spgen.bench.peers import chosen as chosen_peers
from spgen.bench.result import OURS, Entry, Result, Row
from spgen.bench.start import first_calls, launches
from spgen.bench.suites import Case, Suite, find, selected

# The most that a right result may differ: outputs are averages of normal numbers
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_SLOW = 1.0  # seconds: what takes longer is read once, by the clock on the wall
_PLAN, _WITH_PLAN = " plan", " with plan"


@dataclass(frozen=True)
class Effort:
    """How long to measure: readings of each call, and milliseconds of a reading."""

    rounds: int
    milliseconds: int

    @staticmethod
    def of(device: str, quick: bool) -> Effort:
        """Enough for figures to quote, or to see that it works."""
        if device == "cpu":
            return Effort(3, 5) if quick else Effort(9, 10)
        return Effort(2, 20) if quick else Effort(5, 50)

    def timer(self, device: str) -> Timer:
        """By events on a GPU, the L2 cache emptied before each call; by the clock on a CPU, the fastest call."""
        return on_cpu(self.milliseconds) if device == "cpu" else on_gpu(self.milliseconds, fewest=1)


def run(
    suite: str | Suite | None = None,
    *,
    quick: bool = False,
    only: str = "",
    peers: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda case: None,
) -> Result:
    """Measure a suite (by default this machine's): its cases whose name contains `only`, beside `peers` (default: all).

    `progress` is told each case before it begins. An interruption (Ctrl-C) keeps the cases that are done. Raises
    SpgenError for an unknown suite, case or peer, DeviceError without the suite's device.
    """
    asked = suite if isinstance(suite, Suite) else find(suite)
    cases, effort = selected(asked, quick, only), Effort.of(asked.device, quick)
    chosen = asked.peers if peers is None else chosen_peers(",".join(peers) or "none", asked.peers)
    load = round(os.getloadavg()[0], 1)
    rows: list[Row] = []
    limits: dict[torch.dtype, dict[str, Ceiling]] = {}
    with torch.inference_mode():
        for case in cases:
            progress(case.name)
            limits = limits if case.work.dtype in limits else {case.work.dtype: ceilings(case.work)}
            try:
                rows.append(measure(case, chosen, effort, limits[case.work.dtype]))
            except KeyboardInterrupt:
                if not rows:
                    raise
                break
        left = len(cases) - len(rows)
        whole = not quick and not only and not left
        calls = (asked.device, cases[0].work.dtype)
        return Result(
            asked.name, hardware(asked.device), versions(),
            {"quick": quick, "only": only, "peers": list(chosen), "rounds": effort.rounds,
             "reading_ms": effort.milliseconds, "load": load, "left": left},
            rows, launches(*calls) if whole else None, first_calls(*calls) if whole else None,
        )  # fmt: skip


def measure(case: Case, names: Iterable[str], effort: Effort, limits: Mapping[str, Ceiling]) -> Row:
    """One case: our contender, those of the peers `names`, and the ceilings in the same rounds."""
    problem = case.problem()
    tensors = case.work.tensors()
    contenders, skipped = _contenders(problem, tensors, names)
    checked = {name: _checked(problem, contender, tensors) for name, contender in contenders.items()}
    skipped |= {name: found for name, found in checked.items() if isinstance(found, str)}
    contenders = {name: contender for name, contender in contenders.items() if name not in skipped}
    plans = {name: contender.made() for name, contender in contenders.items()}
    taken = _samples(contenders, plans, effort, case.work.device, limits)
    peak = _rate(limits, taken, "compute")
    copy = _rate(limits, taken, "copy")
    floor = max(problem.flops / peak, problem.bytes / copy) if peak and copy else None
    entries = {
        name: _entry(name, contender, taken, problem, floor, error, plans[name])
        for name, contender in contenders.items()
        if not isinstance(error := checked[name], str)
    }
    return Row(
        case.name, case.section, repr(problem.pattern), case.work.record(), entries, skipped, case.sparsity,
        _rounded(problem.density), _rounded(problem.flops / 1e9), _rounded(problem.bytes / 1e6),
        _rounded(peak, 1e-9), _rounded(copy, 1e-9), _rounded(floor, 1e3),
    )  # fmt: skip


def _contenders(
    problem: AnyProblem, tensors: Sequence[Tensor], names: Iterable[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Who takes part, ours first, and why others do not."""
    found = {OURS: attempt(lambda: problem.ours(*tensors))}
    found |= {name: available(name, problem, *tensors) for name in names}
    contenders = {name: contender for name, contender in found.items() if isinstance(contender, Contender)}
    return contenders, {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _checked(problem: AnyProblem, contender: Contender, tensors: Sequence[Tensor]) -> float | str | None:
    """The largest error of a contender that computes the same pairs (None if it does not), or what is wrong with it."""
    if contender.pairs != SAME:
        return None
    allowed = _TOLERANCE[problem.work.dtype]
    try:
        outs = contender.run(contender.made()), contender.with_plan()
        errors = [problem.largest_error(out, *tensors) for out in outs]
    except Exception as fault:  # a peer may fail the second time, too
        return failure(fault)
    wrong = [error for error in errors if not error <= allowed]  # NaN is wrong, too
    return f"failed: differs from the oracle by {wrong[0]:.2g}, more than {allowed:g}" if wrong else max(errors)


def _samples(
    contenders: Mapping[str, Contender], plans: Mapping[str, Any], effort: Effort, device: str,
    limits: Mapping[str, Ceiling],
) -> dict[str, Sample]:  # fmt: skip
    """Readings of running, of planning, of both, and of the ceilings."""
    calls: dict[str, Call] = dict(limits)
    for name, contender in contenders.items():
        if not contender.plans_inside:
            calls[name] = partial(contender.run, plans[name])
        if contender.plan is not None:
            calls[name + _PLAN] = contender.made
        if contender.plan is not None or contender.plans_inside:
            calls[name + _WITH_PLAN] = contender.with_plan
    settled = wall if device == "cpu" else _settled
    once = {name: Sample.of([settled(call)]) for name, call in calls.items()}
    slow = {name: sample for name, sample in once.items() if sample.seconds > _SLOW}
    quick = {name: call for name, call in calls.items() if name not in slow}
    return slow | samples(quick, rounds=effort.rounds, timer=effort.timer(device), warm_up=0)


def _settled(call: Call) -> float:
    """Seconds of one call until the device is idle again."""

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return wall(waited)


def _rate(limits: Mapping[str, Ceiling], taken: Mapping[str, Sample], name: str) -> float | None:
    return limits[name].amount / taken[name].seconds if name in limits else None


def _entry(
    name: str, contender: Contender, taken: Mapping[str, Sample], problem: AnyProblem, floor: float | None,
    error: float | None, plan: Any,
) -> Entry:  # fmt: skip
    """Figures of one contender. Where there is nothing to plan, planning takes no time."""
    alone, planning, both = (taken.get(name + suffix) for suffix in ("", _PLAN, _WITH_PLAN))
    if contender.plan is None and not contender.plans_inside:
        planning, both = Sample(0.0, 0.0, 0), alone
    counted = alone or both
    assert counted is not None
    size = getattr(plan, "nbytes", None)
    return Entry(
        _ms(alone), _noise(alone), _ms(planning), _ms(both), _noise(both), None if size is None else size / 1e6,
        _rounded(problem.flops / counted.seconds, 1e-9), _rounded(problem.bytes / counted.seconds, 1e-9),
        _rounded(None if floor is None else floor / counted.seconds), contender.pairs, _rounded(error, digits=2),
    )  # fmt: skip


def _ms(sample: Sample | None) -> float | None:
    return None if sample is None else _rounded(sample.seconds, 1e3)


def _noise(sample: Sample | None) -> float | None:
    return None if sample is None or sample.count < 2 else _rounded(sample.noise, digits=2)


def _rounded(value: float | None, scale: float = 1.0, digits: int = 4) -> float | None:
    """`value` times `scale`, to so many significant digits."""
    return None if value is None else float(f"{value * scale:.{digits}g}")
