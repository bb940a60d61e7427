"""Running many cases in worker processes: what crashes or hangs a worker is a failure of its case, and others go on."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz.cases import VARIANTS, Case, case

_HANGS_AFTER = 300.0  # seconds without a result
_GROUPS_PER_WORKER = 150  # kernels stay loaded: a worker that has many is replaced


@dataclass(frozen=True)
class Failure:
    """What went wrong with a case, and the simplest case found that goes wrong too."""

    seed: int
    number: int
    message: str
    code: str = ""

    def __str__(self) -> str:
        test = f"\n\n{self.code}\n" if self.code else ""
        return f"--case {self.seed}:{self.number}: {self.message}{test}"


@dataclass
class Result:
    """Cases that ran, in order of groups, and those that failed."""

    backend: str
    seed: int
    cases: int = 0
    groups: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    number: int | None = None  # the case it works on
    since: float = 0.0
    groups: int = 0


def prepare(backend: str) -> None:
    """Sets what Triton reads when it is imported, here and in the processes started from here."""
    if backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"


def run_case(one: Case, backend: str) -> str:
    """What is wrong with a case, in a line; empty if nothing is."""
    from tests.fuzz.check import check

    try:
        check(one, backend)
    except Exception as error:
        return _in_a_line(error)
    return ""


def _in_a_line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def shrunk(seed: int, number: int, message: str, backend: str, seconds: float) -> Failure:
    """The failure of a case with the code of a regression test."""
    from tests.fuzz.shrink import shrink

    kind = message.partition(":")[0]
    found = shrink(case(seed, number), lambda one: run_case(one, backend).startswith(kind + ":"), seconds)
    return Failure(seed, number, message, f"{found}  # {backend}: {run_case(found, backend)}")


def _work(pipe: Connection, backend: str, seed: int, threads: int, cache: str, shrinking: float) -> None:
    """A worker: receives numbers of groups, sends numbers of cases as they begin, then the group's failures."""
    import torch

    from spgen.settings import override

    torch.set_num_threads(threads)
    with override(cache_dir=Path(cache)), suppress(EOFError, BrokenPipeError):  # whoever started it may be gone
        for group in iter(pipe.recv, None):
            failures = list(_run_group(backend, seed, group, shrinking, pipe.send))
            pipe.send(failures)
            if any("CUDA" in failure.message for failure in failures):
                return  # the device's context may be lost


def _run_group(
    backend: str, seed: int, group: int, shrinking: float, begin: Callable[[int], None]
) -> Iterator[Failure]:  # fmt: skip
    """The failures of a group; the first one is shrunk."""
    for number in range(group * VARIANTS, (group + 1) * VARIANTS):
        begin(number)
        message = _tried(seed, number, backend)
        if message and shrinking and "CUDA" not in message:
            yield shrunk(seed, number, message, backend, shrinking)
            shrinking = 0
        elif message:
            yield Failure(seed, number, message)


def _tried(seed: int, number: int, backend: str) -> str:
    try:
        one = case(seed, number)
    except Exception as error:
        return f"drawing the case: {_in_a_line(error)}"
    return run_case(one, backend)


def run(
    backend: str, seed: int, cases: int, *, first: int = 0, jobs: int = 1, threads: int = 2, seconds: float = 600,
    shrinking: float = 60, progress: Callable[[Result], None] = lambda result: None,
) -> Result:  # fmt: skip
    """Runs cases `first` … of a seed, whole groups of VARIANTS, until there are `cases` or the time is up.

    Without `jobs` they run in this process, as debuggers and sanitizers want it, with the cache that it has.
    """
    result, started = Result(backend, seed), time.monotonic()
    prepare(backend)
    groups = iter(range(first // VARIANTS, -(-(first + cases) // VARIANTS)))
    if not jobs:
        for group in groups:
            if time.monotonic() > started + seconds:
                break
            result.failures += _run_group(backend, seed, group, shrinking, lambda number: None)
            result.groups, result.cases = result.groups + 1, result.cases + VARIANTS
            result.seconds = time.monotonic() - started
            progress(result)
        return result
    with tempfile.TemporaryDirectory() as cache:
        pool = _Pool((backend, seed, threads, cache, shrinking))
        try:
            for _ in pool.run(groups, jobs, started + seconds, result):
                result.seconds = time.monotonic() - started
                progress(result)
        finally:
            pool.close()
    return result


class _Pool:
    """Worker processes, each with a pipe."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments
        self._workers: list[_Worker] = []
        self._context = get_context("spawn")

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours, None, time.monotonic())
        self._workers.append(worker)
        return worker

    def run(self, groups: Iterator[int], jobs: int, stop: float, result: Result) -> Iterator[None]:
        """Hands groups to workers until there are no more or the time is up; yields after each group."""
        for _ in range(jobs):
            self._give(self._start(), groups, stop)
        while self._workers:
            ready = wait([worker.pipe for worker in self._workers], timeout=5)
            for worker in list(self._workers):
                if worker.pipe in ready:
                    if self._listen(worker, result):
                        self._give(worker, groups, stop)
                        yield
                elif time.monotonic() - worker.since > _HANGS_AFTER:
                    self._lost(worker, "hangs", result)
                    self._give(self._start(), groups, stop)

    def _give(self, worker: _Worker, groups: Iterator[int], stop: float) -> None:
        group = None if time.monotonic() > stop else next(groups, None)
        if group is not None and (worker.groups >= _GROUPS_PER_WORKER or not worker.process.is_alive()):
            self._end(worker)
            worker = self._start()
        if group is None:
            self._end(worker)
            return
        worker.groups += 1
        worker.pipe.send(group)

    def _listen(self, worker: _Worker, result: Result) -> bool:
        """Takes in what a worker says; whether its group is done."""
        try:
            said = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self._lost(worker, f"the process died with code {worker.process.exitcode}", result)
            result.groups += 1
            self._workers.append(worker)  # to be replaced with the next group
            worker.groups = _GROUPS_PER_WORKER
            return True
        worker.since = time.monotonic()
        if isinstance(said, int):
            worker.number = said
            return False
        result.groups += 1
        result.cases += VARIANTS
        result.failures += said
        return True

    def _lost(self, worker: _Worker, how: str, result: Result) -> None:
        number = -1 if worker.number is None else worker.number
        result.failures.append(Failure(self._arguments[1], number, how))
        result.cases += number % VARIANTS + 1
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        with suppress(OSError, ValueError):
            worker.pipe.send(None)
        worker.process.join(timeout=10)
        if worker.process.is_alive():
            worker.process.kill()
        worker.pipe.close()

    def close(self) -> None:
        """Ends all workers."""
        for worker in list(self._workers):
            worker.process.kill()
            worker.process.join()
