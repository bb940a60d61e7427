"""The command that measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spgen.errors import SpgenError

if TYPE_CHECKING:
    from spgen.bench.result import Result


def bench(
    suite: Annotated[
        str | None,
        typer.Argument(help="attention, mlp (on a GPU), cpu or mlp-cpu; by default attention on this machine."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and repeats, to see that it works.")] = False,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.", metavar="TEXT")] = "",
    peers: Annotated[str, typer.Option(help="Whom to measure beside spgen: some of the suite's, all or none.")] = "all",
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result, into a .png or .svg.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Say what became faster or slower since this result.", metavar="OLD.json")
    ] = None,
    compare_anyway: Annotated[
        bool, typer.Option("--compare-anyway", help="Also with another suite's or another machine's result.")
    ] = False,
    take: Annotated[
        Path | None, typer.Option("--from", help="Take this result instead of measuring.", metavar="NEW.json")
    ] = None,
) -> None:
    """Measure ours, the peers, dense and the floor side by side, and check all against the oracle.

    Exit codes: 0; 1 if with --compare spgen became slower somewhere, or if a result of spgen was wrong; 2 for an error.
    """
    from spgen.bench import compare as comparing
    from spgen.bench import plot as plotting
    from spgen.bench import report
    from spgen.bench.result import check_writable, read, write

    given = {"SUITE": suite, "--quick": quick, "--only": only, "--peers": peers != "all"}
    if take is not None and any(given.values()):
        beside = next(name for name, value in given.items() if value)
        raise SpgenError(
            "--from", given=f"{beside} beside it", allowed="--json, --plot and --compare: nothing is measured"
        )
    old = None if compare is None else read(compare)
    result = None if take is None else read(take)
    for path in filter(None, (json, plot)):
        check_writable(path)
    if plot is not None:
        plotting.check(plot)
    if old is not None and not compare_anyway:
        comparing.check(str(compare), old, *_measured(result, suite))
    if result is None:
        result = _run(suite, quick, only, peers)
    if json is not None:
        write(result, json)
    report.show(result)
    if plot is not None:
        plotting.save(result, plot)
    slower = False
    if old is not None:
        found = comparing.compare(old, result)
        comparing.show(found)
        slower = bool(found.regressions)
    raise typer.Exit(1 if slower or result.failures else 0)


def _measured(result: Result | None, suite: str | None) -> tuple[str, dict[str, object]]:
    """Suite and hardware of the result, or of what is about to be measured."""
    if result is not None:
        return result.suite, result.hardware
    from spgen.bench.machine import hardware
    from spgen.bench.suites import find

    found = find(suite)
    return found.name, hardware(found.device)


def _run(suite: str | None, quick: bool, only: str, peers: str) -> Result:
    from rich.console import Console

    from spgen.bench.peers import chosen
    from spgen.bench.runner import run
    from spgen.bench.suites import find

    names = chosen(peers, find(suite).peers)
    with Console(stderr=True).status("measuring") as status:
        return run(suite, quick=quick, only=only, peers=names, progress=lambda case: status.update(f"measuring {case}"))
