"""The disk cache of compiled kernels: content-addressed, written once, checked at every read.

An entry is a directory named by its key. It holds the files that `build` wrote and a manifest::

    ~/.cache/spgen/v1/3f/3f9a…/kernel.so
                               manifest.json   {"format": 1, "files": {"kernel.so": [size, sha256]}, "meta": {…}}

The life of an entry, whichever process gets there first: look → lock → look again → build in a temporary
directory beside it → manifest → rename. So an entry is complete or absent, never half there.

- A damaged entry, or one of another format, is rebuilt with a `CacheWarning`; it goes when its successor is ready.
- Where the directory cannot be written (read-only, full), kernels are built for this process alone, with a warning.
- A directory that others can write is refused: whoever can put a kernel there runs code as this user.

The warm path is one read and a `stat` per file; neither the lock nor platformdirs is imported for it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spgen.errors import CacheError, CacheWarning
from spgen.settings import cache_home, settings

FORMAT = 1
_MANIFEST = "manifest.json"
_ABANDONED = 24 * 3600.0  # seconds after which a temporary directory can only be a crash's
_KEY_LENGTH = 64

# what a disk says that cannot be written; every other OSError belongs to `build`
_DISK_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
    if hasattr(errno, name)
}


class _Damaged(Exception):
    """An entry is there and cannot be used; the text says why."""


@dataclass(frozen=True)
class Entry:
    """One cached kernel: its key, its directory, the bytes of its files and what was noted about it."""

    key: str
    path: Path
    size: int
    meta: Mapping[str, Any]


def key(**fields: object) -> str:
    """The name of what is made from these fields alone: sha256 of their canonical JSON.

    Values are JSON values (a tuple counts as a list); anything else is a TypeError, since its text might change
    from one process to the next.
    """
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def default_directory() -> Path:
    """`SPGEN_CACHE_DIR`, else the user's cache directory of this system."""
    chosen = settings().cache_dir
    if chosen is not None:
        return chosen
    if not sys.platform.startswith("linux"):  # there platformdirs would say the same, a few milliseconds later
        with contextlib.suppress(ImportError):
            import platformdirs

            return Path(platformdirs.user_cache_dir("spgen", appauthor=False))
    return cache_home() / "spgen"


class Cache:
    """The entries below one directory (default: `default_directory()`), shared by any number of processes."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()
        self._root = self.directory / f"v{FORMAT}"
        self._trusted = False
        self._private = _PrivateEntries()

    def get(self, key: str) -> Path | None:
        """The directory of a sound entry, or None. A damaged entry counts as absent, with a warning."""
        path = self._path(key)
        try:
            _check(path)
        except (FileNotFoundError, NotADirectoryError):
            return self._private.get(key)
        except (OSError, _Damaged) as fault:
            _warn(f"the entry {key[:12]} of {self.directory} is damaged ({fault}); it will be rebuilt")
            return self._private.get(key)
        self._check_trust()
        return path

    def get_or_build(self, key: str, build: Callable[[Path], None], *, meta: Mapping[str, Any]) -> Path:
        """The entry's directory; where there is none, `build(directory)` writes its files first.

        `meta` (JSON values) goes to the manifest, for people and for `spgen cache`. One process at a time builds
        an entry; the others wait and use its result. An exception of `build` passes through and leaves nothing.
        Raises CacheError for a directory that others can write.
        """
        return self.get(key) or self._build(key, build, meta)

    def invalidate(self, key: str, reason: str) -> bool:
        """Call it when an entry of the right sizes does not load; True if its contents were indeed damaged.

        With True the entry is gone and building again will help; with False the files are as they were built,
        and the fault lies elsewhere.
        """
        path = self._path(key)
        try:
            _check(path, contents=True)
        except (OSError, _Damaged) as fault:
            _warn(f"the entry {key[:12]} of {self.directory} is damaged ({reason}: {fault}); it will be rebuilt")
            with contextlib.suppress(OSError):
                _discard(path)
            return True
        return False

    def entries(self) -> Iterator[Entry]:
        """All sound entries, in the order of their keys."""
        for path in self._paths():
            with contextlib.suppress(OSError, _Damaged):
                manifest = _check(path)
                size = sum(size for size, _ in manifest["files"].values())
                yield Entry(path.name, path, size, manifest["meta"])

    def size(self) -> int:
        """Bytes of all that spgen keeps here, abandoned and old entries included."""
        files = (file for generation in self._generations() for file in generation.rglob("*"))
        return sum(file.stat().st_size for file in files if file.is_file())

    def clear(self) -> int:
        """Remove the entries of every format; returns how many there were of this one."""
        count = sum(1 for _ in self._paths())
        for generation in self._generations():
            shutil.rmtree(generation, ignore_errors=True)
        return count

    def fault(self) -> str:
        """Why new kernels cannot be kept here, or an empty text; tried, not guessed.

        Raises CacheError for a directory that others can write.
        """
        try:
            self._prepare(self._root)
            with tempfile.TemporaryFile(dir=self._root) as file:
                file.write(bytes(4096))
        except OSError as fault:
            return fault.strerror or str(fault)
        return ""

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / key

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._root.glob("??/*") if len(path.name) == _KEY_LENGTH)

    def _generations(self) -> list[Path]:
        # not the whole directory: the user may have pointed SPGEN_CACHE_DIR at one that holds other things
        return [path for path in self.directory.glob("v*") if path.name[1:].isdecimal()]

    def _build(self, key: str, build: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
        path = self._path(key)
        try:
            self._prepare(path.parent)
            with _lock(path.with_suffix(".lock")):
                return path if _is_sound(path) else _write(path, build, meta)
        except OSError as fault:
            if fault.errno not in _DISK_ERRORS:
                raise
            _warn(
                f"{self.directory} cannot be written ({fault.strerror}): the kernel is compiled for this process only. "
                "Free some space, or set SPGEN_CACHE_DIR to a directory that you can write"
            )
            return self._private.build(key, build, meta)

    def _prepare(self, directory: Path) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # one by one: mkdir gives its mode to the last directory only
        self._root.mkdir(mode=0o700, exist_ok=True)
        self._check_trust()
        directory.mkdir(mode=0o700, exist_ok=True)
        _sweep(directory)

    def _check_trust(self) -> None:
        if not self._trusted:
            _refuse_shared(self.directory)
            _refuse_shared(self._root)
            self._trusted = True


class _PrivateEntries:
    """Entries of this process alone, in a temporary directory that goes with it."""

    def __init__(self) -> None:
        self._entries: dict[str, Path] = {}
        self._root: Path | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> Path | None:
        return self._entries.get(key)

    def build(self, key: str, build: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
        with self._lock:
            if key not in self._entries:
                self._entries[key] = _write(self._directory() / key, build, meta)
            return self._entries[key]

    def _directory(self) -> Path:
        if self._root is None:
            try:
                self._root = Path(tempfile.mkdtemp(prefix="spgen-"))
            except OSError as fault:
                raise CacheError(
                    "temporary directory",
                    given=str(fault),
                    allowed="a directory with space for a kernel",
                    remedy="free some space, or set TMPDIR",
                ) from fault
            atexit.register(_remove_for, os.getpid(), self._root)
        return self._root


def _remove_for(pid: int, directory: Path) -> None:
    if os.getpid() == pid:  # a forked child runs its parent's handlers too
        shutil.rmtree(directory, ignore_errors=True)


def _check(path: Path, *, contents: bool = False) -> dict[str, Any]:
    """The manifest of a sound entry; FileNotFoundError if there is none, _Damaged if it cannot be trusted."""
    try:
        text = Path(path, _MANIFEST).read_bytes()
    except FileNotFoundError:
        if path.is_dir():
            raise _Damaged("it has no manifest") from None
        raise
    manifest = _parse(text)
    for name, (size, digest) in manifest["files"].items():
        _check_file(path / name, size, digest if contents else None)
    return manifest


def _is_sound(path: Path) -> bool:
    try:
        _check(path)
    except (OSError, _Damaged):
        return False
    return True


def _parse(text: bytes) -> dict[str, Any]:
    try:
        manifest = dict(json.loads(text))
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in manifest["files"].items()]
        found, meta = manifest["format"], dict(manifest["meta"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _Damaged("its manifest cannot be read") from None
    if found != FORMAT:
        raise _Damaged(f"it has format {found}, this version reads {FORMAT}")
    return {"format": found, "files": {name: (size, digest) for name, size, digest in files}, "meta": meta}


def _check_file(file: Path, size: int, digest: str | None) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise _Damaged(f"{file.name} is missing") from None
    if found != size:
        raise _Damaged(f"{file.name} has {found} bytes instead of {size}")
    if digest is not None and _digest(file) != digest:
        raise _Damaged(f"{file.name} has changed")


def _write(path: Path, build: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
    """Build beside `path`, then rename: `path` is complete or not there."""
    directory = Path(tempfile.mkdtemp(prefix="tmp-", dir=path.parent))
    try:
        build(directory)
        _seal(directory, meta)
        if path.exists():
            _discard(path)
        directory.rename(path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # gone already if all went well
    return path


def _seal(directory: Path, meta: Mapping[str, Any]) -> None:
    """Write the manifest of the files that are there."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    listed = {file.relative_to(directory).as_posix(): (file.stat().st_size, _digest(file)) for file in files}
    manifest = {"format": FORMAT, "files": listed, "meta": dict(meta)}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _discard(path: Path) -> None:
    """Remove an entry at one stroke, for whoever looks."""
    away = Path(tempfile.mkdtemp(prefix="tmp-", dir=path.parent))
    path.rename(away / path.name)
    shutil.rmtree(away, ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Remove what crashed processes left behind."""
    limit = time.time() - _ABANDONED
    for path in directory.glob("tmp-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)


def _lock(path: Path) -> contextlib.AbstractContextManager[object]:
    import filelock

    return filelock.FileLock(path, mode=0o600)


def _refuse_shared(directory: Path) -> None:
    """Raise CacheError if anybody but this user (or root) can write here."""
    if not hasattr(os, "geteuid"):
        return  # Windows: the profile's directories are private by their access lists
    status = directory.stat()
    if status.st_uid not in (0, os.geteuid()):
        fault = f"{directory}, which belongs to user {status.st_uid}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"{directory}, which others can write (mode {stat.S_IMODE(status.st_mode):o})"
    else:
        return
    raise CacheError(
        "cache directory",
        given=fault,
        allowed="a directory that only you can write, since its contents are run",
        remedy=f"chmod go-w {directory}, or set SPGEN_CACHE_DIR to another directory",
    )


def _warn(message: str) -> None:
    warnings.warn(message, CacheWarning, stacklevel=4)
