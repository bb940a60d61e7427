"""Entries of the cache in one file, to take them from machine to machine: `spgen cache export` and `import`.

A plain tar, the same bytes for the same entries: a header, each entry's manifest and files by key and name, an end::

    spgen-cache.json        {"format": 1}
    3f9a…/manifest.json
    3f9a…/kernel.so
    end.json                {"entries": 1}

Reading trusts nothing but the digests: only regular files that a manifest lists are taken, and all of the archive is
checked before any of it is kept. The kernels themselves are code: take archives from those only whose code you run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spgen.cache import Cache
from spgen.cache.entry import MANIFEST, Damaged, Entry, check_contents, contents
from spgen.errors import CacheError

FORMAT = 1
_HEADER, _END = "spgen-cache.json", "end.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_REMEDY = "make it again with `spgen cache export`"


@dataclass(frozen=True)
class Imported:
    """The keys that an archive brought, and those that were there already."""

    added: tuple[str, ...]
    present: tuple[str, ...]


def export_archive(cache: Cache, file: Path, *, keys: Sequence[str] = (), target: str | None = None) -> list[Entry]:
    """Write entries to `file`: all, or those whose keys start as one of `keys`; returns them.

    `target`, as in `cuda:sm_90` or `sm_90`, leaves out what was compiled for other targets. The file appears when it is
    complete. Raises CacheError for a key that no entry has or several have, and for a file that cannot be written.
    """
    chosen = [entry for entry in _chosen(cache, keys) if _serves(entry, target)]
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                written = _write(out, chosen)
            os.replace(partial, file)  # noqa: PTH105  mkstemp gives a string
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)  # noqa: PTH108
    except OSError as fault:
        raise CacheError(
            str(file), given=fault.strerror or str(fault), allowed="a file that can be written",
            remedy="choose another place, or free some space",
        ) from fault  # fmt: skip
    return written


def import_archive(cache: Cache, file: Path) -> Imported:
    """Keep the entries of an archive; those that are there already stay as they are.

    Other processes may use the cache meanwhile. Raises CacheError, and keeps nothing, for a file that cannot be read,
    is damaged or incomplete, has another format, or holds anything but entries.
    """
    for _ in _entries(file):
        pass
    added: list[str] = []
    present: list[str] = []
    for key, files, meta in _entries(file):
        (added if cache.keep(key, _unpacker(files), meta=meta) else present).append(key)
    return Imported(tuple(added), tuple(present))


def _chosen(cache: Cache, keys: Sequence[str]) -> list[Entry]:
    entries = list(cache.entries())
    if not keys:
        return entries
    found = {}
    for key in keys:
        matching = [entry for entry in entries if entry.key.startswith(key)]
        if len(matching) != 1:
            raise CacheError(
                f"key {key!r}", given=f"{len(matching)} entries that start so", allowed="the start of one entry's key",
                remedy="`spgen cache list` shows them",
            )  # fmt: skip
        found[matching[0].key] = matching[0]
    return [found[key] for key in sorted(found)]


def _serves(entry: Entry, target: str | None) -> bool:
    """What was compiled for no target in particular serves all."""
    own = entry.meta.get("target")
    return target is None or own is None or target in (own, str(own).partition(":")[2])


def _write(out: BinaryIO, entries: Sequence[Entry]) -> list[Entry]:
    written = []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, _HEADER, json.dumps({"format": FORMAT}).encode())
        for entry in entries:
            with contextlib.suppress(FileNotFoundError, Damaged):  # it has gone since, or is to be rebuilt
                files = contents(entry.path)
                for name, content in files.items():
                    _add(archive, f"{entry.key}/{name}", content)
                written.append(entry)
        _add(archive, _END, json.dumps({"entries": len(written)}).encode())
    return written


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its owner is 0 and its time 1970: nothing of this machine
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _unpacker(files: dict[str, bytes]) -> Callable[[Path], None]:
    def unpack(directory: Path) -> None:
        for name, content in files.items():
            if name != MANIFEST:
                path = directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    return unpack


def _entries(file: Path) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """(key, files, meta) of each entry, checked one by one; raises CacheError, naming the file."""

    def refuse(given: str, remedy: str = _REMEDY) -> CacheError:
        return CacheError(str(file), given=given, allowed="an archive made by `spgen cache export`", remedy=remedy)

    seen: set[str] = set()
    try:
        with tarfile.open(file, mode="r:") as archive:
            members = _members(archive)
            _check_header(*next(members, ("", b"")))
            for key, files in _grouped(members):
                if key in seen:
                    raise Damaged(f"the entry {key[:12]} is there twice")
                seen.add(key)
                try:
                    yield key, files, check_contents(files)["meta"]
                except Damaged as fault:
                    raise Damaged(f"the entry {key[:12]} is damaged: {fault}") from None
    except _OtherFormat as fault:
        raise refuse(str(fault), "import it with the version of spgen that made it, or make it again") from None
    except Damaged as fault:
        raise refuse(str(fault)) from None
    except (tarfile.TarError, EOFError, ValueError) as fault:
        raise refuse(f"a file that cannot be read ({fault})") from fault
    except FileNotFoundError:
        raise refuse("no such file", "check the name") from None
    except OSError as fault:
        raise refuse(fault.strerror or str(fault), "check that the file can be read") from fault


class _OtherFormat(Exception):
    """An archive of another version."""


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the members, in order; Damaged for anything but plain files."""
    for member in archive:
        if member.type != tarfile.REGTYPE or member.issparse():
            raise Damaged(f"{member.name!r} is no plain file")
        stream = archive.extractfile(member)
        content = stream.read() if stream else b""
        if len(content) != member.size:
            raise Damaged(f"it ends in the middle of {member.name!r}")
        yield member.name, content


def _check_header(name: str, content: bytes) -> None:
    if name != _HEADER:
        raise Damaged(f"a tar that starts with {name!r} instead of {_HEADER!r}" if name else "an empty tar")
    found = _field(content, "format")
    if found != FORMAT:
        raise _OtherFormat(f"format {found}; this version reads {FORMAT}")


def _field(content: bytes, name: str) -> object:
    try:
        return dict(json.loads(content))[name]
    except (ValueError, TypeError, KeyError):
        raise Damaged(f"{name!r} cannot be read") from None


def _grouped(members: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The files of each entry; its members follow one another, and the end counts them."""
    key, files, count = "", dict[str, bytes](), 0
    for path, content in members:
        folder, _, name = path.partition("/")
        if path != _END and not (_KEY.fullmatch(folder) and name):
            raise Damaged(f"{path!r} belongs to no entry")
        if folder != key:
            if files:
                yield key, files
            if path == _END:
                break
            key, files, count = folder, {}, count + 1
        if name in files:
            raise Damaged(f"{path!r} is there twice")
        files[name] = content
    else:
        raise Damaged("it is incomplete: the end is missing")
    if _field(content, "entries") != count:
        raise Damaged(f"it is incomplete: {count} entries of {_field(content, 'entries')}")
    for path, _ in members:
        raise Damaged(f"{path!r} stands behind the end")
