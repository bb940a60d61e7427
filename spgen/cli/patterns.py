"""Commands about one pattern: explain, compile, show."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spgen.cli.options import CallOptions, DataOptions, Pattern, with_groups
from spgen.errors import ShapeError


@with_groups
def explain(
    pattern: Pattern,
    call: CallOptions,
    data: DataOptions,
    ir: Annotated[bool, typer.Option("--ir", help="Show the IR of all three levels.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Show the kernel's source.")] = False,
) -> None:
    """Say what a pattern costs, which kernel serves it, and why.

    What depends on the data of a pattern with slots is told with --random or --data.
    """
    from spgen.explain import explain_text

    print(explain_text(pattern, **asdict(call), data=data.tensors(pattern, call), ir=ir, source=source))


@with_groups
def compile_pattern(pattern: Pattern, call: CallOptions) -> None:
    """Compile a pattern's kernel into the cache, so that the first call finds it there."""
    from spgen.precompile import compile_text

    print(compile_text(pattern, **asdict(call)))


@with_groups
def show(
    pattern: Pattern,
    call: CallOptions,
    data: DataOptions,
    head: Annotated[int, typer.Option(min=0, help="The query head to draw.")] = 0,
    heads: Annotated[bool, typer.Option("--heads", help="Draw every query head.")] = False,
    sequence: Annotated[int, typer.Option(min=0, help="The sequence of the batch to draw.")] = 0,
    tiles: Annotated[bool, typer.Option("--tiles", help="Draw the tiles that the target's kernel walks.")] = False,
    tile_size: Annotated[
        str | None, typer.Option(help="The same for tiles of another size: rows x keys.", metavar="MxN")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw into this file instead: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Draw a pattern in the terminal, or into a file.

    Each cell shows its share of pairs. A pattern with data slots, such as 'block(64, mask=$0: bool[R, C])', needs
    --random or one --data for each slot.
    """
    import spgen as sp

    batch, q_heads, q_len, head_dim = call.q_shape
    picture = sp.show(
        sp.pattern(pattern, *data.tensors(pattern, call)),
        q_len,
        call.kv_len,
        q_heads=q_heads,
        kv_heads=call.kv_heads,
        batch=batch,
        head=head,
        heads=heads,
        sequence=sequence,
        tiles=tiles if tile_size is None else _tile_size(tile_size),
        target=call.target,
        dtype=call.dtype,
        head_dim=head_dim,
        value_dim=call.v_dim,
    )
    if output is not None:
        picture.save(output)
        print(output)
        return
    from rich.console import Console

    Console().print(picture)


def _tile_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise ShapeError("--tile-size", given=repr(text), allowed="ROWSxKEYS", remedy="for example --tile-size 64x64")
    return int(match[1]), int(match[2])
