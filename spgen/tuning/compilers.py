"""Processes that compile configurations into the cache, side by side."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

import torch

from spgen.autotune.work import Resources
from spgen.compile import Request
from spgen.errors import SpgenError
from spgen.precompile import resources_of
from spgen.settings import override, settings
from spgen.weights.compile import Job

Result: TypeAlias = "Resources | str"
Wanted = TypeVar("Wanted", Request, Job)


class Compilers:
    """As many processes as there are cores; a context manager. Each knows the settings of the process that made it."""

    def __init__(self, workers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        self._workers = workers or cores
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Compilers:
        # a fork of this process would share its CUDA context, and a fresh one would import everything again
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_start, initargs=(asdict(settings()),)
        )
        return self

    def __exit__(self, *fault: object) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)

    def compile(self, requests: Sequence[Wanted]) -> Iterator[tuple[Wanted, Result]]:
        """Each as it is done, with what its kernel takes, or the fault."""
        assert self._pool is not None
        waiting = {self._pool.submit(_compile, request): request for request in requests}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _start(chosen: Mapping[str, Any]) -> None:
    override(**chosen).__enter__()
    torch.set_num_threads(1)


def _compile(request: Request | Job) -> Result:
    try:
        return resources_of(request)
    except Exception as fault:  # a configuration that does not compile is a result
        return first_line(fault)


def first_line(fault: Exception) -> str:
    """A fault as records keep it."""
    text = str(fault).strip() or type(fault).__name__
    return ("" if isinstance(fault, SpgenError) else f"{type(fault).__name__}: ") + text.splitlines()[0][:200]
