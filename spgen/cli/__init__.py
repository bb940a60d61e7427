"""The command `spgen`.

Only what a command needs is imported, inside the command: `spgen --help` answers without torch.
"""

from __future__ import annotations

import typer

from spgen.cli import autotune, bench, cache, ir, machine, patterns
from spgen.errors import SpgenError

app = typer.Typer(
    name="spgen",
    help="A compiler for sparsity patterns: declare which pairs matter, get the kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(patterns.explain)
app.command("compile")(patterns.compile_pattern)
app.command()(patterns.show)
app.command()(ir.opt)
app.command()(autotune.autotune)
app.command()(bench.bench)
app.add_typer(cache.app, name="cache")
app.command()(machine.doctor)


def main() -> None:
    """Run the command; an error of spgen's own is shown without a traceback, with exit code 2."""
    try:
        app()
    except SpgenError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(str(error), style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None
