"""The command `spgen`: explain, compile, cache, doctor.

Only what a command needs is imported, inside the command: `spgen --help` answers without torch.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from spgen.errors import ShapeError, SpgenError

app = typer.Typer(
    name="spgen",
    help="A compiler for sparsity patterns: declare which pairs matter, get the kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="The compiled kernels kept on this machine.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

Pattern = Annotated[str, typer.Argument(help="A pattern as Python writes it: 'causal() & (sink(64) | window(1024))'.")]
Q = Annotated[str, typer.Option("--q", help="Shape of q: batch x query heads x rows x head dim.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Heads of k and v; as many as q's if left out.")]
KvLength = Annotated[int | None, typer.Option(min=0, help="Keys; as many as q's rows if left out.")]
VDim = Annotated[int | None, typer.Option(min=1, help="Head dim of v; that of q if left out.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
TargetName = Annotated[str, typer.Option("--target", help="cpu, cuda, or an architecture: sm_90, gfx942.")]


@app.command()
def explain(
    pattern: Pattern,
    q: Q = "1x8x4096x64",
    kv_heads: KvHeads = None,
    kv_length: KvLength = None,
    v_dim: VDim = None,
    dtype: Dtype = "float32",
    target: TargetName = "cpu",
    ir: Annotated[bool, typer.Option("--ir", help="Show the IR of all three levels.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Show the kernel's source.")] = False,
) -> None:
    """Say what a pattern costs, which kernel serves it, and why."""
    from spgen.explain import explain_text

    shape = _shape(q)
    text = explain_text(
        pattern,
        q_shape=shape,
        kv_heads=kv_heads or shape[1],
        kv_len=shape[2] if kv_length is None else kv_length,
        v_dim=v_dim or shape[3],
        dtype=dtype,
        target=target,
        ir=ir,
        source=source,
    )
    print(text)


@app.command("compile")
def compile_pattern(
    pattern: Pattern,
    q: Q = "1x8x4096x64",
    kv_heads: KvHeads = None,
    kv_length: KvLength = None,
    v_dim: VDim = None,
    dtype: Dtype = "float32",
    target: TargetName = "cpu",
) -> None:
    """Compile a pattern's kernel into the cache, so that the first call finds it there."""
    from spgen.precompile import compile_text

    shape = _shape(q)
    path = compile_text(
        pattern,
        q_shape=shape,
        kv_heads=kv_heads or shape[1],
        kv_len=shape[2] if kv_length is None else kv_length,
        v_dim=v_dim or shape[3],
        dtype=dtype,
        target=target,
    )
    print(path)


class Suite(str, Enum):
    """The benchmarks."""

    cpu_attention = "cpu-attention"
    gpu_attention = "gpu-attention"


@app.command()
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


@cache_app.command("list")
def cache_list() -> None:
    """Show every compiled kernel: its key, size and what it was compiled from."""
    from spgen.cache import Cache

    entries = list(Cache().entries())
    for entry in entries:
        noted = "  ".join(f"{name}={value}" for name, value in sorted(entry.meta.items()))
        print(f"{entry.key[:12]}  {_bytes(entry.size):>9}  {noted}")
    print(f"{_count(len(entries), 'kernel')} in {Cache().directory}")


@cache_app.command("size")
def cache_size() -> None:
    """Say how much the cache takes."""
    from spgen.cache import Cache

    cache = Cache()
    print(f"{_bytes(cache.size())} in {cache.directory}")


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove every compiled kernel; they are compiled again when needed."""
    from spgen.cache import Cache

    cache = Cache()
    print(f"removed {_count(cache.clear(), 'kernel')} from {cache.directory}")


@app.command()
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


def main() -> None:
    """Run the command; an error of spgen's own is shown without a traceback, with exit code 2."""
    try:
        app()
    except SpgenError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(str(error), style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = [int(size) for size in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\d+(x\d+){3}", text) or 0 in (sizes[0], sizes[1], sizes[3]):
        raise ShapeError(
            "--q",
            given=repr(text),
            allowed="BxHxLxD: batch, query heads, rows and head dim",
            remedy="for example --q 1x8x4096x64",
        )
    batch, heads, rows, dim = sizes
    return batch, heads, rows, dim


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
