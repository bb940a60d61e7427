"""Fitting the cost model to measured trials, and how good it is at calls that it has not seen.

    residual   log(predicted / measured) of a trial, most of its record's mean taken off: order counts more than level
    weight     (best / measured)² of the record: configurations that nobody would choose hardly count
    prior      each coefficient's logarithm stays near that of the guess, as far as the trials do not say otherwise

A coefficient on which no trial depends is left as the target has it, or out.

Minimised by damped Gauss-Newton steps. For the evaluation each call is predicted with coefficients from which its own
trials were taken out: one more step from the common fit, over the trials of all other calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from spgen.autotune.coefficients import SHARES, SPREAD, guesses
from spgen.autotune.experience import Experience
from spgen.autotune.model import estimated, terms_of
from spgen.autotune.ranking import ranked
from spgen.autotune.records import Record
from spgen.autotune.work import Resources, Work
from spgen.ir.config import Config
from spgen.target import Target

_CENTRED = 0.9  # share of a record's mean residual that is taken off
_NOISE = 0.08  # of a trial, as a logarithm, against which the priors are weighed
_PRIOR = 1.0  # standard deviation of a coefficient's logarithm
_PRIOR_ADJUST = 0.1  # of an exponent that is linear in the choices
_STEPS = 12
_DELTA = 1e-4  # of numeric derivatives
_LEAST_TRIALS = 3
_NEAR = 1.05  # a configuration this near the best is as good
_MOST = 8.0  # slower ones than this many times the best say nothing

Taken = Callable[[Record, Config], "Resources | None"]
Vector = list[float]


@dataclass(frozen=True)
class _Trial:
    work: Work
    config: Config
    resources: Resources
    seconds: float


@dataclass(frozen=True)
class _Case:
    """The trials of one record, and how much each counts."""

    record: Record
    name: str
    trials: Sequence[_Trial]

    @cached_property
    def weights(self) -> Vector:
        best = min(trial.seconds for trial in self.trials)
        return [(best / trial.seconds) ** 2 for trial in self.trials]


@dataclass(frozen=True)
class Fit:
    """Coefficients that were fitted, those of each case without its own trials, and the spread of such predictions.

    Those on which no trial depends are the target's own, and missing where it has none.
    """

    values: Mapping[str, float]
    without: Mapping[str, Mapping[str, float]]
    spread: float

    def to_json(self) -> dict[str, float]:
        """What a target's description holds as its model."""
        return {name: float(f"{value:.4g}") for name, value in {**self.values, SPREAD: self.spread}.items()}


@dataclass(frozen=True)
class Score:
    """One case: rank correlation, and the best of the first k to be tried over the best measured, as ratios of time."""

    name: str
    count: int
    spearman: float
    regret: Mapping[int, float]
    points: Sequence[tuple[float, float]]  # predicted and measured seconds


@dataclass(frozen=True)
class Report:
    """All cases, each predicted without its own trials if so evaluated."""

    scores: Sequence[Score]

    def regret(self, k: int) -> float:
        """Geometric mean of the ratio between the best of the first `k` to be tried and the best."""
        return math.exp(_mean([math.log(score.regret[k]) for score in self.scores]))

    @property
    def near(self) -> float:
        """Share of the cases whose first five hold a configuration within 5 % of the best."""
        return _mean([float(score.regret[5] <= _NEAR) for score in self.scores])

    @property
    def spread(self) -> float:
        """Geometric mean of the ratio between predicted and measured, whichever is larger."""
        return math.exp(_mean([abs(math.log(a / b)) for score in self.scores for a, b in score.points]))

    def __str__(self) -> str:
        width = max((len(score.name) for score in self.scores), default=4)
        lines = [f"{'case':{width}}  trials  rank  top 1  top 3  top 5"]
        lines += [
            f"{score.name:{width}}  {score.count:6}  {score.spearman:4.2f}"
            + "".join(f"  {score.regret[k]:5.3f}" for k in (1, 3, 5))
            for score in self.scores
        ]
        means = "".join(f"  {self.regret(k):5.3f}" for k in (1, 3, 5))
        rank = _mean([score.spearman for score in self.scores])
        lines.append(f"{'all':{width}}  {sum(score.count for score in self.scores):6}  {rank:4.2f}{means}")
        lines.append(f"top 5 within 5 % of the best: {self.near:.0%} of the cases; times within x {self.spread:.2f}")
        return "\n".join(lines)


def fit(records: Iterable[Record], target: Target, taken: Taken | None = None) -> Fit:
    """Coefficients for `target` from records measured on it.

    `taken(record, config)` gives the resources of compiled kernels, by default those in the record. Raises ValueError
    where no record has three trials.
    """
    cases = _cases(records, target, taken)
    if not cases:
        raise ValueError("no record has three measured trials")
    problem = _Problem(cases, target)
    theta = problem.minimise()
    others = problem.without(theta)
    without = {case.name: problem.values(one) for case, one in zip(cases, others, strict=True)}
    report = _report(cases, target, lambda case: without[case.name])
    return Fit(problem.values(theta), without, report.spread)


def evaluate(
    records: Iterable[Record], target: Target, values: Mapping[str, float] | Fit, experience: Experience | None = None
) -> Report:
    """How well coefficients rank the trials of each record; those of a Fit are taken without the record's own.

    The order is that in which a search would try them, before any is compiled: what kernels take is estimated. With
    `experience` the other records correct it.
    """
    cases = _cases(records, target, None)
    if isinstance(values, Fit):
        return _report(cases, target, lambda case: values.without.get(case.name, values.values), experience)
    return _report(cases, target, lambda _: values, experience)


def _cases(records: Iterable[Record], target: Target, taken: Taken | None) -> list[_Case]:
    found = []
    for number, record in enumerate(records):
        trials = []
        good = {config: trial.seconds for config, trial in record.trials.items() if math.isfinite(trial.seconds)}
        best = min(good.values(), default=0.0)
        for config, seconds in good.items():
            if not 0 < seconds <= _MOST * best:
                continue
            work = Work.of(record.facts, config)
            resources = taken(record, config) if taken else record.trials[config].resources
            trials.append(_Trial(work, config, resources or estimated(work, config, target), seconds))
        if len(trials) >= _LEAST_TRIALS:
            found.append(_Case(record, f"{record.name or record.key.structure} #{number}", trials))
    return found


class _Problem:
    """The residuals as a function of theta: logarithms of coefficients, and exponents as they are."""

    def __init__(self, cases: Sequence[_Case], target: Target) -> None:
        self.cases, self.target = cases, target
        self.kept = {name: value for name, value in target.model if name in guesses(target)}
        self._take(list(guesses(target)))
        blocks = self._residuals(self.prior)
        jacobians = self._jacobians(self.prior, blocks)
        moved = [any(any(columns[n]) for columns in jacobians) for n in range(len(self.names))]
        self._take([name for name, moves in zip(self.names, moved, strict=True) if moves])

    def _take(self, names: list[str]) -> None:
        guess = guesses(self.target)
        self.names = names
        self.prior = [_free(name, guess[name]) for name in names]
        self.width = [_PRIOR_ADJUST if _is_exponent(name) else _PRIOR for name in names]

    def values(self, theta: Sequence[float]) -> dict[str, float]:
        return {**self.kept, **{name: _bound(name, x) for name, x in zip(self.names, theta, strict=True)}}

    def minimise(self) -> Vector:
        theta, damping = list(self.prior), 1e-2
        blocks = self._residuals(theta)
        loss = self._loss(theta, blocks)
        for _ in range(_STEPS):
            normal = self._normal(self._jacobians(theta, blocks), blocks)
            moved = False
            for _ in range(6):
                step = self._step(theta, _total(normal), damping)
                trial = [x + dx for x, dx in zip(theta, step, strict=True)]
                found = self._residuals(trial)
                new = self._loss(trial, found)
                if new < loss:
                    moved = loss - new > 1e-4 * loss
                    theta, blocks, loss, damping = trial, found, new, damping / 4
                    break
                damping *= 8
            if not moved:
                break
        return theta

    def without(self, theta: Vector) -> list[Vector]:
        """For each case, the minimum over all others: one step from the common one."""
        blocks = self._residuals(theta)
        normal = self._normal(self._jacobians(theta, blocks), blocks)
        everything = _total(normal)
        found = []
        for own in normal:
            rest = [
                [a - b for a, b in zip(row, other, strict=True)] for row, other in zip(everything, own, strict=True)
            ]
            step = self._step(theta, rest, 1e-6)
            found.append([x + dx for x, dx in zip(theta, step, strict=True)])
        return found

    def _residuals(self, theta: Sequence[float]) -> list[Vector]:
        values = {**guesses(self.target), **self.values(theta)}
        return [self._of_case(case, values) for case in self.cases]

    def _of_case(self, case: _Case, values: Mapping[str, float]) -> Vector:
        raw = [math.log(_seconds(trial, self.target, values) / trial.seconds) for trial in case.trials]
        total = sum(case.weights)
        mean = sum(w * r for w, r in zip(case.weights, raw, strict=True)) / total
        scale = 1 / _NOISE
        return [math.sqrt(w) * (r - _CENTRED * mean) * scale for w, r in zip(case.weights, raw, strict=True)]

    def _loss(self, theta: Sequence[float], blocks: Sequence[Vector]) -> float:
        prior = sum(((x - p) / s) ** 2 for x, p, s in zip(theta, self.prior, self.width, strict=True))
        return prior + sum(r * r for block in blocks for r in block)

    def _jacobians(self, theta: Sequence[float], blocks: Sequence[Vector]) -> list[list[Vector]]:
        """For each case, a column for each coefficient."""
        found: list[list[Vector]] = [[] for _ in self.cases]
        for n in range(len(theta)):
            moved = list(theta)
            moved[n] += _DELTA
            for case, (after, before) in enumerate(zip(self._residuals(moved), blocks, strict=True)):
                found[case].append([(a - b) / _DELTA for a, b in zip(after, before, strict=True)])
        return found

    def _normal(self, jacobians: Sequence[Sequence[Vector]], blocks: Sequence[Vector]) -> list[list[Vector]]:
        """For each case the rows of J' J, each with its entry of J' r behind it."""
        return [
            [[_dot(column, other) for other in columns] + [_dot(column, block)] for column in columns]
            for columns, block in zip(jacobians, blocks, strict=True)
        ]

    def _step(self, theta: Sequence[float], normal: Sequence[Vector], damping: float) -> Vector:
        rows = []
        for n, row in enumerate(normal):
            weight = 1 / self.width[n] ** 2
            own = [*row[:-1], -row[-1] - weight * (theta[n] - self.prior[n])]
            own[n] = (own[n] + weight) * (1 + damping)
            rows.append(own)
        return _solved(rows)


def _free(name: str, value: float) -> float:
    """A coefficient as a number without bounds: shares lie below 1, the exponent of overlap above."""
    if _is_exponent(name):
        return value
    if name in SHARES:
        return math.log(value / (1 - value))
    return math.log(value - 1) if name == "overlap" else math.log(value)


def _bound(name: str, x: float) -> float:
    """The coefficient of a free number."""
    if _is_exponent(name):
        return x
    if name in SHARES:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) + (name == "overlap")


def _is_exponent(name: str) -> bool:
    return name.startswith("adjust.")


def _seconds(trial: _Trial, target: Target, values: Mapping[str, float]) -> float:
    return terms_of(trial.work, trial.config, target, values, trial.resources)["total"]


def _expected(trial: _Trial, target: Target, values: Mapping[str, float]) -> float:
    """Before it is compiled."""
    return _seconds(replace(trial, resources=estimated(trial.work, trial.config, target)), target, values)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _total(blocks: Sequence[Sequence[Vector]]) -> list[Vector]:
    return [[sum(entries) for entries in zip(*rows, strict=True)] for rows in zip(*blocks, strict=True)]


def _solved(rows: list[Vector]) -> Vector:
    """Gaussian elimination of a positive definite system; the right side is each row's last entry."""
    size = len(rows)
    for n in range(size):
        pivot = rows[n]
        for below in rows[n + 1 :]:
            factor = below[n] / pivot[n]
            if factor:
                below[n:] = [x - factor * y for x, y in zip(below[n:], pivot[n:], strict=True)]
    found = [0.0] * size
    for n in reversed(range(size)):
        known = _dot(rows[n][n + 1 : size], found[n + 1 :])
        found[n] = (rows[n][size] - known) / rows[n][n]
    return found


def _report(
    cases: Sequence[_Case], target: Target, values_of: Callable[[_Case], Mapping[str, float]],
    experience: Experience | None = None,
) -> Report:  # fmt: skip
    scores = []
    for case in cases:
        values = {**guesses(target), **values_of(case)}
        measured = {trial.config: trial.seconds for trial in case.trials}
        expected = {trial.config: _expected(trial, target, values) for trial in case.trials}
        if experience is not None:
            for config in expected:
                expected[config] *= math.exp(experience.correction(case.record, config))
        points = [(expected[config], seconds) for config, seconds in measured.items()]
        best = min(measured.values())
        order = [measured[config] for config in ranked(expected)]
        regret = {k: min(order[:k]) / best for k in (1, 3, 5)}
        rank = spearman(list(expected.values()), list(measured.values()))
        scores.append(Score(case.name, len(points), rank, regret, points))
    return Report(scores)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of ranks; equal values share the mean of theirs. 0 where one side does not vary."""
    x, y = _ranks(a), _ranks(b)
    centre = (len(x) - 1) / 2
    dx, dy = [one - centre for one in x], [one - centre for one in y]
    size = math.sqrt(_dot(dx, dx) * _dot(dy, dy))
    return _dot(dx, dy) / size if size else 0.0


def _ranks(values: Sequence[float]) -> Vector:
    order = sorted(range(len(values)), key=lambda n: values[n])
    ranks, start = [0.0] * len(values), 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or values[order[stop]] != values[order[start]]:
            for n in order[start:stop]:
                ranks[n] = (start + stop - 1) / 2
            start = stop
    return ranks


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
