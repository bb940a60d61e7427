"""Commands about one pattern: explain, compile."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from spgen.cli.options import CallOptions, Pattern, with_call


@with_call
def explain(
    pattern: Pattern,
    call: CallOptions,
    ir: Annotated[bool, typer.Option("--ir", help="Show the IR of all three levels.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Show the kernel's source.")] = False,
) -> None:
    """Say what a pattern costs, which kernel serves it, and why."""
    from spgen.explain import explain_text

    print(explain_text(pattern, **asdict(call), ir=ir, source=source))


@with_call
def compile_pattern(pattern: Pattern, call: CallOptions) -> None:
    """Compile a pattern's kernel into the cache, so that the first call finds it there."""
    from spgen.precompile import compile_text

    print(compile_text(pattern, **asdict(call)))
