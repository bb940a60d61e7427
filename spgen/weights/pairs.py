"""Pairs of lists of blocks that have columns in common: what both need of x is brought once for the two.

Kernels of narrow blocks wait for x, of which every block takes a tile of its own. Two block rows with a tenth of all
blocks each, drawn at random, have 5 % of their tiles in common; matched among 448 of them, 17 %.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOWHERE = 2**30  # as a column or a place: outside of every tensor
_AT_ONCE = 512  # lists among which partners are looked for


class Pairs(NamedTuple):
    """Lists of blocks by twos, the longest first; all int32.

    lists    [P, 2]  numbers of a pair's lists; the second -1 where one is left over
    bounds   [P, 4]  its entries: `bounds[p, 0]` to `[1]` blocks of both lists in a column, to `[2]` of the first alone,
                     to `[3]` of the second alone
    columns  [U]     of the blocks; `NOWHERE` in entries that fill a step up
    places   [U, 2]  where the values of the first and of the second list's block are; `NOWHERE` where there is none
    """

    lists: Tensor
    bounds: Tensor
    columns: Tensor
    places: Tensor


def pairs_of(indptr: Tensor, columns: Tensor, places: Tensor | None = None, per: int = 1) -> Pairs:
    """Pairs of the lists `indptr` [R + 1] of `columns` [count], whose values are at `places` (None: in their order).

    A list's columns differ. Partners are those with the most columns in common that are still free, among 512 lists a
    maximal matching of at least half the best weight (Drake and Hougardy, "A simple approximation algorithm for the
    weighted matching problem", 2003, section 1). Each kind of entries of a pair is filled up to a multiple of `per`.
    Tensors are on the device of `indptr`.
    """
    device, count = columns.device, len(columns)
    lengths = indptr.long().diff()
    n_lists, n_columns = len(lengths), int(columns.max()) + 1 if count else 1
    list_of = torch.repeat_interleave(torch.arange(n_lists, device=device), lengths, output_size=count)
    held = torch.full((n_lists + 1, n_columns), NOWHERE, dtype=torch.int32, device=device)  # the last: of no list
    held[list_of, columns.long()] = torch.arange(count, device=device).int() if places is None else places.int()
    lists = torch.tensor(_partners(held[:-1] < NOWHERE), dtype=torch.int64, device=device).view(-1, 2)
    first, second = held[lists[:, 0]], held[lists[:, 1]]
    in_first, in_second = first < NOWHERE, second < NOWHERE
    longest = (in_first | in_second).sum(1).argsort(descending=True, stable=True)
    lists, first, second = lists[longest], first[longest], second[longest]
    in_first, in_second = in_first[longest], in_second[longest]
    kinds = torch.stack((in_first & in_second, in_first & ~in_second, in_second & ~in_first), 1)
    pair, kind, column = kinds.nonzero(as_tuple=True)
    counts = kinds.sum(2).flatten()
    filled = -(-counts // per) * per
    starts = torch.cat((filled.new_zeros(1), filled.cumsum(0)))
    before = torch.cat((counts.new_zeros(1), counts.cumsum(0)))[:-1]
    group = pair * 3 + kind
    at = starts[group] + torch.arange(len(group), device=device) - before[group]
    total = int(starts[-1])
    all_columns = torch.full((total,), NOWHERE, dtype=torch.int32, device=device)
    all_columns[at] = column.int()
    all_places = torch.full((total, 2), NOWHERE, dtype=torch.int32, device=device)
    all_places[at] = torch.stack((first[pair, column], second[pair, column]), 1)
    bounds = starts[3 * torch.arange(len(lists), device=device)[:, None] + torch.arange(4, device=device)]
    lists = torch.where(lists == n_lists, -1, lists)
    return Pairs(lists.int(), bounds.int().contiguous(), all_columns, all_places)


def _partners(held: Tensor) -> list[tuple[int, int]]:
    """Every list once, by twos; the number of lists stands for none."""
    partners = []
    for start in range(0, len(held), _AT_ONCE):
        some = held[start : start + _AT_ONCE].float()
        partners += [(start + a, start + b if b < len(some) else len(held)) for a, b in _matched(some @ some.T)]
    return partners


def _matched(common: Tensor) -> list[tuple[int, int]]:
    """Pairs by falling `common` [n, n]; a last one without partner has n for it."""
    size = len(common)
    a, b = torch.triu_indices(size, size, 1, device=common.device)
    order = common[a, b].argsort(descending=True, stable=True)
    free, found = [True] * size, []
    for one, other in zip(a[order].tolist(), b[order].tolist(), strict=True):
        if free[one] and free[other]:
            free[one] = free[other] = False
            found.append((one, other))
    return found + [(one, size) for one in range(size) if free[one]]
