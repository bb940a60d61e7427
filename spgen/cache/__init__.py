"""The disk cache of compiled kernels: content-addressed, written once, checked at every read.

An entry is a directory named by its key. It holds the files that `build` wrote and a manifest::

    ~/.cache/spgen/v1/3f/3f9a…/kernel.so
                               manifest.json   {"format": 1, "files": {"kernel.so": [size, sha256]}, "meta": {…}}

The life of an entry, whichever process gets there first: look → lock → look again → build in a temporary
directory beside it → manifest → rename. So an entry is complete or absent, never half there. A process that is killed
gives its lock back; the next one that wants the entry removes what it left and goes on. Lock files stay: without them
two processes could hold two locks of one name.

Use is noted by touching the manifest, at most once a day, so that `prune` knows what was not used for long.

- A damaged entry, or one of another format, is rebuilt with a `CacheWarning`; it goes when its successor is ready.
- Where the directory cannot be written (read-only, full), kernels are built for this process alone, with a warning.
- A directory that others can write is refused: whoever can put a kernel there runs code as this user.

The warm path is one read and a `stat` per file; neither the lock nor platformdirs is imported for it. `entry.py` knows
what an entry looks like, `archive.py` moves entries from machine to machine.
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
from pathlib import Path
from typing import Any

from spgen.cache.entry import FORMAT, Damaged, Entry, check, discard, is_sound, note_use, read, write
from spgen.errors import CacheError, CacheWarning
from spgen.settings import cache_home, settings

_DAY = 24 * 3600.0
_ABANDONED = _DAY  # after which a temporary directory can only be a crash's
_USE_NOTED = _DAY  # how exactly the last use of an entry is known
_SCARCE = 16 << 20  # with fewer bytes free, a tool that fails has probably failed for that
_KEY_LENGTH = 64

# what a disk says that cannot be written; every other OSError belongs to `build`
_DISK_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
    if hasattr(errno, name)
}


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
            check(path)
        except (FileNotFoundError, NotADirectoryError):
            return self._private.get(key)
        except (OSError, Damaged) as fault:
            _warn(f"the entry {key[:12]} of {self.directory} is damaged ({fault}); it will be rebuilt")
            return self._private.get(key)
        self._check_trust()
        note_use(path)
        return path

    def get_or_build(self, key: str, build: Callable[[Path], None], *, meta: Mapping[str, Any]) -> Path:
        """The entry's directory; where there is none, `build(directory)` writes its files first.

        `meta` (JSON values) goes to the manifest, for people and for `spgen cache`. One process at a time builds
        an entry; the others wait and use its result. An exception of `build` passes through and leaves nothing.
        Raises CacheError for a directory that others can write.
        """
        return self.get(key) or self._build(key, build, meta)

    def keep(self, key: str, build: Callable[[Path], None], *, meta: Mapping[str, Any]) -> bool:
        """Builds an entry unless a sound one is there; returns whether it did.

        Unlike `get_or_build` it raises CacheError where the directory cannot be written.
        """
        try:
            return self._keep(key, build, meta)
        except OSError as fault:
            raise self._unwritable(fault) from fault

    def invalidate(self, key: str, reason: str) -> bool:
        """Call it when an entry of the right sizes does not load; True if its contents were indeed damaged.

        With True the entry is gone and building again will help; with False the files are as they were built,
        and the fault lies elsewhere.
        """
        path = self._path(key)
        try:
            check(path, contents=True)
        except (OSError, Damaged) as fault:
            _warn(f"the entry {key[:12]} of {self.directory} is damaged ({reason}: {fault}); it will be rebuilt")
            with contextlib.suppress(OSError):
                discard(path)
            return True
        return False

    def entries(self) -> Iterator[Entry]:
        """All sound entries, in the order of their keys."""
        for path in self._paths():
            with contextlib.suppress(OSError, Damaged):
                yield read(path)

    def damaged(self) -> list[str]:
        """The keys of entries that cannot be used; they are rebuilt at their next use."""
        return [path.name for path in self._paths() if not is_sound(path)]

    def size(self) -> int:
        """Bytes of all that spgen keeps here, abandoned and old entries included."""
        total = 0
        for generation in self._generations():
            for folder, _, names in os.walk(generation):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # others use the cache meanwhile
                        total += Path(folder, name).stat().st_size
        return total

    def clear(self) -> int:
        """Remove the entries of every format, but not what is being built; returns how many there were of this one."""
        count = sum(self._remove(path) for path in self._paths())
        self._remove_leftovers()
        for generation in self._generations():
            if generation != self._root:
                shutil.rmtree(generation, ignore_errors=True)
        return count

    def prune(
        self, *, unused_for: float | None = None, max_bytes: int | None = None, dry_run: bool = False
    ) -> list[Entry]:
        """Remove what was not used for `unused_for` seconds, then the least recently used down to `max_bytes`.

        Returns what goes (with `dry_run`: would go), the least recently used first; damaged entries and what killed
        processes left go too. A kernel that is loaded keeps working without its files, and what is being built stays.
        Raises CacheError where the directory cannot be written.
        """
        limit = -1.0 if unused_for is None else time.time() - unused_for
        entries = sorted(self.entries(), key=lambda entry: (entry.used, entry.key))
        total, going = sum(entry.size for entry in entries), []
        for entry in entries:
            if entry.used <= limit or (max_bytes is not None and total > max_bytes):
                going.append(entry)
                total -= entry.size
        if not dry_run:
            for key in (*self.damaged(), *(entry.key for entry in going)):
                self._remove(self._path(key))
            self._remove_leftovers()
        return going

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
        try:
            self._keep(key, build, meta)
        except Exception as fault:
            reason = self._disk_fault(fault)
            if not reason:
                raise
            _warn(
                f"{self.directory} cannot be written ({reason}): the kernel is compiled for this process only. "
                "Free some space, or set SPGEN_CACHE_DIR to a directory that you can write"
            )
            return self._private.build(key, build, meta)
        return self._path(key)

    def _keep(self, key: str, build: Callable[[Path], None], meta: Mapping[str, Any]) -> bool:
        """Whether the entry had to be built; whoever asks at the same time waits."""
        path = self._path(key)
        self._prepare(path.parent)
        with _lock(path.with_suffix(".lock")):
            if is_sound(path):
                return False
            for left in path.parent.glob(f"tmp-{key}-*"):  # by a killed process: it held this lock
                shutil.rmtree(left, ignore_errors=True)
            write(path, build, meta)
        return True

    def _disk_fault(self, fault: Exception) -> str:
        """What the disk has to do with a failed build; an empty text if nothing."""
        if isinstance(fault, OSError):
            return (fault.strerror or str(fault)) if fault.errno in _DISK_ERRORS else ""
        try:
            return "No space left on device" if shutil.disk_usage(self.directory).free < _SCARCE else ""
        except OSError:
            return ""

    def _unwritable(self, fault: OSError) -> CacheError:
        return CacheError(
            "cache directory",
            given=f"{self.directory}: {fault.strerror or fault}",
            allowed="a directory that can be written",
            remedy="free some space, or set SPGEN_CACHE_DIR to a directory that you can write",
        )

    def _remove(self, path: Path) -> bool:
        """Whether the entry was there; raises CacheError if it cannot be removed."""
        try:
            return discard(path)
        except OSError as fault:
            raise self._unwritable(fault) from fault

    def _remove_leftovers(self) -> None:
        """What killed processes left: whoever builds holds the lock of its key."""
        for path in self._root.glob("??/tmp-*"):
            key = path.name.split("-")[1]
            free: contextlib.AbstractContextManager[object] = (
                contextlib.nullcontext()
            )  # an entry on its way out belongs to nobody
            if len(key) == _KEY_LENGTH:
                free = _lock(path.parent / f"{key}.lock", wait=False)
            with contextlib.suppress(OSError, TimeoutError), free:  # it is being built, or cannot be removed
                shutil.rmtree(path, ignore_errors=True)

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
                self._entries[key] = write(self._directory() / key, build, meta)
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


def _sweep(directory: Path) -> None:
    """Remove what crashed processes left behind."""
    limit = time.time() - _ABANDONED
    for path in directory.glob("tmp-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)


def _lock(path: Path, *, wait: bool = True) -> contextlib.AbstractContextManager[object]:
    """Held by one process at a time; with `wait=False` a TimeoutError if that is another."""
    import filelock

    return filelock.FileLock(path, mode=0o600, timeout=-1 if wait else 0)


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
