"""What the search needs of any call: its configurations compiled side by side, then launched and read in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from spgen.autotune.measure import Sample, Summary, Timer, on_cpu, on_gpu, samples
from spgen.autotune.work import Resources
from spgen.errors import SpgenError
from spgen.ir.config import Config
from spgen.target import Target
from spgen.tuning.compilers import Compilers, Wanted, first_line

_MILLISECONDS = 20  # of one reading
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}  # of the largest value, between two configurations


@dataclass(frozen=True)
class Place:
    """Where a call is tuned: a target and the device that runs its kernels."""

    target: Target
    device: torch.device

    @property
    def timer(self) -> Timer:
        """Seconds of a call on the device."""
        return on_gpu(_MILLISECONDS, self.device.index) if self.device.type == "cuda" else on_cpu(_MILLISECONDS)

    @property
    def summary(self) -> Summary:
        """What readings come to: their median, on a CPU that others may use the fastest."""
        return Sample.of if self.device.type == "cuda" else Sample.fastest


class Measured(Generic[Wanted]):
    """A call on a place; a subclass says what is compiled (`job`) and how it is launched (`launch`)."""

    default: Config

    def __init__(self, place: Place, compilers: Compilers, dtype: str) -> None:
        self._place, self._compilers, self._dtype = place, compilers, dtype
        self._taken: dict[Config, Resources] = {}
        self._expected: Tensor | None = None

    def job(self, config: Config) -> Wanted:
        """What compilers are given for a configuration."""
        raise NotImplementedError

    def launch(self, config: Config) -> tuple[Callable[[], None], Tensor]:
        """A launch of the bare kernel, and where it writes."""
        raise NotImplementedError

    def taken(self, config: Config) -> Resources | None:
        """What the compiled kernel takes."""
        return self._taken.get(config)

    @property
    def waits(self) -> bool:
        """Whether nothing is measured before all is compiled."""
        return self._place.target.kind == "cpu"

    def compiled(self, configs: Sequence[Config]) -> Iterator[tuple[Config, str]]:
        """Compile side by side. On a CPU all are compiled before the first is handed out and measured."""
        jobs = {self.job(config): config for config in configs}

        def noted() -> Iterator[tuple[Config, str]]:
            for job, found in self._compilers.compile(list(jobs)):
                if isinstance(found, Resources):
                    self._taken[jobs[job]] = found
                yield jobs[job], found if isinstance(found, str) else ""

        return iter(list(noted())) if self.waits else noted()

    def measure(self, configs: Sequence[Config], rounds: int) -> Mapping[Config, Sample | str]:
        """Readings in turns; results are compared with that of the default."""
        prepared = {config: self._prepared(config) for config in configs}
        faults = {config: found for config, found in prepared.items() if isinstance(found, str)}
        calls = {str(config): found for config, found in prepared.items() if not isinstance(found, str)}
        try:
            place = self._place
            taken = samples(calls, rounds=rounds, timer=place.timer, warm_up=0, summary=place.summary)
        except torch.OutOfMemoryError as fault:
            return dict.fromkeys(configs, _fault(fault))
        return {**faults, **{Config.read(text): sample for text, sample in taken.items()}}

    def _prepared(self, config: Config) -> Callable[[], None] | str:
        """A launch of the bare kernel, whose result was compared, or the fault."""
        try:
            return self._compared(config)
        except (SpgenError, torch.OutOfMemoryError) as fault:
            return _fault(fault)

    def _compared(self, config: Config) -> Callable[[], None]:
        launch, out = self.launch(config)
        launch()
        if config == self.default:
            self._expected = out.clone()
        elif self._expected is None:
            found = out.clone()
            self._compared(self.default)
            out = found
        assert self._expected is not None
        largest = self._expected.float().abs().max().clamp(min=1e-30)
        off = float((out.float() - self._expected.float()).abs().max() / largest)
        if not off <= _TOLERANCE[self._dtype]:
            raise SpgenError(f"config {config}", given=f"results that are {off:.1e} off those of {self.default}")
        return launch


def _fault(fault: Exception) -> str:
    if isinstance(fault, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    return first_line(fault)
