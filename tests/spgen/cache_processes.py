"""What many, killed and starved processes do to one cache: run by test_cache_processes.py, a scenario at a time.

A process of its own, because it forks by the hundred and stops the file system at every step: audit events tell of each
`open`, `mkdir`, `rename` and so on before it happens. It imports spgen.cache alone, so a child costs milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import filelock  # noqa: F401  here, once, and not in every child

from spgen.cache import Cache, key
from spgen.cache.archive import export_archive, import_archive
from spgen.cache.entry import contents
from spgen.errors import CacheWarning

KEY = key(name="kernel")
HALF = b"half of the kernel"
# events that change a disk; `open` does when it is for writing
CHANGES = ("open", "os.mkdir", "os.rename", "os.utime", "os.remove", "os.rmdir")


def build(directory: Path) -> None:
    with (directory / "kernel.so").open("wb") as file:
        file.write(HALF)
        file.flush()
        sys.audit("spgen.tests.half_written", str(directory))
        file.write(HALF)
    (directory / "source.py").write_text("source")


def is_right(path: Path) -> bool:
    found = contents(path)
    return found["kernel.so"] == HALF + HALF and found["source.py"] == b"source"


def fork(work: Callable[[], object]) -> int:
    """The child's process id; it ends with 0, or 1 for an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Interruption:
    """Calls `action` at the n-th event that changes something below `directory`, or at each from there on."""

    def __init__(self, directory: Path, action: Callable[[], None]) -> None:
        self.directory, self.action = str(directory), action
        self.countdown, self.always, self.seen = 0, False, list[str]()
        sys.addaudithook(self._hook)

    def start(self, at: int, always: bool = False) -> None:
        self.countdown, self.always, self.seen = at, always, []

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.countdown or event not in (*CHANGES, "spgen.tests.half_written"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if not str(args[0]).startswith(self.directory):
            return
        self.seen.append(event)
        self.countdown -= 1
        if not self.countdown:
            self.countdown = 1 if self.always else 0
            self.action()


def crowd(directory: Path, processes: int = 100) -> None:
    """All want the same entries and each one of its own, at once; every entry is built once."""
    log = directory.parent / "builds"
    shared = [key(shared=n) for n in range(6)]
    read, write = os.pipe()

    def work(number: int) -> None:
        os.close(write)
        os.read(read, 1)  # until the parent lets all go
        cache = Cache(directory)
        wanted = [*shared, key(own=number)]
        random.Random(number).shuffle(wanted)
        for name in wanted:

            def make(place: Path, name: str = name) -> None:
                time.sleep(0.005)
                (place / "kernel.so").write_bytes(name.encode() * 100)
                with log.open("a") as file:
                    file.write(f"{name}\n")

            assert contents(cache.get_or_build(name, make, meta={}))["kernel.so"] == name.encode() * 100

    children = [fork(lambda n=n: work(n)) for n in range(processes)]  # type: ignore[misc]
    os.close(write)
    assert [ended(child) for child in children] == [0] * processes
    built = Counter(log.read_text().split())
    assert set(built) == {*shared, *(key(own=n) for n in range(processes))}
    assert set(built.values()) == {1}, "an entry was built more than once"


def _damage(directory: Path) -> None:
    (Cache(directory).get_or_build(KEY, build, meta={}) / "source.py").unlink()


def killed(directory: Path) -> None:
    """A process is killed before each of its steps; whoever comes next finds nothing or all, and goes on."""
    kill = Interruption(directory, lambda: os.kill(os.getpid(), signal.SIGKILL))
    for prepare in (lambda _: None, _damage):
        kills = 0
        for step in range(1, 1000):
            shutil.rmtree(directory, ignore_errors=True)
            prepare(directory)
            assert not list(Cache(directory).entries())

            def work(step: int = step) -> None:
                warnings.simplefilter("ignore", CacheWarning)
                kill.start(step)
                Cache(directory).get_or_build(KEY, build, meta={})

            code = ended(fork(work))
            assert code in (0, -signal.SIGKILL)
            sound = list(Cache(directory).entries())
            assert all(is_right(entry.path) for entry in sound)
            with warnings.catch_warnings():
                if prepare is _damage:
                    warnings.simplefilter("ignore", CacheWarning)
                assert is_right(Cache(directory).get_or_build(KEY, build, meta={}))
            assert not list(directory.rglob(f"tmp-{KEY}-*")), "the next one removes what a killed one left"
            assert Cache(directory).clear() == 1
            assert not list(directory.rglob("tmp-*"))
            if code == 0:
                break
            kills += 1
        assert kills > 8


def killed_with_lock(directory: Path) -> None:
    """The holder of a lock is killed while others wait: one of them builds, all get the result."""
    ready = os.pipe()

    def hold() -> None:
        def stuck(place: Path) -> None:
            (place / "kernel.so").write_bytes(HALF)
            os.write(ready[1], b"x")
            time.sleep(600)

        Cache(directory).get_or_build(KEY, stuck, meta={})

    log = directory.parent / "builds"

    def wait() -> None:
        def make(place: Path) -> None:
            with log.open("a") as file:
                file.write("built\n")
            build(place)

        assert is_right(Cache(directory).get_or_build(KEY, make, meta={}))

    holder = fork(hold)
    os.read(ready[0], 1)
    waiters = [fork(wait) for _ in range(3)]
    time.sleep(0.2)
    assert not log.exists(), "nobody builds beside the holder"
    assert Cache(directory).clear() == 0
    assert list(directory.rglob(f"tmp-{KEY}-*/kernel.so")), "what is being built stays"
    os.kill(holder, signal.SIGKILL)
    assert ended(holder) == -signal.SIGKILL
    assert [ended(waiter) for waiter in waiters] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert not list(directory.rglob("tmp-*"))


def starved(directory: Path) -> None:
    """The disk is full, or read-only, from each step on: there is a kernel all the same, and a warning."""
    failure = [0]

    def fail() -> None:
        raise OSError(failure[0], os.strerror(failure[0]))

    disk = Interruption(directory, fail)
    for code, always in ((errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EROFS, True)):
        failure[0], outcomes = code, set()
        for step in range(1, 1000):
            shutil.rmtree(directory, ignore_errors=True)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                disk.start(step, always)
                path = Cache(directory).get_or_build(KEY, build, meta={})
                disk.countdown = 0
            assert is_right(path)
            kept = directory in path.parents
            assert kept != any("cannot be written" in str(one.message) for one in seen)
            outcomes.add(kept)
            again = Cache(directory).get_or_build(KEY, build, meta={})  # there is space again
            assert directory in again.parents
            assert is_right(again)
            if len(disk.seen) < step:
                break
        assert step > 8
        assert outcomes == {True, False}


def full(directory: Path) -> None:
    """On a disk of 64 KB with more and more of it taken, so that each write fails in its turn."""
    directory.mkdir()
    outcomes = set()
    for taken in range(17):
        filler = directory / "filler"
        filler.write_bytes(b"")
        with warnings.catch_warnings(record=True) as seen, filler.open("wb", buffering=0) as file:
            warnings.simplefilter("always")
            with contextlib.suppress(OSError):
                for _ in range(taken):
                    file.write(bytes(4096))
            path = Cache(directory / "cache").get_or_build(KEY, build, meta={})
        kept = directory in path.parents
        outcomes.add(kept)
        assert is_right(path)
        assert kept != any("No space left" in str(one.message) for one in seen)

        def tool(place: Path) -> None:
            # what a linker does: its own words, and no OSError
            if directory in place.parents:
                raise RuntimeError("ld: final link failed")
            build(place)

        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert is_right(Cache(directory / "cache").get_or_build(key(n=taken), tool, meta={}))
        assert any("No space left" in str(one.message) for one in seen)
        shutil.rmtree(directory / "cache", ignore_errors=True)
    assert outcomes == {True, False}


def busy(directory: Path) -> None:
    """Others clear, prune, import and export while processes build and read: nobody fails."""
    archive = directory.parent / "kernels.tar"
    wanted = [key(n=n) for n in range(4)]
    until = time.monotonic() + 1.5

    def worker(number: int) -> None:
        order = random.Random(number)
        while time.monotonic() < until:
            path = Cache(directory).get_or_build(order.choice(wanted), build, meta={})
            with contextlib.suppress(FileNotFoundError):  # removed since: whoever needs it asks again
                assert is_right(path)

    def remover() -> None:
        while time.monotonic() < until:
            Cache(directory).clear()
            Cache(directory).prune(max_bytes=100)
            time.sleep(0.02)

    def traveller() -> None:
        while time.monotonic() < until:
            export_archive(Cache(directory), archive)
            import_archive(Cache(directory), archive)
            Cache(directory).size()
            time.sleep(0.02)

    children = [*(fork(lambda n=n: worker(n)) for n in range(8)), fork(remover), fork(traveller)]  # type: ignore[misc]
    assert [ended(child) for child in children] == [0] * len(children)
    assert all(is_right(entry.path) for entry in Cache(directory).entries())
    Cache(directory).clear()
    assert not list(directory.rglob("tmp-*"))


if __name__ == "__main__":
    warnings.simplefilter("error")
    globals()[sys.argv[1]](Path(sys.argv[2]))
