"""`python -m tests.fuzz`: see `--help`."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spgen.settings import override
from tests.fuzz import campaign
from tests.fuzz.cases import case
from tests.fuzz.check import BACKENDS

_console = Console(stderr=True)


def main(
    backend: Annotated[
        str, typer.Option(help="none (level 3 is interpreted), cpu, gpu, or interpreter (Triton's).")
    ] = "cpu",
    cases: Annotated[int, typer.Option(help="How many cases; eight in a row share a kernel.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which sequence of cases.")] = 0,
    first: Annotated[int, typer.Option(help="The first case, to go on where a campaign ended.")] = 0,
    jobs: Annotated[int, typer.Option(help="Worker processes; 0: none, for debuggers and sanitizers.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 2,
    time: Annotated[float, typer.Option(help="No case starts after so many seconds.")] = 600,
    shrink: Annotated[float, typer.Option(help="Seconds to make a failing case small; 0: not at all.")] = 60,
    replay: Annotated[str, typer.Option("--case", help="SEED:N, that case alone.")] = "",
    record: Annotated[Path | None, typer.Option(help="A JSON file to which the campaign is added.")] = None,
) -> None:
    """Random calls against the oracle. Case N of a seed is the same everywhere; failures print as test cases."""
    if backend not in BACKENDS:
        raise typer.BadParameter(f"{backend!r}: one of {', '.join(BACKENDS)}", param_hint="--backend")
    if replay:
        raise typer.Exit(_replay(replay, backend, shrink))
    result = _run(backend, seed, cases, first, jobs, threads, time, shrink)
    summary = f"{result.cases} cases of {result.groups} kernels, {len(result.failures)} failed"
    _console.print(f"{backend}, seed {seed}: {summary}, {result.seconds:.0f} s")
    if record is not None:
        _add(record, result, first)
    raise typer.Exit(1 if result.failures else 0)


def _run(
    backend: str, seed: int, cases: int, first: int, jobs: int, threads: int, seconds: float, shrinking: float
) -> campaign.Result:  # fmt: skip
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeElapsedColumn())
    with Progress(*columns, console=_console) as bar:
        task, shown = bar.add_task("cases", total=cases, failed=0), 0

        def progress(result: campaign.Result) -> None:
            nonlocal shown
            for failure in result.failures[shown:]:
                print(failure, flush=True)
            shown = len(result.failures)
            bar.update(task, completed=result.cases, failed=shown)
            if not _console.is_terminal and result.groups % 50 == 0:
                _console.print(f"{result.cases} of {cases} cases, {shown} failed, {result.seconds:.0f} s")

        return campaign.run(
            backend,
            seed,
            cases,
            first=first,
            jobs=jobs,
            threads=threads,
            seconds=seconds,
            shrinking=shrinking,
            progress=progress,
        )


def _replay(which: str, backend: str, shrinking: float) -> int:
    seed, _, number = which.partition(":")
    if not (seed.isdigit() and number.isdigit()):
        raise typer.BadParameter(f"{which!r}: SEED:N, such as 0:17", param_hint="--case")
    print(case(int(seed), int(number)))
    campaign.prepare(backend)
    with override(cache_dir=_cache()):
        message = campaign.run_case(case(int(seed), int(number)), backend)
        if message and shrinking:
            print(campaign.shrunk(int(seed), int(number), message, backend, shrinking))
    _console.print(message or "as the oracle says")
    return 1 if message else 0


def _cache() -> Path:
    import atexit
    import shutil
    import tempfile

    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _version() -> str:
    try:
        return importlib.metadata.version("spgen")
    except importlib.metadata.PackageNotFoundError:
        return "a checkout"


def _add(record: Path, result: campaign.Result, first: int) -> None:
    """Adds a campaign to a record; how failures were resolved is written by hand."""
    entry: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "version": _version(),
        "backend": result.backend, "seed": result.seed, "first": first, "cases": result.cases,
        "kernels": result.groups, "failed": [failure.number for failure in result.failures],
    }  # fmt: skip
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"campaigns": [], "failures": []}
    known["campaigns"].append(entry)
    record.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
