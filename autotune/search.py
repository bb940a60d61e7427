"""The search: from the configurations that the model likes to the one that is fastest when measured.

    1. the default, then the model's favourites, of several kinds of tiles (`ranking.py`)
    2. neighbours of the best, one axis changed, as often as the effort allows
    3. the best few and the default again, in turns: the winner must beat the default by more than the noise

Every reading is kept, so an interrupted search goes on where it stopped; earlier readings are scaled to what the
default takes now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Protocol

from spgen.autotune.measure import Sample
from spgen.autotune.records import Record, Trial
from spgen.autotune.work import Resources
from spgen.ir.config import Config

_FINALISTS = 4
_TURNS = 9  # readings of a trial where others can take turns with it
_LEAST_GAIN = 0.005  # of the default's time, beyond the noise of both


@dataclass(frozen=True)
class Effort:
    """How much is tried: the model's favourites, then `steps` times up to `around` neighbours of the best."""

    favourites: int
    steps: int
    around: int
    rounds: int


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(favourites=8, steps=0, around=0, rounds=5),
    "standard": Effort(favourites=20, steps=1, around=10, rounds=7),
    "thorough": Effort(favourites=48, steps=3, around=16, rounds=9),
}


class Problem(Protocol):
    """One call to tune, as the search sees it."""

    @property
    def record(self) -> Record:
        """What is known so far; an empty record for a call that nobody tuned."""

    def configs(self) -> Sequence[Config]:
        """The space, in the order of trying."""

    def neighbours(self, config: Config) -> Sequence[Config]:
        """Configurations that differ in one axis, best predicted first."""

    def taken(self, config: Config) -> Resources | None:
        """What a compiled kernel takes, where that is known."""

    @property
    def waits(self) -> bool:
        """Whether nothing is measured before all is compiled: on a CPU, which does both."""

    def compiled(self, configs: Sequence[Config]) -> Iterator[tuple[Config, str]]:
        """Compile side by side; gives each as it is done, with the fault or an empty text."""

    def measure(self, configs: Sequence[Config], rounds: int) -> Mapping[Config, Sample | str]:
        """Readings of compiled configurations, taken in turns; a text says why there is none."""


def tune(
    problem: Problem, effort: str, save: Callable[[Record], None], said: Callable[[str, int, int], None]
) -> Record:
    """Search with an effort of `EFFORTS`. `save` keeps each new state of the record; `said` hears what is going on.

    Trials that the record has are not measured again. The finished record's `gain` is the default's time over the
    winner's.
    """
    chosen = EFFORTS[effort]
    search = _Search(problem, save, said)
    search.compare_with_before(chosen.rounds)
    search.trying(favourites(problem.record.default, problem.configs(), chosen.favourites))
    for _ in range(chosen.steps):
        best = search.best()
        around = [config for config in problem.neighbours(best) if config not in search.record.trials]
        search.trying(around[: chosen.around])
        if search.best() == best:
            break
    return search.finish(effort, chosen.rounds)


def favourites(default: Config, configs: Sequence[Config], count: int) -> list[Config]:
    """The default, which all are compared with, and the first of `configs`, in the order of trying."""
    return list(dict.fromkeys([default, *configs]))[:count]


class _Search:
    def __init__(self, problem: Problem, save: Callable[[Record], None], said: Callable[[str, int, int], None]) -> None:
        self._problem, self._save, self._said = problem, save, said
        self.record = problem.record

    def compare_with_before(self, rounds: int) -> None:
        """Bring earlier readings to what this machine does now: it may be warmer, or be shared with others.

        By the default, which is measured again; all of them are scaled alike, so one disturbed reading must not decide.
        """
        default, trials = self.record.default, self.record.trials
        if default not in trials or trials[default].fault:
            return
        for _, fault in self._problem.compiled([default]):
            found = fault or self._problem.measure([default], rounds)[default]
            if isinstance(found, Sample):
                ratio = found.seconds / trials[default].seconds
                scaled = {config: replace(trial, seconds=trial.seconds * ratio) for config, trial in trials.items()}
                self.record = replace(self.record, trials=scaled)

    def trying(self, configs: Iterable[Config]) -> None:
        """Compile and measure those that were not yet: each as it is compiled, or all in turns if it waits for all.

        In turns, what disturbs the machine for a while disturbs all alike.
        """
        new = [config for config in configs if config not in self.record.trials]
        if self._problem.waits:
            self._in_turns(new)
            return
        for done, (config, fault) in enumerate(self._problem.compiled(new), 1):
            found: Sample | str = fault or self._problem.measure([config], 1)[config]
            self._note({config: found})
            self._said(str(config), done, len(new))

    def _in_turns(self, new: Sequence[Config]) -> None:
        """The default takes turns, too: times are kept beside the one that it has."""
        default, trials = self.record.default, self.record.trials
        found: dict[Config, Sample | str] = dict(self._problem.compiled(new))
        beside = [default] if default in trials and not trials[default].fault else []
        good = [config for config in new if not found[config]]
        if good:
            found |= self._problem.measure([*beside, *good], _TURNS)
        again = found.get(default) if beside else None
        ratio = trials[default].seconds / again.seconds if isinstance(again, Sample) else 1.0
        for config in new:
            one = found[config]
            found[config] = replace(one, seconds=one.seconds * ratio) if isinstance(one, Sample) else one
        self._note({config: found[config] for config in new})
        self._said("all in turns", len(new), len(new))

    def best(self) -> Config:
        """The fastest so far."""
        trials = self.record.trials
        return min(trials, key=lambda config: trials[config].seconds)

    def finish(self, effort: str, rounds: int) -> Record:
        """Measure the best and the default in turns, and choose."""
        default, trials = self.record.default, self.record.trials
        order = sorted((c for c in trials if not trials[c].fault), key=lambda config: trials[config].seconds)
        if default not in order:  # it must at least run
            return self.record
        finalists = list(dict.fromkeys([*order[:_FINALISTS], default]))
        for config, fault in self._problem.compiled(finalists):  # those of an earlier run are in the cache
            assert not fault, f"{config}: {fault}"
        self._said("finalists", 0, len(finalists))
        found = {
            config: sample for config, sample in self._problem.measure(finalists, rounds).items()
            if isinstance(sample, Sample)
        }  # fmt: skip
        if default not in found:
            return self.record
        usual = found[default]
        # a machine gets warm while it measures in turns: kept are times beside the default's, as all readings are
        ratio = self.record.trials[default].seconds / usual.seconds
        self._note({config: replace(sample, seconds=sample.seconds * ratio) for config, sample in found.items()})
        winner = min(found, key=lambda config: found[config].seconds)
        gain = usual.seconds / found[winner].seconds
        if gain - 1 < _LEAST_GAIN + found[winner].noise + usual.noise:
            winner, gain = default, 1.0
        when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        self.record = replace(self.record, config=winner, gain=gain, effort=effort, when=when)
        self._save(self.record)
        return self.record

    def _note(self, found: Mapping[Config, Sample | str]) -> None:
        new = {
            config: Trial(fault=one) if isinstance(one, str) else Trial.of(one, self._problem.taken(config))
            for config, one in found.items()
        }
        self.record = replace(self.record, trials={**self.record.trials, **new})
        self._save(self.record)
