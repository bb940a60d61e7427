"""sp.show: cells hold the oracle's pairs, tiles are those of the lowering, and every output says the same."""

from __future__ import annotations

import io
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import spgen as sp
from spgen.drawing import subject, walk
from spgen.drawing.terminal import plain
from spgen.errors import (
    DeviceError,
    DtypeError,
    PatternError,
    ShapeError,
    SpgenError,
    ToolchainError,
    UnsupportedError,
)
from spgen.explain import count_tiles
from tests.strategies import Call, calls, mask_of, patterns_of

BAND = sp.causal() & (sp.sink(2) | sp.window(4))


@st.composite
def drawn(draw: st.DrawFn) -> tuple[sp.Pattern, Call]:
    call = draw(calls())
    return draw(patterns_of(call)), call


def show(pattern: sp.Pattern, call: Call, **options: object) -> sp.drawing.Picture:  # type: ignore[name-defined]
    sizes = {"q_heads": call.q_heads, "kv_heads": call.kv_heads, "batch": call.batch}
    return sp.show(pattern, call.q_len, call.kv_len, **sizes, heads=True, **options)  # type: ignore[arg-type]


@given(drawn(), st.integers(1, 16), st.integers(1, 16), st.integers(0, 2))
def test_cells_hold_the_shares_of_the_oracle(
    case: tuple[sp.Pattern, Call], rows: int, cols: int, sequence: int
) -> None:
    pattern, call = case
    rows, cols, sequence = min(rows, call.q_len), min(cols, call.kv_len), min(sequence, call.batch - 1)
    picture = show(pattern, call, sequence=sequence)
    found, sampled = picture.density(rows, cols)
    assert not sampled
    wanted = mask_of(pattern, call)[sequence].double()
    edges = picture.subject.edges
    for r in range(rows):
        for c in range(cols):
            (top, bottom), (left, right) = edges(call.q_len, rows)[r : r + 2], edges(call.kv_len, cols)[c : c + 2]
            torch.testing.assert_close(found[:, r, c], wanted[:, top:bottom, left:right].mean((1, 2)))


@given(drawn(), st.sampled_from([(8, 8), (16, 8), (4, 16)]))
def test_tiles_cover_the_pattern_and_whole_ones_hold_nothing_else(
    case: tuple[sp.Pattern, Call], size: tuple[int, int]
) -> None:
    pattern, call = case
    picture = show(pattern, call, tiles=size)
    visited = picture.visited(call.q_len, call.kv_len)
    wanted = mask_of(pattern, call)[0]
    assert bool((visited.sum((0, 1)) >= wanted.double()).all())
    whole = visited[:, 1].sum(0)
    assert bool((whole <= wanted.double()).all()), "a whole tile holds a pair that the pattern does not"


def test_empty_runs_lie_anywhere_and_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order for one head only: its runs in a tile may be empty, and then begin at no key at all."""
    keys, longest = walk.Walk._keys, 0

    def counted(self: walk.Walk, segment: object, tile: int, positions: torch.Tensor) -> torch.Tensor:
        nonlocal longest
        longest = max(longest, len(positions))
        assert longest <= 9
        return keys(self, segment, tile, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(walk.Walk, "_keys", counted)
    order = torch.stack([torch.arange(9).flip(0), torch.arange(9)]).int()
    mixed = sp.permuted(sp.block(1, mask=torch.ones(9, 9, dtype=torch.bool)), q=order)
    pattern = sp.causal() & mixed | sp.documents(torch.tensor([0] * 4 + [1] * 5).int())
    call = Call(9, 9, 2, 2, 1, None)
    for size in ((8, 8), (4, 16)):
        visited = show(pattern, call, tiles=size).visited(9, 9)
        assert bool((visited.sum((0, 1)) >= mask_of(pattern, call)[0].double()).all())
    assert longest


@given(drawn(), st.sampled_from([(8, 8), (16, 8)]))
def test_tiles_are_counted_as_explain_does(case: tuple[sp.Pattern, Call], size: tuple[int, int]) -> None:
    pattern, call = case
    shown = [show(pattern, call, tiles=size, sequence=b) for b in range(call.batch)]
    levels, builder = shown[0].subject.walk.levels, shown[0].subject.walk._builder
    for count in count_tiles(levels, builder):
        whole, masked = map(sum, zip(*(picture.segments[count.name] for picture in shown), strict=True))
        assert (whole, masked) == (count.full, count.masked)


@given(drawn())
@settings(max_examples=30)
def test_runs_are_what_the_raster_holds(case: tuple[sp.Pattern, Call]) -> None:
    pattern, call = case
    picture = show(pattern, call, tiles=(8, 8))
    found = torch.zeros(len(picture.segments), 2, call.q_heads, call.q_len, call.kv_len, dtype=torch.float64)
    for head in picture.heads:
        for run in picture.runs(head):
            assert run.head == head
            for kind in (0, 1):
                keys = run.keys[(run.keys >= 0) & (run.whole == bool(kind))]
                pairs = torch.ones(len(run.rows), len(keys), dtype=torch.float64)
                # added up: near diagonals lie in two tiles, masked so that a pair counts once
                found[run.segment, kind, head].index_put_((run.rows[:, None], keys), pairs, accumulate=True)
            if run.contiguous:
                tiles = [run.keys[(run.tile == t) & (run.keys >= 0)] for t in run.tile.unique()]
                assert all(bool((keys.diff() == 1).all()) for keys in tiles)
    assert torch.equal(found, picture.visited(call.q_len, call.kv_len))


def test_a_large_call_is_sampled_by_rows_and_says_so() -> None:
    """Regular patterns are the hard ones: a regular step would see all of them or nothing."""
    pattern = sp.where(lambda i, j: i % 16 == 0) | sp.sink(100)
    picture = sp.show(pattern, 2**15, 2**14)
    density, sampled = picture.density(50, 64)
    assert sampled
    assert torch.equal(density, picture.density(50, 64)[0])
    assert float(density[0, :, 1:].mean()) == pytest.approx(1 / 16, rel=0.3)
    torch.testing.assert_close(density[0, :, 0], (100 + 156 * density[0, :, 1]) / 256)
    assert "about" in picture.headline(50, 64)[1]


def test_of_many_row_tiles_some_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sp.show(BAND, 512, tiles=(8, 8)).visited(16, 16)
    monkeypatch.setattr(walk, "_MOST_TILES", 32)
    some = sp.show(BAND, 512, tiles=(8, 8)).visited(16, 16)
    assert not torch.equal(some, whole)
    torch.testing.assert_close(some.sum((0, 1)), whole.sum((0, 1)), atol=0.1, rtol=0.5)


def test_heads_that_are_alike_are_walked_once() -> None:
    shifted = sp.causal() & sp.stripe(8, cols=4, shift_per_head=1)
    for pattern, kinds in ((BAND, 1), (shifted, 4), (sp.per_head([BAND, sp.causal()] * 2), 2)):
        drawn = sp.show(pattern, 64, q_heads=4, heads=True, tiles=(8, 8)).subject.walk
        assert len(drawn._alike(0, range(4))) == kinds


def test_strips_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sp.show(BAND, 100).density(10, 10)[0]
    monkeypatch.setattr(subject, "_STRIP", 300)
    assert torch.equal(sp.show(BAND, 100).density(10, 10)[0], whole)


def test_the_default_tiling_is_the_kernels() -> None:
    picture = sp.show(
        sp.causal(), 256, q_heads=8, kv_heads=2, tiles=True, target="sm_90", dtype="bfloat16", head_dim=128
    )
    kernel = picture.subject.walk.kernel
    assert (kernel["dtype"], kernel["head_dim"]) == ("bfloat16", 128)
    assert f"in tiles of {kernel['block_m']} x {kernel['block_n']}" in str(picture)


def test_heads_that_share_a_row_tile() -> None:
    picture = sp.show(sp.causal(), 4, 64, q_heads=8, kv_heads=2, tiles=(32, 16), heads=True)
    assert picture.subject.walk.levels.pack == 4
    assert picture.visited(4, 64).shape == (1, 2, 8, 4, 64)
    assert picture.segments == {"s0": (2 * 3, 2 * 1)}


PLAIN = """\
causal() & (sink(2) | window(4))
12 rows x 12 keys: 39.6% of the pairs
┌────────────┐
│█▄          │
│███▄        │
│█████▄      │
│██ ▀███▄    │
│██   ▀███▄  │
│██     ▀███▄│
└────────────┘"""

TILES = """\
causal() & (sink(2) | window(4))
12 rows x 12 keys: 39.6% of the pairs, in tiles of 4 x 4
┌────────────┐
│aabb        │
│aabb        │
│aabbbbbb    │
│aabbbbbb    │
│aa   bbbbbbb│
│aa   bbbbbbb│
└────────────┘
A/a s0 range: 0 whole, 3 masked tiles
B/b s1 range: 0 whole, 5 masked tiles"""


def test_plain_text() -> None:
    assert plain(sp.show(BAND, 12), 80) == PLAIN
    shaded = plain(sp.show(sp.causal() & sp.stripe(4), 64), 18).splitlines()
    assert shaded[2] == f"┌{'─' * 16}┐"
    assert set("".join(line.strip("│") for line in shaded[3:-1])) == {"░", " "}
    assert all(len(line) == 18 for line in shaded[2:])


def test_plain_tiles() -> None:
    assert plain(sp.show(BAND, 12, tiles=(4, 4)), 80) == TILES
    whole = plain(sp.show(sp.sink(4) | sp.window(1), 12, tiles=(4, 4)), 80).splitlines()
    assert whole[3:9] == ["│AAAA        │"] * 2 + ["│AAAAbbbb    │"] * 2 + ["│AAAA    bbbb│"] * 2


def test_heads_stand_side_by_side() -> None:
    mixed = sp.per_head([sp.causal(), sp.window(2), sp.dense(), sp.sink(1)])
    text = plain(sp.show(mixed, 16, q_heads=4, heads=True), 80).splitlines()
    assert [line.count("head") for line in text if "head" in line and "per" not in line] == [3, 1]
    one = plain(sp.show(mixed, 16, q_heads=4, head=2), 80)
    assert "head 2" in one
    assert "100.0% of the pairs" in one


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 300), (300, 1), (3, 5), (1000, 10)])
@pytest.mark.parametrize("width", [8, 40, 200])
def test_every_shape_fits_the_width(q_len: int, kv_len: int, width: int) -> None:
    for tiles in (False, True):
        text = plain(sp.show(sp.dense(), q_len, kv_len, tiles=tiles), width).splitlines()
        assert max(map(len, text[2:4])) <= width
        assert "100.0%" in text[1]


def test_an_empty_call_is_drawn_as_nothing() -> None:
    assert "0.0% of the pairs" in str(sp.show(sp.causal(), 4, 0))


def test_rows_that_the_data_tell_apart_are_the_calls() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3, 5] = True
    density, _ = sp.show(sp.block(8, mask=mask), 64).density(8, 8)
    assert density[0].nonzero().tolist() == [[3, 5]]


def test_colours_are_rich_s_business() -> None:
    picture = sp.show(sp.causal(), 16, tiles=(8, 8))
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=60).print(picture)
    assert "\x1b[38;2;" in out.getvalue()
    assert out.getvalue().count("▀") >= 16 * 8
    assert "s0 range: 1 whole, 2 masked tiles" in out.getvalue()
    without = io.StringIO()
    Console(file=without, width=60, color_system=None).print(picture)
    assert without.getvalue().rstrip() == plain(picture, 60)


def test_python_shows_it() -> None:
    picture = sp.show(BAND, 12)
    assert repr(picture) == str(picture)
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert picture._repr_svg_().startswith("<?xml")


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_files(name: str, magic: bytes, tmp_path: Path) -> None:
    mixed = sp.per_head([BAND, sp.causal() & sp.columns([1, 9])])
    picture = sp.show(mixed, 40, q_heads=2, heads=True, tiles=(8, 8))
    picture.save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(magic)
    picture.save(str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == content, "the same picture, the same file"


def test_a_file_says_what_the_text_does(tmp_path: Path) -> None:
    picture = sp.show(BAND, 40, q_heads=2, heads=True, tiles=(8, 8))
    picture.save(tmp_path / "a.svg")
    words = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert "head 1" in words
    for name, (whole, masked) in picture.segments.items():
        assert f"{name} range: {whole} whole, {masked} masked tiles" in words


def test_a_file_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = sp.show(BAND, 12)
    for name in ("a.gif", "a"):
        with pytest.raises(SpgenError, match=r"(?s)ends in .*png, svg, pdf.*\.png, \.svg or \.pdf"):
            picture.save(tmp_path / name)
    with pytest.raises(SpgenError, match="No such file"):
        picture.save(tmp_path / "no" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ToolchainError, match=r"(?s)matplotlib: got not installed.*spgen\[show\]"):
        picture.save(tmp_path / "a.png")
    assert picture._repr_png_() is None
    assert picture._repr_svg_() is None
    assert "█" in str(picture)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"head": 2, "q_heads": 2}, ShapeError, "head: got 2"),
        ({"sequence": 1}, ShapeError, "sequence: got 1"),
        ({"q_heads": 4, "kv_heads": 3}, ShapeError, "kv_heads: got 3"),
        ({"pattern": sp.per_head([BAND] * 3), "q_heads": 2}, PatternError, "3 patterns"),
        ({"pattern": sp.block(8, mask=torch.ones(2, 2, dtype=torch.bool))}, ShapeError, "R = 2"),
        ({"pattern": "causal()"}, DtypeError, "pattern: got str"),
        ({"pattern": sp.top_k(4, scores=sp.pooled())}, UnsupportedError, "a selection"),
        ({"tiles": True, "target": "tpu"}, DeviceError, "device: got tpu"),
    ],
)
def test_what_cannot_be_drawn(options: dict[str, object], error: type[SpgenError], match: str) -> None:
    with pytest.raises(error, match=match):
        sp.show(**{"pattern": BAND, "q_len": 64, **options})  # type: ignore[arg-type]


def test_nothing_of_matplotlib_is_imported_before_it_is_needed() -> None:
    import subprocess

    code = "import sys, spgen as sp; str(sp.show(sp.causal(), 8)); assert not {'matplotlib', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
