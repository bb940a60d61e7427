"""Commands about this machine: doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spgen.doctor import Backend, Finding


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
