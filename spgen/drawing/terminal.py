"""Pictures for terminals: shades and letters as plain text, half-blocks in colour through rich."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from spgen.drawing.colours import Rgb, picture

if TYPE_CHECKING:
    from rich.text import Text

    from spgen.drawing import Picture

_SHADES = " ░▒▓█"
_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
_GAP = "  "
T = TypeVar("T")


def size(heads: int, q_len: int, kv_len: int, width: int) -> tuple[int, int, int]:
    """(rows, columns, panels side by side) for pictures of square cells, two of them in a character."""
    side_by_side = max(1, min(heads, width // 22))
    room = (width - len(_GAP) * (side_by_side - 1)) // side_by_side - 2  # the frame
    cols = max(1, min(kv_len, room))
    rows = max(1, min(q_len, round(cols * q_len / max(kv_len, 1)), 4 * cols))
    return rows, cols, side_by_side


def plain(picture: Picture, width: int) -> str:
    """The picture without colours: a character is two cells, one above the other."""
    rows, cols, side_by_side = size(len(picture.heads), *picture.lengths, width)
    density, _ = picture.density(rows, cols)
    if picture.tiled:
        covered = picture.visited(rows, cols)
        panels = [_letters(covered[:, :, n]) for n in range(len(picture.heads))]
    else:
        panels = [_shaded(panel) for panel in density]
    framed = [_framed(lines, picture.title(n), cols) for n, lines in enumerate(panels)]
    return "\n".join([*picture.headline(rows, cols), *_beside(framed, side_by_side, _join), *_legend(picture)])


def plain_text(picture: Picture, width: int) -> Text:
    """`plain` for rich, which must not break its lines."""
    from rich.text import Text

    return Text(plain(picture, width), no_wrap=True, overflow="ignore")


def coloured(picture: Picture, width: int) -> Text:
    """The picture in colours; rich reduces them to what the terminal has."""
    from rich.text import Text

    rows, cols, side_by_side = size(len(picture.heads), *picture.lengths, width)
    panels = [
        [Text(picture.title(n)[:cols].ljust(cols)), *_half_blocks(picture_of)]
        for n, picture_of in enumerate(_colours(picture, rows, cols))
    ]
    lines = _beside(panels, side_by_side, lambda row: Text(_GAP).join(row))
    legend = []
    for name, text in zip(picture.segments, _legend(picture), strict=True):
        legend.append(Text.assemble(("■ ", _style(picture.colour(name))), text.partition(" ")[2]))
    return Text("\n").join([*map(Text, picture.headline(rows, cols)), *lines, *legend])


def _colours(shown: Picture, rows: int, cols: int) -> list[list[list[Rgb]]]:
    return picture(shown, rows, cols).tolist()


def _style(rgb: Sequence[float], behind: Sequence[float] | None = None) -> str:
    def hexadecimal(colour: Sequence[float]) -> str:
        return "#" + "".join(f"{round(255 * part):02x}" for part in colour)

    return hexadecimal(rgb) + (f" on {hexadecimal(behind)}" if behind is not None else "")


def _half_blocks(cells: list[list[Rgb]]) -> list[Text]:
    from rich.text import Text

    lines = []
    for at in range(0, len(cells), 2):
        above, below = cells[at], cells[at + 1] if at + 1 < len(cells) else None
        line = Text()
        for n, colour in enumerate(above):
            line.append("▀", _style(colour, below[n] if below is not None else None))
        lines.append(line)
    return lines


def _pairs(cells: Tensor) -> Tensor:
    """Rows two by two, [..., lines, 2, cols]; a row that is alone stands for two."""
    import torch

    if cells.shape[-2] % 2:
        cells = torch.cat([cells, cells[..., -1:, :]], -2)
    paired: Tensor = cells.unflatten(-2, (-1, 2))
    return paired


def _shaded(density: Tensor) -> list[str]:
    pairs = _pairs(density)
    if bool(((density == 0) | (density == 1)).all()):
        alone = density.shape[0] % 2
        lines = ["".join(_HALVES[a > 0, b > 0] for a, b in line.mT.tolist()) for line in pairs]
        return [*lines[:-1], lines[-1].replace("█", "▀")] if alone else lines
    return ["".join(_shade(value) for value in line.tolist()) for line in pairs.mean(-2)]


def _shade(value: float) -> str:
    """Blank for nothing and full for everything, whatever rounding says."""
    if value <= 0 or value >= 1:
        return _SHADES[-1] if value >= 1 else _SHADES[0]
    return _SHADES[1 + min(int(3 * value), 2)]


def _letters(covered: Tensor) -> list[str]:
    """The segment that covers most of each character: A, B, … for whole tiles, a, b, … for masked ones."""
    pairs = _pairs(covered).mean(-2)
    most = pairs.flatten(0, 1).max(0)
    return [
        "".join(" " if value <= 0 else letter(at // 2, at % 2 == 1) for value, at in zip(*line, strict=True))
        for line in zip(most.values.tolist(), most.indices.tolist(), strict=True)
    ]


def letter(segment: int, whole: bool) -> str:
    """The sign of a segment's tiles."""
    sign = chr(ord("a") + segment % 26)
    return sign.upper() if whole else sign


def _framed(lines: list[str], title: str, cols: int) -> list[str]:
    head = f"┌{title[:cols].center(cols, '─')}┐" if title else f"┌{'─' * cols}┐"
    return [head, *(f"│{line}│" for line in lines), f"└{'─' * cols}┘"]


def _join(row: Sequence[str]) -> str:
    return _GAP.join(row)


def _beside(panels: Sequence[list[T]], side_by_side: int, join: Callable[[Sequence[T]], T]) -> list[T]:
    lines = []
    for at in range(0, len(panels), side_by_side):
        lines += [join(row) for row in zip(*panels[at : at + side_by_side], strict=True)]
    return lines


def _legend(picture: Picture) -> list[str]:
    return [
        f"{letter(n, True)}/{letter(n, False)} {name} {picture.source(name)}: {whole:,} whole, {masked:,} masked tiles"
        for n, (name, (whole, masked)) in enumerate(picture.segments.items())
    ]
