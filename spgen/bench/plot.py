"""Results as pictures, through matplotlib: rates over sparsity for each contender, and bars for patterns.

A picture carries a digest of what it shows, so that a stale one is found without drawing it anew.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from spgen.bench.report import peers, sections, title, unit
from spgen.bench.result import OURS, Result, Row
from spgen.errors import SpgenError, ToolchainError

FORMATS = (".png", ".svg")
_COLOURS = {
    OURS: "#d62728", "cudnn": "#7f7f7f", "flash": "#bcbd22", "sdpa": "#7f7f7f", "sdpa-mask": "#c7c7c7",
    "flex": "#1f77b4", "dense": "#7f7f7f", "onednn": "#c7c7c7",
    "torch-bsr": "#1f77b4", "cusparselt": "#2ca02c", "flash-attn-4": "#9467bd", "flashinfer": "#2ca02c",
    "minference": "#ff7f0e",
}  # fmt: skip
_WIDTH, _HEIGHT = 4.2, 3.0  # inches of a panel of lines
_BAR = 0.36  # inches of a pattern


def check(path: Path) -> None:
    """Raises SpgenError for another ending, ToolchainError without matplotlib: before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise SpgenError(
            str(path), given=f"a name that ends in {path.suffix or 'nothing'}", allowed=" or ".join(FORMATS),
            remedy="end the name in .svg or .png",
        )  # fmt: skip
    _matplotlib()


def save(result: Result, path: Path) -> None:
    """Write the picture; raises the errors of `check`, and SpgenError for a file that cannot be written."""
    check(path)
    content = render(result, path.suffix[1:].lower())
    try:
        path.write_bytes(content)
    except OSError as fault:
        raise SpgenError(str(path), given=fault.strerror or str(fault), remedy="choose another place") from fault


def render(result: Result, kind: str) -> bytes:
    """The bytes of a file of this kind, `png` or `svg`; the same for the same result and matplotlib."""
    matplotlib, out = _matplotlib(), io.BytesIO()
    metadata = {"Description": description(result)} | ({"Date": None} if kind == "svg" else {})
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "spgen",
            "svg.fonttype": "none",
            "font.size": 8,
            "font.sans-serif": ["DejaVu Sans", "sans-serif"],
        }
    ):
        _figure(result).savefig(out, format=kind, dpi=160, metadata=metadata)
    return out.getvalue()


def description(result: Result) -> str:
    """What the file says of itself: the suite, and a digest of the figures that are drawn."""
    text = json.dumps(_drawn(result), sort_keys=True)
    return f"spgen bench {result.suite}, sha256 of its figures: {hashlib.sha256(text.encode()).hexdigest()}"


def _drawn(result: Result) -> list[Any]:
    return [
        [row.section, row.case, row.work["length"], row.sparsity, row.peak_gflops, name, entry.gflops]
        for row in result.rows
        for name, entry in row.entries.items()
    ]


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ToolchainError(
            "matplotlib", given="not installed", allowed="matplotlib 3.8 or later, to draw into files",
            remedy="pip install 'spgen[show]'",
        ) from None  # fmt: skip
    return matplotlib


def _figure(result: Result) -> Any:
    from matplotlib.figure import Figure

    lines = [panel for panel in _panels(result) if _swept(panel[1])]
    bars = [panel for panel in _panels(result) if not _swept(panel[1])]
    heights = [_HEIGHT] * bool(lines) + [max(_HEIGHT / 2, _BAR * len(rows) + 0.7) for _, rows in bars]
    figure = Figure(figsize=(_WIDTH * max(len(lines), 2), sum(heights) + 0.4), layout="constrained")
    strips = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if lines:
        for axis, (name, rows) in zip(strips[0].subplots(1, len(lines), squeeze=False).flat, lines, strict=True):
            _lines(axis, name, rows, result)
    for strip, (name, rows) in zip(strips[len(heights) - len(bars) :], bars, strict=True):
        _bars(strip.subplots(), name, rows, result)
    handles: dict[str, Any] = {}
    for axis in (axis for strip in strips for axis in strip.axes):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return figure


def _panels(result: Result) -> list[tuple[str, list[Row]]]:
    """The sections; those that sweep sparsity fall apart by length."""
    found: dict[str, list[Row]] = {}
    for section, rows in sections(result).items():
        lengths = {row.work["length"] for row in rows} if _swept(rows) else set()
        for row in rows:
            apart = f", {row.work['length'] // 1024}K" if len(lengths) > 1 else ""
            found.setdefault(section + apart, []).append(row)
    return list(found.items())


def _swept(rows: list[Row]) -> bool:
    return all(row.sparsity is not None for row in rows)


def _lines(axis: Any, name: str, rows: list[Row], result: Result) -> None:
    """The rate of needed work over sparsity; the ceiling of arithmetic above."""
    label, scale = unit(result)
    for contender in [OURS, *peers(rows)]:
        points = [
            (place, rate / scale)
            for place, row in enumerate(rows)
            if contender in row.entries and (rate := row.entries[contender].gflops) is not None
        ]
        if points:
            width = 2 if contender == OURS else 1.2
            axis.plot(*zip(*points, strict=True), "o-", label=title(contender), color=_colour(contender),
                      linewidth=width, markersize=3)  # fmt: skip
    peaks = [(place, row.peak_gflops / scale) for place, row in enumerate(rows) if row.peak_gflops is not None]
    if peaks:
        axis.plot(*zip(*peaks, strict=True), "--", label="ceiling", color="black", linewidth=0.8)
    axis.set(title=name, xlabel="sparsity", ylabel=f"{label} of needed work", ylim=(0, None))
    axis.set_xticks(range(len(rows)), [f"{row.sparsity:.0%}" for row in rows])


def _bars(axis: Any, name: str, rows: list[Row], result: Result) -> None:
    """A group of bars for each case, from above."""
    label, scale = unit(result)
    contenders = [OURS, *peers(rows)]
    height = 0.8 / len(contenders)
    for number, contender in enumerate(contenders):
        rates = [row.entries[contender].gflops if contender in row.entries else None for row in rows]
        places = [place + number * height for place, rate in enumerate(rates) if rate is not None]
        axis.barh(places, [rate / scale for rate in rates if rate is not None], height, align="edge",
                  label=title(contender), color=_colour(contender))  # fmt: skip
    axis.set_yticks([place + 0.4 for place in range(len(rows))], [row.case for row in rows])
    axis.invert_yaxis()
    axis.set(title=name, xlabel=f"{label} of needed work")


def _colour(contender: str) -> str:
    return _COLOURS.get(contender, "#17becf")
