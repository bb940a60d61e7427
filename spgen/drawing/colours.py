"""Colours of cells: how dense a mask is, which segment walks a tile, and whether it is masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spgen.drawing import Picture

Rgb: TypeAlias = "list[float]"

EMPTY = (0.09, 0.10, 0.13)
_PAIRS = (0.45, 0.75, 0.98)
# of Okabe and Ito: told apart by colour-blind eyes, too
SEGMENTS = (
    (0.90, 0.62, 0.00), (0.34, 0.71, 0.91), (0.00, 0.62, 0.45), (0.94, 0.89, 0.26), (0.80, 0.47, 0.65),
    (0.84, 0.37, 0.00), (0.30, 0.50, 0.90),
)  # fmt: skip
_FAINTEST = 0.2  # what the rarest pair still shows
_FAINTEST_TILE = 0.45
_MASKED = (0.3, 0.7)  # the strength of a masked tile: with none of its pairs, with all


def segment_colour(number: int) -> tuple[float, float, float]:
    """The colour of a segment's tiles."""
    return SEGMENTS[number % len(SEGMENTS)]


def picture(shown: Picture, rows: int, cols: int) -> Tensor:
    """The colour of each cell, float [heads, rows, cols, 3]."""
    density, _ = shown.density(rows, cols)
    if not shown.tiled:
        strength = torch.where(density > 0, _FAINTEST + (1 - _FAINTEST) * density.sqrt(), 0)
        return _mixed(torch.tensor(_PAIRS).expand(*density.shape, 3), strength)
    covered = shown.visited(rows, cols)
    most = covered.sum(1).max(0)
    palette = torch.tensor([segment_colour(n) for n in range(max(len(covered), 1))])
    whole = covered[:, 1].sum(0).clamp(max=1)
    walked = covered.sum((0, 1)).clamp(max=1)
    useful = torch.where(walked > 0, (density / walked.clamp(min=1e-9)).clamp(0, 1), 0)
    masked = _MASKED[0] + (_MASKED[1] - _MASKED[0]) * useful
    share = torch.where(walked > 0, whole / walked.clamp(min=1e-9), 0)
    strength = (share + (1 - share) * masked) * walked.sqrt().clamp(min=_FAINTEST_TILE) * (walked > 0)
    return _mixed(palette[most.indices], strength)


def _mixed(colour: Tensor, strength: Tensor) -> Tensor:
    empty = torch.tensor(EMPTY)
    return (empty + (colour - empty) * strength.float()[..., None]).clamp(0, 1)
