"""Commands about this machine: doctor, bench."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spgen.doctor import Backend, Finding


class Suite(str, Enum):
    """The benchmarks."""

    cpu_attention = "cpu-attention"
    gpu_attention = "gpu-attention"
    gpu_patterns = "gpu-patterns"


def bench(
    suite: Annotated[Suite | None, typer.Argument(help="Which; by default the one for this machine.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few repeats, to see that it works.")] = False,
) -> None:
    """Measure ours, the peers, dense and the floor side by side, and check all against the oracle."""
    from spgen.bench import run
    from spgen.bench.report import show, write

    result = run(None if suite is None else suite.value, quick)
    show(result)
    if json is not None:
        write(result, json)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="For programs: the same as JSON.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Also compile, launch and check a small kernel.")] = False,
) -> None:
    """Say what this machine offers, what is missing and how to get it.

    Exit codes: 0 if a backend is ready, 1 if none is (or, with --run, if a kernel fails), 2 for an error.
    """
    from spgen.doctor import backends, findings, report

    found = findings(run=run)
    verdicts = backends(found)
    if json:
        from json import dumps

        print(dumps(report(found), indent=1))
    else:
        _show(found, verdicts)
    failed = any(not item.present and item.name.endswith(" kernel") for item in found)
    raise typer.Exit(0 if any(backend.ready for backend in verdicts) and not failed else 1)


def _show(found: list[Finding], verdicts: list[Backend]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for item in found:
        mark = "[green]✓[/]" if item.present else "[dim]–[/]" if item.optional else "[yellow]✗[/]"
        table.add_row(mark, item.name, escape(item.found))
        if item.remedy:
            table.add_row("", "", f"[dim]{escape(item.remedy if item.present else f'to get it: {item.remedy}')}[/]")
    console = Console(highlight=False)
    console.print(table)
    for backend in verdicts:
        verdict = "[green]ready[/]" if backend.ready else f"[yellow]needs {', '.join(backend.missing)}[/]"
        console.print(f"{backend.name}: {verdict}")
