"""Archives of the cache: the same bytes for the same entries, and nothing is kept of one that is not sound."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spgen.cache import Cache, key
from spgen.cache.archive import export_archive, import_archive
from spgen.cache.entry import contents
from spgen.errors import CacheError

Members = list[tuple[tarfile.TarInfo, bytes]]


def fill(cache: Cache, count: int = 3) -> list[str]:
    """Entries of different targets; the last one serves all."""
    keys = [key(n=n) for n in range(count)]
    for n, name in enumerate(keys):

        def build(directory: Path, n: int = n) -> None:
            (directory / "kernel.so").write_bytes(bytes([n]) * 1000)
            (directory / "variants").mkdir()
            (directory / "variants" / "a.json").write_text("{}")

        meta = {"n": n} if n == count - 1 else {"n": n, "target": f"cuda:sm_{8 + n}0"}
        cache.get_or_build(name, build, meta=meta)
    return sorted(keys)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def other(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "other")


@pytest.fixture
def archive(cache: Cache, tmp_path: Path) -> Path:
    fill(cache)
    export_archive(cache, tmp_path / "kernels.tar")
    return tmp_path / "kernels.tar"


def test_what_goes_out_comes_in(cache: Cache, other: Cache, archive: Path) -> None:
    found = import_archive(other, archive)
    assert (sorted(found.added), found.present) == (sorted(entry.key for entry in cache.entries()), ())
    for mine, theirs in zip(cache.entries(), other.entries(), strict=True):
        assert contents(mine.path) == contents(theirs.path)
        assert mine.meta == theirs.meta
    assert {path.stat().st_mode & 0o077 for path in other.directory.rglob("*") if path.is_dir()} <= {0, 0o055}


def test_equal_entries_make_equal_files(cache: Cache, other: Cache, archive: Path, tmp_path: Path) -> None:
    import_archive(other, archive)
    for entry in other.entries():
        os.utime(entry.path / "manifest.json", (1, 1))
    export_archive(other, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


def test_keys_and_targets_choose(cache: Cache, tmp_path: Path) -> None:
    keys, file = fill(cache), tmp_path / "some.tar"
    assert [entry.key for entry in export_archive(cache, file, keys=[keys[1][:12], keys[1]])] == [keys[1]]
    for target in ("sm_90", "cuda:sm_90"):
        assert sorted(entry.meta["n"] for entry in export_archive(cache, file, target=target)) == [1, 2]
    for wrong, count in (("zz", 0), ("", 3)):
        with pytest.raises(CacheError, match=rf"(?s){count} entries that start so.*spgen cache list"):
            export_archive(cache, file, keys=[wrong])


def test_entries_that_are_there_stay(cache: Cache, other: Cache, archive: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "kernel.so").write_text("my own")

    other.get_or_build(key(n=0), build, meta={})
    found = import_archive(other, archive)
    assert (len(found.added), found.present) == (2, (key(n=0),))
    assert (other.get_or_build(key(n=0), build, meta={}) / "kernel.so").read_text() == "my own"


def test_a_damaged_entry_does_not_travel(cache: Cache, tmp_path: Path) -> None:
    keys = fill(cache)
    entry = next(cache.entries())
    (entry.path / "kernel.so").write_bytes(b"x" * 1000)  # of the right size: only its digest tells
    written = export_archive(cache, tmp_path / "kernels.tar")
    assert [e.key for e in written] == keys[1:]
    assert len(import_archive(Cache(tmp_path / "other"), tmp_path / "kernels.tar").added) == 2


def test_an_archive_that_cannot_be_written_leaves_nothing(cache: Cache, tmp_path: Path) -> None:
    fill(cache)
    with pytest.raises(CacheError, match=r"(?s)nowhere/kernels.tar: got No such file.*choose another place"):
        export_archive(cache, tmp_path / "nowhere" / "kernels.tar")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CacheError, match="folder: got Is a directory"):
        export_archive(cache, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "folder"]


def members(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write(archive: Path, found: Members) -> None:
    with tarfile.open(archive, "w") as tar:
        for member, content in found:
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def refused(other: Cache, archive: Path, match: str) -> None:
    with pytest.raises(CacheError, match=match) as error:
        import_archive(other, archive)
    assert str(archive) in str(error.value)
    assert error.value.remedy
    assert not list(other.entries())
    assert not list(other.directory.rglob("*/*"))


def _edit(name: str, change: Callable[[tarfile.TarInfo], None]) -> Callable[[Members], Members]:
    def edit(found: Members) -> Members:
        member = next(member for member, _ in found if member.name.endswith(name))
        change(member)
        return found

    return edit


def _rename(old: str, new: str) -> Callable[[Members], Members]:
    return _edit(old, lambda member: setattr(member, "name", new))


def _kind(kind: bytes) -> Callable[[Members], Members]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    return _edit("kernel.so", change)


def _traversal(name: str) -> Callable[[Members], Members]:
    """A manifest that lists a file outside its entry, and that file."""

    def edit(found: Members) -> Members:
        at = next(n for n, (member, _) in enumerate(found) if member.name.endswith("manifest.json"))
        member, content = found[at]
        manifest = json.loads(content)
        manifest["files"][name] = manifest["files"].pop("kernel.so")
        found[at] = (member, json.dumps(manifest).encode())
        return _rename("kernel.so", f"{member.name.partition('/')[0]}/{name}")(found)

    return edit


def _content(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda found: [(m, content if m.name.endswith(name) else c) for m, c in found]


def _twice(found: Members) -> Members:
    return [*found[:-1], *found[1:4], found[-1]]


DAMAGES: dict[str, tuple[Callable[[Members], Members], str]] = {
    "a path up": (_rename("kernel.so", "../kernel.so"), "belongs to no entry"),
    "a path up inside": (_traversal("../../kernel.so"), "leads out of the entry"),
    "an absolute path": (_rename("kernel.so", "/tmp/kernel.so"), "belongs to no entry"),
    "an absolute path inside": (_traversal("/tmp/kernel.so"), "leads out of the entry"),
    "a drive": (_traversal("C:\\kernel.so"), "leads out of the entry"),
    "a symbolic link": (_kind(tarfile.SYMTYPE), "is no plain file"),
    "a hard link": (_kind(tarfile.LNKTYPE), "is no plain file"),
    "a device": (_kind(tarfile.CHRTYPE), "is no plain file"),
    "a directory": (_kind(tarfile.DIRTYPE), "is no plain file"),
    "another format": (_content("spgen-cache.json", b'{"format": 99}'), "(?s)format 99; .* reads 1.*version of"),
    "a header of junk": (_content("spgen-cache.json", b"junk"), "'format' cannot be read"),
    "no header": (lambda found: found[1:], "a tar that starts with"),
    "no end": (lambda found: found[:-1], "the end is missing"),
    "an entry too few": (lambda found: [found[0], *found[4:]], "incomplete: 2 entries of 3"),
    "an entry twice": (_twice, "is there twice"),
    "more behind the end": (lambda found: [*found, found[1]], "stands behind the end"),
    "a file that is not listed": (_rename("a.json", "0" * 64 + "/b.json"), "damaged: .* is missing"),
    "other contents": (_content("kernel.so", b"x" * 1000), r"kernel\.so has changed"),
    "a file cut short": (_content("kernel.so", b"x"), r"kernel\.so has 1 bytes instead of 1000"),
    "a manifest of junk": (_content("manifest.json", b"[]"), "manifest cannot be read"),
    "no manifest": (lambda found: [f for f in found if "manifest" not in f[0].name], "manifest cannot be read"),
    "an entry's other format": (
        _content("manifest.json", b'{"format": 9, "files": {}, "meta": {}}'), "has format 9, this version reads 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_an_archive_of_entries_is_refused_whole(damage: str, other: Cache, archive: Path) -> None:
    change, match = DAMAGES[damage]
    write(archive, change(members(archive)))
    refused(other, archive, match)


def test_nothing_of_a_truncated_archive_is_kept(other: Cache, archive: Path) -> None:
    whole = archive.read_bytes()
    end = len(whole.rstrip(b"\0"))  # what a tar is padded with says nothing
    for size in range(0, end, 500):
        archive.write_bytes(whole[:size])
        refused(other, archive, "an archive made by")


def test_no_byte_can_be_changed_unnoticed(cache: Cache, other: Cache, archive: Path) -> None:
    whole = archive.read_bytes()
    wanted = {entry.key: contents(entry.path) for entry in cache.entries()}
    for at in range(0, len(whole), 211):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        try:
            import_archive(other, archive)
        except CacheError:
            assert not list(other.entries())
        else:  # a byte of padding, or of a field that nobody reads
            assert {entry.key: contents(entry.path) for entry in other.entries()} == wanted
            other.clear()


@pytest.mark.parametrize(
    "content", [b"", b"not a tar" * 200, gzip.compress(b"x" * 2000)], ids=["empty", "text", "gzip"]
)
def test_what_is_no_tar_is_refused(content: bytes, other: Cache, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(other, tmp_path / "file", "cannot be read")


def test_a_file_that_is_not_there(other: Cache, tmp_path: Path) -> None:
    refused(other, tmp_path / "none.tar", "got no such file")
    refused(other, tmp_path, "Is a directory")


def test_a_cache_that_cannot_be_written(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"(?s)cache directory.*SPGEN_CACHE_DIR"):
        import_archive(Cache(tmp_path / "file"), archive)


def test_a_cache_that_others_can_write_takes_nothing(other: Cache, archive: Path) -> None:
    other.directory.mkdir()
    other.directory.chmod(0o777)
    with pytest.raises(CacheError, match="others can write"):
        import_archive(other, archive)
    assert not list(other.entries())
