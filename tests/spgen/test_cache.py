"""The disk cache: the life of an entry, damage, races, and directories that cannot or must not be used."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spgen import cache as module
from spgen.cache import Cache, default_directory, key
from spgen.errors import CacheError, CacheWarning
from spgen.settings import override

KEY = key(text="kernel", version=1)


class Builder:
    """Writes a small kernel and counts how often it was asked to."""

    def __init__(self, content: bytes = b"kernel") -> None:
        self.content = content
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "kernel.so").write_bytes(self.content)
        (directory / "source.py").write_text("source")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_key_is_canonical_and_total() -> None:
    assert key(a=1, b=(2, "x")) == key(b=[2, "x"], a=1)
    assert key(a=1) != key(a=2)
    assert len(key()) == 64
    with pytest.raises(TypeError):
        key(a=object())
    with pytest.raises(ValueError, match="float"):
        key(a=float("nan"))


def test_an_entry_is_built_once(cache: Cache) -> None:
    build = Builder()
    assert cache.get(KEY) is None
    path = cache.get_or_build(KEY, build, meta={"pattern": "causal()"})
    assert (path / "kernel.so").read_bytes() == b"kernel"
    assert cache.get_or_build(KEY, build, meta={}) == cache.get(KEY) == path
    assert Cache(cache.directory).get_or_build(KEY, build, meta={}) == path
    assert build.calls == 1
    assert [entry.meta for entry in cache.entries()] == [{"pattern": "causal()"}]


def test_build_errors_pass_through_and_leave_nothing(cache: Cache) -> None:
    def fail(directory: Path) -> None:
        (directory / "kernel.so").write_bytes(b"half")
        raise FileNotFoundError(errno.ENOENT, "no linker")

    with pytest.raises(FileNotFoundError, match="no linker"):
        cache.get_or_build(KEY, fail, meta={})
    assert list(cache.entries()) == []
    assert list(cache.directory.rglob("tmp-*")) == []
    assert cache.get_or_build(KEY, Builder(), meta={}).is_dir()


def _truncate(path: Path) -> None:
    (path / "kernel.so").write_bytes(b"ker")


def _remove(path: Path) -> None:
    (path / "source.py").unlink()


def _half_written(path: Path) -> None:
    (path / "manifest.json").unlink()


def _garbage(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "files": [')


def _wrong_shape(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "files": {"kernel.so": 3}, "meta": {}}')


def _other_version(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "3 bytes instead of 6"),
        (_remove, r"source\.py is missing"),
        (_half_written, "no manifest"),
        (_garbage, "cannot be read"),
        (_wrong_shape, "cannot be read"),
        (_other_version, "format 99"),
    ],
)
def test_a_damaged_entry_is_rebuilt_with_a_warning(cache: Cache, damage, reason: str) -> None:
    damage(cache.get_or_build(KEY, Builder(), meta={}))
    with pytest.warns(CacheWarning, match=reason):
        path = cache.get_or_build(KEY, Builder(b"rebuilt"), meta={})
    assert (path / "kernel.so").read_bytes() == b"rebuilt"
    assert cache.get(KEY) == path


def test_a_damaged_entry_stays_until_its_successor_is_ready(cache: Cache) -> None:
    path = cache.get_or_build(KEY, Builder(), meta={})
    _other_version(path)

    def fail(_directory: Path) -> None:
        raise RuntimeError("compiler crashed")

    with pytest.warns(CacheWarning), pytest.raises(RuntimeError, match="crashed"):
        cache.get_or_build(KEY, fail, meta={})
    assert (path / "kernel.so").exists()


def test_invalidate_tells_damage_from_other_faults(cache: Cache) -> None:
    path = cache.get_or_build(KEY, Builder(), meta={})
    assert not cache.invalidate(KEY, "undefined symbol")
    assert cache.get(KEY) == path
    (path / "kernel.so").write_bytes(b"KERNEL")  # same size: only the contents tell
    with pytest.warns(CacheWarning, match=r"invalid ELF header: kernel\.so has changed"):
        assert cache.invalidate(KEY, "invalid ELF header")
    assert cache.get(KEY) is None


def test_entries_size_and_clear_touch_only_what_is_theirs(cache: Cache) -> None:
    for number in range(3):
        cache.get_or_build(key(n=number), Builder(), meta={"n": number})
    other = cache.directory / "notes.txt"
    other.write_text("mine")
    assert sorted(entry.meta["n"] for entry in cache.entries()) == [0, 1, 2]
    assert all(entry.size == len(b"kernel") + len("source") for entry in cache.entries())
    assert cache.size() > 3 * 12
    assert cache.clear() == 3
    assert cache.size() == 0
    assert other.read_text() == "mine"


def _used(cache: Cache, *days: float) -> None:
    """Entries last used so many days ago, 12 bytes each."""
    for number, age in enumerate(days):
        path = cache.get_or_build(key(n=number), Builder(), meta={"n": number})
        os.utime(path / "manifest.json", (time.time() - age * 86400,) * 2)


def test_use_is_noted_once_a_day(cache: Cache) -> None:
    _used(cache, 1.1, 0.9)
    for number in range(2):
        assert cache.get(key(n=number))
    ages = [time.time() - entry.used for entry in sorted(cache.entries(), key=lambda entry: entry.meta["n"])]
    assert ages[0] < 60
    assert ages[1] == pytest.approx(0.9 * 86400, abs=60)


def test_a_use_that_cannot_be_noted_is_no_fault(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    _used(cache, 3)

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get(key(n=0))


def _numbers(entries) -> list[int]:
    return [entry.meta["n"] for entry in entries]


def test_prune_takes_the_least_recently_used(cache: Cache) -> None:
    _used(cache, 5, 40, 1, 90, 20)
    assert _numbers(cache.prune(dry_run=True)) == []
    assert _numbers(cache.prune(unused_for=30 * 86400, dry_run=True)) == [3, 1]
    assert len(list(cache.entries())) == 5
    assert _numbers(cache.prune(unused_for=30 * 86400)) == [3, 1]
    assert sorted(_numbers(cache.entries())) == [0, 2, 4]
    assert _numbers(cache.prune(max_bytes=35)) == [4]
    assert _numbers(cache.prune(unused_for=4 * 86400, max_bytes=0)) == [0, 2]
    assert list(cache.entries()) == []
    assert cache.get(key(n=0)) is None


def test_prune_removes_what_is_damaged_or_left_behind(cache: Cache) -> None:
    _used(cache, 0, 0)
    _truncate(cache.get(key(n=0)))
    killed = cache.get(key(n=1)).parent / f"tmp-{key(n=1)}-abc"
    killed.mkdir()
    assert cache.prune(dry_run=True) == []
    assert killed.exists()
    assert cache.prune() == []
    assert not killed.exists()
    assert _numbers(cache.entries()) == [1]
    assert cache.get(key(n=0)) is None  # gone, so there is nothing to warn of


def test_what_cannot_be_removed_is_an_error(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    _used(cache, 10)

    def refuse(_path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "discard", refuse)
    for attempt in (cache.clear, lambda: cache.prune(max_bytes=0)):
        with pytest.raises(CacheError, match="Read-only file system"):
            attempt()


def test_an_absent_directory_is_an_empty_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "never")
    assert (list(cache.entries()), cache.size(), cache.clear()) == ([], 0, 0)
    assert not cache.directory.exists()


def test_what_a_crash_left_is_swept_after_a_day(cache: Cache) -> None:
    parent = cache.get_or_build(KEY, Builder(), meta={}).parent
    old, new = parent / "tmp-old", parent / "tmp-new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    cache._prepare(parent)
    assert (old.exists(), new.exists()) == (False, True)


def _race(directory: str, number: int, barrier, results) -> None:
    def build(path: Path) -> None:
        time.sleep(0.05)  # long enough for every process to want it
        (path / "kernel.so").write_text(str(number))
        results.put("built")

    barrier.wait()
    found = Cache(directory).get_or_build(KEY, build, meta={})
    results.put((found / "kernel.so").read_text())


def test_one_of_many_processes_builds(cache: Cache) -> None:
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_race, args=(str(cache.directory), n, barrier, results)) for n in range(4)]
    for worker in workers:
        worker.start()
    seen = [results.get(timeout=60) for _ in range(5)]
    for worker in workers:
        worker.join(60)
    assert seen.count("built") == 1
    assert len(set(seen) - {"built"}) == 1


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_others_can_write_is_refused(cache: Cache, mode: int) -> None:
    cache.get_or_build(KEY, Builder(), meta={})
    cache.directory.chmod(mode)
    for attempt in (lambda c: c.get(KEY), lambda c: c.get_or_build(key(n=2), Builder(), meta={})):
        with pytest.raises(CacheError, match=r"(?s)others can write \(mode .*chmod go-w"):
            attempt(Cache(cache.directory))


def test_a_directory_of_another_user_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.directory.mkdir()
    if os.geteuid() == 0:
        os.chown(cache.directory, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match="belongs to user"):
        cache.get_or_build(KEY, Builder(), meta={})


def test_new_directories_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = Cache(tmp_path / "a" / "b").get_or_build(KEY, Builder(), meta={})
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path, *path.parents)][:4] == [0o700] * 4


def test_a_directory_that_cannot_be_made_still_gives_a_kernel(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    cache, build = Cache(tmp_path / "file"), Builder()
    with pytest.warns(CacheWarning, match=r"(?s)cannot be written.*SPGEN_CACHE_DIR"):
        path = cache.get_or_build(KEY, build, meta={})
    assert (path / "kernel.so").read_bytes() == b"kernel"
    assert cache.get_or_build(KEY, build, meta={}) == path  # for this process it is cached all the same
    assert build.calls == 1
    assert (tmp_path / "file").read_text() == "not a directory"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_read_only_or_full_disk_still_gives_a_kernel(
    cache: Cache, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "_lock", refuse)
    with pytest.warns(CacheWarning, match=os.strerror(code)):
        path = cache.get_or_build(KEY, Builder(), meta={})
    assert (path / "source.py").read_text() == "source"
    assert cache.directory not in path.parents


def test_a_disk_that_fills_up_while_building(cache: Cache) -> None:
    def build(directory: Path) -> None:
        if cache.directory in directory.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (directory / "kernel.so").write_bytes(b"elsewhere")

    with pytest.warns(CacheWarning, match="No space left"):
        path = cache.get_or_build(KEY, build, meta={})
    assert (path / "kernel.so").read_bytes() == b"elsewhere"
    assert list(cache.directory.rglob("tmp-*")) == []


def test_no_space_anywhere_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")

    def refuse(**_kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.tempfile, "mkdtemp", refuse)
    with pytest.warns(CacheWarning), pytest.raises(CacheError, match=r"(?s)No space left.*set TMPDIR"):
        Cache(tmp_path / "file").get_or_build(KEY, Builder(), meta={})


def test_fault_is_what_writing_says(cache: Cache, tmp_path: Path) -> None:
    assert cache.fault() == ""
    (tmp_path / "file").write_text("")
    assert Cache(tmp_path / "file").fault() == os.strerror(errno.EEXIST)


def test_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with override(cache_dir=tmp_path):
        assert default_directory() == tmp_path
        assert Cache().directory == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    with override(cache_dir=None):
        assert default_directory() == tmp_path / "xdg" / "spgen"


def test_the_warm_path_imports_neither_lock_nor_platformdirs(cache: Cache) -> None:
    cache.get_or_build(KEY, Builder(), meta={})
    code = (
        f"import sys; from spgen.cache import Cache; assert Cache({str(cache.directory)!r}).get({KEY!r});"
        "assert not {'filelock', 'platformdirs', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
