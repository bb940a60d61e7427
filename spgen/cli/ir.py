"""The command about the IR: opt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spgen.errors import SpgenError, TextError

if TYPE_CHECKING:
    from spgen.ir.node import Op


def opt(
    file: Annotated[Path | None, typer.Argument(help="A pattern or IR text; standard input if left out or -.")] = None,
    passes: Annotated[
        str, typer.Option("--passes", "-p", help="What to run: 'desugar,normalize,…,tile{block_m=64,kv_heads=2}'.")
    ] = "",
    list_passes: Annotated[bool, typer.Option("--list-passes", help="Show the passes and their options.")] = False,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Print nothing but errors.")] = False,
    print_after_all: Annotated[
        bool, typer.Option("--print-after-all", help="Show what every pass makes, on standard error.")
    ] = False,
) -> None:
    """Run passes on a pattern or on IR text of any level: verify, rewrite, verify, print."""
    from spgen import opt as driver

    if list_passes:
        print(_listed())
        return
    after = _print_after if print_after_all else lambda name, op: None
    text = _read(file)
    try:
        op = driver.run(text, passes, after)
    except TextError as error:
        name = "--passes" if error.text == passes else str(file or "-")
        error.subject = f"{name}:{error.line}:{error.column}: {error.subject}"
        raise
    if not verify_only:
        print(op, end="")


def _listed() -> str:
    """The passes in order, by the level that they read."""
    from spgen import opt as driver
    from spgen.compile import LEVEL_1

    lines = []
    for number, level in enumerate(driver.LEVELS, 1):
        lines.append(f"level {number}, {level}:")
        for one in driver.passes().values():
            if one.level == level:
                lines.append(f"  {one.name:<18} {one.summary}")
                lines += [f"      {name}={_option(value)}" for name, value in one.options.items()]
    return "\n".join([*lines, f"level_1 stands for {','.join(one.__name__ for one in LEVEL_1)}"])


def _option(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "[]" if value == () else str(value)


def _print_after(name: str, op: Op) -> None:
    print(f"// ----- after {name} -----\n{op}", file=sys.stderr, end="")


def _read(file: Path | None) -> str:
    if file is None or str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "not a text file"
        raise SpgenError(
            str(file), given=str(reason).lower(), remedy="check the name, or pass the text to `spgen opt -`"
        ) from fault
