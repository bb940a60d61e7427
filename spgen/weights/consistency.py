"""Whether an index that comes from outside describes the values beside it: kernels trust it, and read where it says."""

from __future__ import annotations

import torch
from torch import Tensor

from spgen.errors import DataError
from spgen.weights.storage import WORD, Stored, bits_of, block_index, block_rows

_REMEDY = "save the layer that the state is of again"


def check_consistent(name: str, stored: Stored) -> None:
    """Check the index of the weight `name`, whose tensors have the shapes of its layout, but for counts of values.

    Raises DataError naming the first entry that is wrong. Waits for the device.
    """
    _CHECKS[stored.layout.kind](name, stored)


def _check_blocks(name: str, stored: Stored) -> None:
    bounds, columns = stored.index[:2]
    width, count = -(-stored.shape[1] // stored.layout.cols), len(stored.values)
    _refuse(f"{name}index_0", bounds[:1] != 0, bounds[:1], "0")
    _refuse(f"{name}index_0", bounds.diff() < 0, bounds[1:], "numbers that do not fall", 1)
    _refuse(f"{name}index_0", bounds[-1:] != count, bounds[-1:], f"{count}, the number of blocks", len(bounds) - 1)
    _same_length(f"{name}index_1", columns, count)
    _refuse(f"{name}index_1", (columns < 0) | (columns >= width), columns, f"0 to {width - 1}")
    rows = block_rows(stored)
    falls = (columns.diff() <= 0) & (rows.diff() == 0)
    _refuse(f"{name}index_1", falls, columns[1:], "columns that rise in each block row", 1)
    right = block_index(rows, columns.long(), len(bounds) - 1, width)
    for number in range(2, len(right)):
        given = stored.index[number]
        _same_length(f"{name}index_{number}", given, len(right[number]))
        _refuse(f"{name}index_{number}", given != right[number], given, "what index_0 and index_1 say")


def _check_n_of_m(name: str, stored: Stored) -> None:
    n, m = stored.layout.rows, stored.layout.cols
    kept = bits_of(stored.index[0]).flatten(1)
    counts = kept.unflatten(-1, (-1, m)).sum(-1)
    _refuse(
        f"{name}index_0", counts > n, counts, f"at most {n} of {m} columns marked", unit=f" (groups of {m} columns)"
    )
    _beyond(name, kept, stored.shape[1])


def _check_bitmap(name: str, stored: Stored) -> None:
    words, offsets = stored.index
    kept = bits_of(words)
    counts = kept.flatten(0, 1).sum(-1).cumsum(0)
    total = int(counts[-1]) if len(counts) else 0
    _same_length(f"{name}values", stored.values, total + WORD)
    right = torch.cat((counts.new_zeros(1), counts))[:-1].view_as(offsets)
    _refuse(f"{name}index_1", offsets != right, offsets, "the number of columns that are marked before")
    _beyond(name, kept.flatten(1), stored.shape[1])


_CHECKS = {"blocks": _check_blocks, "n_of_m": _check_n_of_m, "bitmap": _check_bitmap}


def _beyond(name: str, kept: Tensor, width: int) -> None:
    _refuse(
        f"{name}index_0", kept[:, width:], kept[:, width:], f"no column from {width} on marked", width, " (columns)"
    )


def _same_length(subject: str, given: Tensor, wanted: int) -> None:
    if len(given) != wanted:
        raise DataError(subject, given=f"{len(given)} entries", allowed=f"{wanted}", remedy=_REMEDY)


def _refuse(subject: str, wrong: Tensor, given: Tensor, allowed: str, first: int = 0, unit: str = "") -> None:
    """`wrong` says which entries of `given` are; the last axis of the tensor begins at `first`."""
    places = wrong.nonzero()
    if len(places):
        *rows, last = places[0].tolist()
        value = given[tuple(places[0].tolist())].item()
        where = ", ".join(map(str, [*rows, last + first]))
        raise DataError(f"{subject}[{where}]{unit}", given=value, allowed=allowed, remedy=_REMEDY)
