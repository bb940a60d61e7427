"""One entry of the cache: a directory with the files that were built and a manifest of their sizes and digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
_USE_NOTED = 24 * 3600.0  # how exactly the last use of an entry is known, in seconds


class Damaged(Exception):
    """An entry is there and cannot be used; the text says why."""


@dataclass(frozen=True)
class Entry:
    """One cached kernel: key, directory, bytes of its files, last use (a Unix time, to a day) and what was noted."""

    key: str
    path: Path
    size: int
    used: float
    meta: Mapping[str, Any]


def read(path: Path) -> Entry:
    """The entry at `path`; raises FileNotFoundError or Damaged as `check` does."""
    manifest = check(path)
    size = sum(size for size, _ in manifest["files"].values())
    return Entry(path.name, path, size, Path(path, MANIFEST).stat().st_mtime, manifest["meta"])


def check(path: Path, *, contents: bool = False) -> dict[str, Any]:
    """The manifest of a sound entry; FileNotFoundError if there is none, Damaged if it cannot be trusted.

    Sizes are always compared, digests with `contents` only.
    """
    with contextlib.suppress(Damaged):
        return _check_once(path, contents)
    while True:  # is it damaged, or did another process remove or replace it between two looks?
        identity = path.stat().st_ino
        try:
            return _check_once(path, contents)
        except Damaged:
            if path.stat().st_ino == identity:
                raise


def _check_once(path: Path, contents: bool) -> dict[str, Any]:
    try:
        text = Path(path, MANIFEST).read_bytes()
    except FileNotFoundError:
        if path.is_dir():
            raise Damaged("it has no manifest") from None
        raise
    manifest = _parse(text)
    for name, (size, digest) in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        _compare(name, found, size)
        if contents and _digest((path / name).read_bytes()) != digest:
            raise Damaged(f"{name} has changed")
    return manifest


def is_sound(path: Path) -> bool:
    """Whether `check` passes."""
    try:
        check(path)
    except (OSError, Damaged):
        return False
    return True


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of an entry's files by name, the manifest first; Damaged unless they are as they were built."""
    files = {MANIFEST: Path(path, MANIFEST).read_bytes()}
    for name in sorted(_parse(files[MANIFEST])["files"]):
        files[name] = (path / name).read_bytes()
    check_contents(files)
    return files


def check_contents(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest of an entry in memory; Damaged unless it lists exactly these files, with these bytes.

    Names that would lead out of an entry's directory are refused.
    """
    manifest = _parse(files.get(MANIFEST, b""))
    listed = manifest["files"]
    strange = sorted(set(listed) ^ (set(files) - {MANIFEST}))
    if strange:
        raise Damaged(f"{strange[0]} is {'missing' if strange[0] in listed else 'not in the manifest'}")
    for name, (size, digest) in listed.items():
        if not _is_inside(name):
            raise Damaged(f"the file name {name!r} leads out of the entry")
        _compare(name, len(files[name]), size)
        if _digest(files[name]) != digest:
            raise Damaged(f"{name} has changed")
    return manifest


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts and not set(name) & set("\\:\0")


def _parse(text: bytes) -> dict[str, Any]:
    try:
        manifest = dict(json.loads(text))
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in manifest["files"].items()]
        found, meta = manifest["format"], dict(manifest["meta"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged("its manifest cannot be read") from None
    if found != FORMAT:
        raise Damaged(f"it has format {found}, this version reads {FORMAT}")
    return {"format": found, "files": {name: (size, digest) for name, size, digest in files}, "meta": meta}


def _compare(name: str, found: int, size: int) -> None:
    if found != size:
        raise Damaged(f"{name} has {found} bytes instead of {size}")


def note_use(path: Path) -> None:
    """Touch the manifest if that was not done for a day."""
    manifest = Path(path, MANIFEST)
    with contextlib.suppress(OSError):
        if time.time() - manifest.stat().st_mtime > _USE_NOTED:
            os.utime(manifest)


def write(path: Path, build: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
    """Build beside `path`, then rename: `path` is complete or not there."""
    directory = Path(tempfile.mkdtemp(prefix=f"tmp-{path.name}-", dir=path.parent))
    try:
        build(directory)
        _seal(directory, meta)
        discard(path)
        directory.rename(path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # gone already if all went well
    return path


def _seal(directory: Path, meta: Mapping[str, Any]) -> None:
    """Write the manifest of the files that are there."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    listed = {}
    for file in files:
        content = file.read_bytes()
        listed[file.relative_to(directory).as_posix()] = (len(content), _digest(content))
    manifest = {"format": FORMAT, "files": listed, "meta": dict(meta)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def discard(path: Path) -> bool:
    """Remove an entry at one stroke, for whoever looks; False if there was none."""
    away = path.with_name(f"tmp-{os.urandom(8).hex()}")
    try:
        path.rename(away)
    except (FileNotFoundError, NotADirectoryError):
        return False
    shutil.rmtree(away, ignore_errors=True)
    return True
