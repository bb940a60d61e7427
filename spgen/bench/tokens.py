"""Patterns finer than blocks: listed tokens and diagonals, beside a block list of the same run.

The rate counts needed pairs. A tile of 64 rows visits every column that any of its rows needs, so a band of diagonals
as wide as the tile fills half of what is visited: `visited` is the share of visited pairs that are needed, the most
that any kernel with such tiles can reach of the rate of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.autotune.measure import Call, interleaved
from spgen.bench import peers
from spgen.bench.blocks import BlockList, Workload
from spgen.patterns import Pattern

_TILE = 64
_BLOCKS = 0.75  # sparsity of the block list beside them
_DENSITY = 0.25  # of the tokens, and of the offsets


@dataclass(frozen=True)
class Listed:
    """A pattern, how many pairs it holds, and how many a tile of 64 rows visits."""

    name: str
    pattern: Pattern
    needed: int
    visited: int


def listed(work: Workload) -> Iterator[Listed]:
    """Columns for all rows, tokens for 64 rows each, and bands of 64 and of 256 neighbouring diagonals."""
    generator = torch.Generator().manual_seed(2)
    length, heads = work.length, work.heads
    count = round(length * _DENSITY)

    def chosen(groups: int) -> Tensor:
        draw = torch.rand(heads, groups, length, generator=generator)
        return draw.argsort(-1)[..., :count].sort(-1).values.to(torch.int32)

    columns, last_rows = chosen(1)[:, 0], torch.arange(length)
    needed = sum(int((one <= last_rows[:, None]).sum()) for one in columns)
    yield Listed(f"{count} columns a head", sp.causal() & sp.columns(columns), needed, needed)
    groups = -(-length // _TILE)
    tokens = chosen(groups)[..., : count // 4].sort(-1).values
    pairs = heads * length * tokens.shape[-1]
    yield Listed(f"{count // 4} tokens for each 64 rows", sp.top_k(tokens, rows=_TILE), pairs, pairs)
    for width in (64, 256):
        bands = max(1, count // width)
        starts = torch.rand(heads, -(-length // width), generator=generator).argsort(-1)[:, :bands] * width
        offsets = (starts[..., None] + torch.arange(width)).flatten(1).to(torch.int32)
        needed, visited = _diagonal_pairs(offsets, length)
        yield Listed(f"{bands} bands of {width} diagonals", sp.causal() & sp.diagonals(offsets), needed, visited)


def _diagonal_pairs(offsets: Tensor, length: int) -> tuple[int, int]:
    """Pairs i - j in `offsets` [heads, n], and _TILE times the columns that each tile of rows touches."""
    first, j = torch.arange(0, length, _TILE)[:, None], torch.arange(length)
    stop = (first + _TILE).clamp(max=length)
    visited = 0
    for one in offsets.long():
        known = torch.zeros(length + 1, dtype=torch.long)
        known[one[one < length] + 1] = 1
        below = known.cumsum(0)  # how many offsets are below x
        touched = below[(stop - j).clamp(min=0)] > below[(first - j).clamp(min=0)]
        visited += _TILE * int(touched.sum())
    return int((length - offsets.long()).clamp(min=0).sum()), visited


def measure(work: Workload, rounds: int) -> list[dict[str, Any]]:
    """One row for each pattern; the plan is made before."""
    q, k, v = work.tensors()
    blocks = BlockList.random(work, _BLOCKS)
    calls: dict[str, Call] = {"blocks": _planned(blocks.pattern(), q, k, v), "sdpa causal": peers.sdpa_causal(q, k, v)}
    patterns = list(listed(work))
    calls |= {one.name: _planned(one.pattern, q, k, v) for one in patterns}
    taken = interleaved(calls, rounds=rounds)
    of_blocks = blocks.flops(1.0) / taken["blocks"]
    rows = []
    for one in patterns:
        rate = 4 * one.needed * work.head_dim / taken[one.name]
        rows.append({
            "pattern": one.name, "ms": {"spgen": round(taken[one.name] * 1e3, 3)},
            "faster_than": {"sdpa causal": round(taken["sdpa causal"] / taken[one.name], 2)},
            "gflops": round(rate / 1e9, 1), "of_blocks": round(rate / of_blocks, 3),
            "visited": round(one.needed / one.visited, 3),
            "error": {"spgen": float(f"{_error(calls[one.name](), q, k, v, one.pattern):.2g}")},
        })  # fmt: skip
    return rows


def _planned(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Call:
    attend = sp.attention(pattern)
    return partial(attend, q, k, v, plan=attend.plan(q, k))


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, samples: int = 8) -> float:
    """The largest difference to the oracle, in float64, on rows spread over the whole length."""
    mask = pattern.mask(q.shape[2], q_heads=q.shape[1], kv_heads=k.shape[1])
    rows = torch.linspace(0, q.shape[2] - 1, samples).long()
    wanted = reference.attention(q[:, :, rows], k, v, mask[..., rows, :])
    return float((out[:, :, rows].double() - wanted).abs().max())
