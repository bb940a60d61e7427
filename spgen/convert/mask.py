"""Dense masks as patterns: a closed form where the mask is one, else the largest blocks that it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from spgen.errors import DataError, DtypeError, ShapeError
from spgen.patterns import Pattern, block, causal, dense, documents, per_head, sink, where, window

# Below this many pairs a block is no longer cheaper than the pairs one by one.
_SMALLEST_BLOCK = 256
# What a pair costs in blocks of each size, and in a block where every pair is looked up.
_COSTS = {128: 1.0, 64: 1.0, 32: 1.05}
_LOOKED_UP = 1.5


def from_mask(mask: Tensor) -> Pattern:
    """The pattern of a dense mask [L, S], [H, L, S] or [B, H, L, S], exactly.

    bool or uint8: true where a query attends to a key. Floating point: an additive mask, 0 where it attends, -inf (or
    the dtype's lowest number) where it does not. H is 1, the key heads or the query heads of the call. The pattern
    serves calls with L rows and S keys; a row without keys gives 0.

    Causal masks, windows, prefixes, attention sinks, documents and mixtures of them by head become closed forms. Else
    the mask becomes blocks, and where it is finer than blocks, one boolean for each pair. Waits for the device.
    Raises DataError for an additive mask with other numbers, which is a bias.
    """
    wanted = _boolean(mask)
    for axis in (0, 1):
        if wanted.shape[axis] > 1 and bool((wanted == wanted.narrow(axis, 0, 1)).all()):
            wanted = wanted.narrow(axis, 0, 1)
    ways = (_closed_forms, _uniform_blocks, _blocks_and_pairs)
    return next(found for way in ways if (found := way(wanted)) is not None)


def _boolean(mask: Tensor) -> Tensor:
    """bool [B, H, L, S]."""
    if not isinstance(mask, Tensor):
        raise DtypeError("from_mask: mask", given=type(mask).__name__, allowed="a tensor")
    if mask.layout != torch.strided:
        raise DtypeError(
            "from_mask: mask", given=str(mask.layout), allowed="a dense tensor", remedy="use sp.from_sparse"
        )
    if mask.dim() not in (2, 3, 4) or 0 in mask.shape:
        raise ShapeError(
            "from_mask: mask", given=list(mask.shape), allowed="[L, S], [H, L, S] or [B, H, L, S], none of them 0"
        )
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        return _additive(mask)
    if mask.dtype != torch.uint8:
        given, allowed = str(mask.dtype), "bool, uint8, or an additive mask in floating point"
        raise DtypeError("from_mask: mask", given=given, allowed=allowed, remedy="convert it with mask != 0")
    return mask != 0


def _additive(mask: Tensor) -> Tensor:
    hidden = mask <= torch.finfo(mask.dtype).min
    strange = ~hidden & (mask != 0)
    if bool(strange.any()):
        place = tuple(strange.nonzero()[0].tolist())
        raise DataError(
            f"from_mask: mask at {place}", given=mask[place].item(), allowed="0 or -inf",
            remedy="a bias is no pattern: pass the pairs that count as a boolean mask",
        )  # fmt: skip
    return ~hidden


def _closed_forms(mask: Tensor) -> Pattern | None:
    """One closed form, or one for each head."""
    if mask.shape[0] > 1:
        return None
    known: list[tuple[Tensor, Pattern]] = []
    for head in mask[0]:
        found = next((form for other, form in known if torch.equal(other, head)), None)
        found = _closed_form(head) if found is None else found
        if found is None or (found.data and len(mask[0]) > 1):
            return None
        known.append((head, found))
    forms = [form for _, form in known]
    return forms[0] if len(forms) == 1 else per_head(forms)


def _closed_form(mask: Tensor) -> Pattern | None:
    """The first proposal that is the mask; most fail on its first, middle or last row."""
    rows, keys = mask.shape
    for proposal in _proposals(mask):
        samples = all(
            torch.equal(proposal.mask(1, keys, q_offset=row + keys - rows, device=mask.device)[0, 0, 0], mask[row])
            for row in {0, rows // 2, rows - 1}
        )
        if samples and torch.equal(proposal.mask(rows, keys, device=mask.device)[0, 0], mask):
            return proposal
    return None


def _proposals(mask: Tensor) -> Iterator[Pattern]:
    """Closed forms that the last row and the first one with keys beyond its prefix suggest."""
    rows, keys = mask.shape
    yield from (dense(), ~dense(), causal())
    last = _runs(mask[-1])
    if not last:
        return
    prefix = last[0][1] if last[0][0] == 0 else 0
    beyond = mask[:, prefix:].any(1)
    row = int((beyond if bool(beyond.any()) else mask.any(1)).int().argmax())
    first = _runs(mask[row])
    left, right = keys - last[-1][0], first[-1][1] - 1 - (row + keys - rows)
    yield sink(last[-1][1])
    yield causal() & window(left)
    yield causal() & (sink(prefix) | window(left))
    yield causal() | sink(first[-1][1])
    if right >= 0:
        yield window(left, right)
        yield window(left, right) | sink(prefix)
    yield where(lambda i, j: j <= i + right)
    yield where(lambda i, j: (j <= i + right) & (i - left < j))
    if rows == keys:
        starts = mask.int().argmax(-1)
        boundaries = torch.cat([starts.unique(), starts.new_full((1,), keys)]).to(torch.int32)
        yield documents(boundaries)
        yield causal() & documents(boundaries)


def _runs(row: Tensor) -> list[tuple[int, int]]:
    """Where the true entries of a row start and stop."""
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _uniform_blocks(mask: Tensor) -> Pattern | None:
    """Blocks of one size, none of them partial: rows and keys change at multiples of it only."""
    rows, cols = (_period(mask, axis) for axis in (2, 3))
    if rows * cols < _SMALLEST_BLOCK:
        return None
    return block(rows, cols, mask=mask[:, :, ::rows, ::cols].contiguous())


def _period(mask: Tensor, axis: int) -> int:
    """The largest size of blocks along an axis; at most its length."""
    length = mask.shape[axis]
    others = [other for other in range(4) if other != axis]
    changed = (mask.narrow(axis, 1, length - 1) != mask.narrow(axis, 0, length - 1)).sum(others).nonzero()
    return gcd(*(changed.flatten() + 1).tolist()) or length


def _blocks_and_pairs(mask: Tensor) -> Pattern:
    """Whole blocks of the best size, and the pairs of the others one by one."""
    sizes = {size: _whole(mask, size) for size in _COSTS}
    best = min(sizes, key=lambda size: _cost(size, *sizes[size]))
    whole, _ = sizes[best]
    if not bool(whole.any()):
        return block(1, mask=mask.contiguous())
    inside = whole.repeat_interleave(best, 2).repeat_interleave(best, 3)[:, :, : mask.shape[2], : mask.shape[3]]
    return block(best, mask=whole) | block(1, mask=mask & ~inside)


def _whole(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(blocks that are all true, blocks that are partly true)."""
    edges = (0, -mask.shape[3] % size, 0, -mask.shape[2] % size)

    def tiled(outside: bool) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(mask, edges, value=outside)
        tiles: Tensor = padded.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return tiles

    full, touched = tiled(True).all(5).all(3), tiled(False).any(5).any(3)
    return full, touched & ~full


def _cost(size: int, full: Tensor, partial: Tensor) -> float:
    return size * size * float(full.sum() * _COSTS[size] + partial.sum() * _LOOKED_UP)


__all__ = ["from_mask"]
