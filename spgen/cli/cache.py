"""Commands about the compiled kernels kept on this machine."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spgen.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spgen.cache.entry import Entry

app = typer.Typer(help="The compiled kernels kept on this machine.", no_args_is_help=True)

_UNITS = {
    "bytes": ("500MB", {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}),
    "seconds": ("30d", {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}),
}


@app.command("list")
def list_entries() -> None:
    """Show every compiled kernel: its key, size, days since its last use, and what it was compiled for."""
    from spgen.cache import Cache

    cache = Cache()
    _print(list(cache.entries()), cache.directory)


@app.command()
def size() -> None:
    """Say how much the cache takes."""
    from spgen.cache import Cache

    cache = Cache()
    print(f"{_bytes(cache.size())} in {cache.directory}")


@app.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(help="Remove what was not used for so long: 30d, 12h, 2w. Known to a day.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Then remove what was used least recently until this is left: 500MB, 2GB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove kernels that were not used for long, and what damaged or killed processes left; also while others work."""
    from spgen.cache import Cache

    cache = Cache()
    gone = cache.prune(
        unused_for=None if older_than is None else _number("--older-than", older_than, "seconds"),
        max_bytes=None if max_size is None else _number("--max-size", max_size, "bytes"),
        dry_run=dry_run,
    )
    if dry_run:
        _print(gone, cache.directory)
    else:
        print(f"removed {_count(gone)} from {cache.directory}")


@app.command("export")
def export_entries(
    file: Annotated[Path, typer.Argument(help="The archive to write, a tar.")],
    key: Annotated[list[str] | None, typer.Option(help="Only the kernel whose key starts so; repeatable.")] = None,
    target: Annotated[str | None, typer.Option(help="Without kernels for others: sm_90, cpu:x86-64-v3.")] = None,
) -> None:
    """Write compiled kernels to one file, for another machine; equal kernels give equal files."""
    from spgen.cache import Cache
    from spgen.cache.archive import export_archive

    print(f"wrote {_count(export_archive(Cache(), file, keys=key or (), target=target))} to {file}")


@app.command("import")
def import_entries(file: Annotated[Path, typer.Argument(help="An archive that `spgen cache export` wrote.")]) -> None:
    """Keep the kernels of an archive that are not here yet. Kernels are code: import what you would run."""
    from spgen.cache import Cache
    from spgen.cache.archive import import_archive

    cache = Cache()
    found = import_archive(cache, file)
    print(f"added {_count(found.added)} to {cache.directory}; {len(found.present)} there already")


@app.command()
def clear() -> None:
    """Remove every compiled kernel; they are compiled again when needed."""
    from spgen.cache import Cache

    cache = Cache()
    print(f"removed {_count(range(cache.clear()))} from {cache.directory}")


def _print(entries: Sequence[Entry], directory: Path) -> None:
    for entry in entries:
        days = max(0, round((time.time() - entry.used) / 86400))
        # a kernel's text is long, and is in its manifest
        noted = "  ".join(f"{name}={value}" for name, value in sorted(entry.meta.items()) if len(str(value)) < 40)
        print(f"{entry.key[:12]}  {_bytes(entry.size):>9}  {days:>4} d  {noted}")
    print(f"{_count(entries)} in {directory}, {_bytes(sum(entry.size for entry in entries))}")


def _number(option: str, text: str, of: str) -> int:
    """Bytes or seconds of a number with a unit."""
    example, units = _UNITS[of]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if match is None or match[2] not in units:
        allowed = f"a number and one of {', '.join(units)}"
        raise CacheError(option, given=repr(text), allowed=allowed, remedy=f"for example {example}")
    return round(float(match[1]) * units[match[2]])


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _count(entries: Sequence[object]) -> str:
    return "1 kernel" if len(entries) == 1 else f"{len(entries)} kernels"
