"""Tuning by measurement: cases one after the other on each device, every reading kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from spgen.autotune.experience import Experience
from spgen.autotune.ranking import ranked
from spgen.autotune.records import Record, Records
from spgen.autotune.search import Problem, tune
from spgen.autotune.workloads import AnyCase, Case, ProductCase
from spgen.compile import Request, compiled
from spgen.errors import SpgenError
from spgen.ir.config import Config
from spgen.ir.kernel import parts
from spgen.ir.tiles import table_ops
from spgen.target import Target
from spgen.tuned import records_of
from spgen.tuning.compilers import Compilers
from spgen.tuning.measured import Measured, Place
from spgen.tuning.product import TunedProduct
from spgen.tuning.subject import Subject


class Tuned(Measured[Request]):
    """One case as the search's Problem. Making it draws the tensors of the call on the device."""

    def __init__(
        self, case: Case, place: Place, compilers: Compilers, known: Record | None = None,
        experience: Experience | None = None,
    ) -> None:  # fmt: skip
        super().__init__(place, compilers, case.dtype)
        self.subject = Subject(case, place.target, place.device, values=True, experience=experience)
        self.default, self._known = self.subject.default, known

    @cached_property
    def record(self) -> Record:
        """What is known so far."""
        fresh, known = self.subject.empty_record, self._known
        if known is None or known.toolchain != fresh.toolchain:
            return fresh
        if known.default == fresh.default:
            return replace(known, facts=fresh.facts)
        # who wins is read in turns with today's default; readings beside another tell who might
        return replace(fresh, trials=known.trials)

    def configs(self) -> list[Config]:
        """The space, in the order of trying."""
        return ranked(self.subject.expected(self.subject.space))

    def neighbours(self, config: Config) -> list[Config]:
        """One axis changed, best predicted first."""
        seconds = self.subject.expected(self.subject.space.neighbours(config))
        return sorted(seconds, key=lambda other: seconds[other])

    def job(self, config: Config) -> Request:
        """The request with this configuration."""
        return replace(self.subject.request, config=config)

    def launch(self, config: Config) -> tuple[Callable[[], None], Tensor]:
        """A launch of the bare kernel, and where it writes."""
        call, case = self.subject.call, self.subject.case
        kernel = compiled(self.job(config)).kernel
        levels, tables = self.subject.lowered(config)
        names = [op["name"] for op in table_ops(levels.program)]
        read = [tables[names.index(op["name"])] for op in parts(levels.kernel, "table")]
        out = call.q.new_zeros((*call.q.shape[:-1], case.value_dim))
        return partial(
            kernel, call.q, call.k, call.v, out, None, read, None, None, 1 / math.sqrt(case.head_dim)
        ), out  # fmt: skip


@dataclass
class Session:
    """Cases, where they are tuned, and the file that keeps the results."""

    cases: Sequence[AnyCase]
    places: Sequence[Place]
    records: Records
    path: Path
    effort: str
    said: Callable[[AnyCase, str, int, int], None]
    finished: Callable[[AnyCase, Record | str], None]
    faults: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Tune what is not finished, one case at a time on each place; every new reading is saved at once.

        A case that fails is skipped; `faults` says why.
        """
        self._waiting, self._lock, self._stopped = list(self.cases), threading.Lock(), threading.Event()
        with Compilers() as compilers:
            if len(self.places) == 1:
                self._work(self.places[0], compilers)
                return
            broken: list[BaseException] = []
            threads = [
                threading.Thread(target=self._work_or_stop, args=(place, compilers, broken), daemon=True)
                for place in self.places
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            finally:
                self._stopped.set()
            if broken:
                raise broken[0]

    def _work_or_stop(self, place: Place, compilers: Compilers, broken: list[BaseException]) -> None:
        """A fault that no case accounts for ends the session, as it does on a single place."""
        try:
            self._work(place, compilers)
        except BaseException as fault:
            broken.append(fault)
            self._stopped.set()

    def _work(self, place: Place, compilers: Compilers) -> None:
        while not self._stopped.is_set():
            with self._lock:
                if not self._waiting:
                    return
                case = self._waiting.pop(0)
            result = self._result(case, place, compilers)
            if isinstance(result, str):
                self.faults[case.name] = result
            self.finished(case, result)

    def _result(self, case: AnyCase, place: Place, compilers: Compilers) -> Record | str:
        with self._lock:  # others add to the records meanwhile
            known = next((record for record in self.records if record.case == asdict(case)), None)
        try:
            problem: Problem
            if isinstance(case, ProductCase):
                problem = TunedProduct(case, place, compilers, known)
            else:
                problem = Tuned(case, place, compilers, known, self._experience(place.target))
            found = tune(problem, self.effort, self._save, partial(self.said, case))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "out of memory: the call itself does not fit"
        except SpgenError as fault:
            return str(fault)
        return found if found.effort else f"the default does not run: {found.trials[found.default].fault}"

    def _experience(self, target: Target) -> Experience:
        with self._lock:
            own = list(self.records)
        return Experience([*own, *(record for one in records_of(target) for record in one)], target)

    def _save(self, record: Record) -> None:
        with self._lock:
            self.records.update(self.path, record)
