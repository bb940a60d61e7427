"""Commands about this machine: doctor, bench."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Suite(str, Enum):
    """The benchmarks."""

    cpu_attention = "cpu-attention"
    gpu_attention = "gpu-attention"


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


def doctor() -> None:
    """Say what this machine offers, what is missing and how to get it; exit code 1 if no backend is ready."""
    from rich.console import Console
    from rich.table import Table

    from spgen.doctor import backends, findings

    found = findings()
    table = Table.grid(padding=(0, 2))
    for item in found:
        table.add_row("[green]✓[/]" if item.present else "[yellow]–[/]", item.name, item.found)
        if item.remedy:
            table.add_row("", "", f"[dim]to get it: {item.remedy}[/]")
    console = Console(highlight=False)
    console.print(table)
    ready = backends(found)
    for backend in ready:
        verdict = "[green]ready[/]" if backend.ready else f"[yellow]needs {', '.join(backend.missing)}[/]"
        console.print(f"{backend.name}: {verdict}")
    raise typer.Exit(0 if any(backend.ready for backend in ready) else 1)
