"""Pictures in files and notebooks, through matplotlib."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spgen.drawing.colours import EMPTY, picture, segment_colour
from spgen.errors import SpgenError, ToolchainError

if TYPE_CHECKING:
    from spgen.drawing import Picture

FORMATS = ("png", "svg", "pdf")
_CELLS = 512  # of a picture's side
_OUTLINES = 4000  # with more tiles than this their outlines would hide them
_PANEL = 3.4  # inches


def save(shown: Picture, path: Path) -> None:
    """Write a picture; raises SpgenError for another ending and for a file that cannot be written."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise SpgenError(
            str(path), given=f"a name that ends in {path.suffix or 'nothing'}", allowed=", ".join(FORMATS),
            remedy="end the name in .png, .svg or .pdf",
        )  # fmt: skip
    content = render(shown, kind)
    try:
        path.write_bytes(content)
    except OSError as fault:
        raise SpgenError(str(path), given=fault.strerror or str(fault), remedy="choose another place") from fault


def render(shown: Picture, kind: str) -> bytes:
    """The bytes of a file of this kind, the same for the same picture; raises ToolchainError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ToolchainError(
            "matplotlib", given="not installed", allowed="matplotlib 3.8 or later, to draw into files",
            remedy="pip install 'spgen[show]'; in a terminal pictures need no matplotlib",
        ) from None  # fmt: skip
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "spgen", "font.size": 8, "svg.fonttype": "none"}):
        date = {"pdf": "CreationDate", "svg": "Date"}.get(kind)
        _figure(shown).savefig(out, format=kind, dpi=160, metadata={date: None} if date else None)
    return out.getvalue()


def _figure(shown: Picture) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heads = len(shown.heads)
    across = math.ceil(heads**0.5)
    down = -(-heads // across)
    q_len, kv_len = shown.lengths
    figure = Figure(figsize=(_PANEL * across, _PANEL * down * min(max(q_len / max(kv_len, 1), 0.3), 3) + 0.8),
                    layout="constrained")  # fmt: skip
    cells = picture(shown, max(1, min(q_len, _CELLS)), max(1, min(kv_len, _CELLS)))
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for n, axis in enumerate(axes):
        if n >= heads:
            axis.set_axis_off()
            continue
        axis.imshow(cells[n].numpy(), extent=(0, kv_len, q_len, 0), interpolation="nearest", aspect="auto")
        axis.set_xlim(0, kv_len)
        axis.set_ylim(q_len, 0)
        axis.set_title(shown.title(n))
        _outline(shown, n, axis)
    for axis in axes[:heads]:
        axis.set(xlabel="key j", ylabel="row r")
    figure.suptitle(shown.headline(*cells.shape[1:3])[0], wrap=True)
    patches = [
        Patch(facecolor=segment_colour(n), edgecolor=EMPTY,
              label=f"{name} {shown.source(name)}: {whole:,} whole, {masked:,} masked tiles")
        for n, (name, (whole, masked)) in enumerate(shown.segments.items())
    ]  # fmt: skip
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 2), frameon=False)
    return figure


def _outline(shown: Picture, number: int, axis: Any) -> None:
    """A line around each tile of adjacent keys, where there are few enough to be seen."""
    from matplotlib.collections import PolyCollection

    if sum(whole + masked for whole, masked in shown.segments.values()) > _OUTLINES:
        return
    corners = []
    for run in shown.runs(shown.heads[number]):
        if not run.contiguous or not len(run.rows) or bool((run.rows.diff() != 1).any()):
            continue
        top, bottom = int(run.rows[0]), int(run.rows[-1]) + 1
        for tile in run.tile.unique():
            keys = run.keys[(run.tile == tile) & (run.keys >= 0)]
            if len(keys) and not bool((keys.diff() != 1).any()):
                left, right = int(keys[0]), int(keys[-1]) + 1
                corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    axis.add_collection(PolyCollection(corners, facecolors="none", edgecolors=(1, 1, 1, 0.45), linewidths=0.4))
