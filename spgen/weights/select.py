"""What a pattern over weights holds: selections by magnitude become data, data become a mask and a storage.

block(64, density=0.1) over w  ->  block(64, mask=…) of the tenth of blocks with the largest norms  ->  blocks(64, 64)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spgen import patterns
from spgen.errors import DataError, PatternError, ShapeError, UnsupportedError
from spgen.ir.node import Op, walk
from spgen.ir.pattern import is_selected, short_text
from spgen.patterns import Pattern
from spgen.reference import mask
from spgen.weights.storage import Layout, Stored, pack

SCORES = ("magnitude()", "wanda()")
_CHUNK = 1 << 24  # pairs of a mask that are decided at a time
_SQUARES = (64, 32, 16)  # blocks that are tried for patterns that name none
_BITMAP_PAYS = 0.75  # of the blocks' bytes: products of blocks are faster than bitmaps' for the same bytes


def scores_of(weight: Tensor, inputs: Tensor | None = None) -> Tensor:
    """By what weights [N, K] rank: their magnitudes, float32, times the norms [K] of their inputs if given (Wanda)."""
    found = weight.detach().abs().float()
    return found if inputs is None else found * inputs.to(found)


def resolved(pattern: Pattern, weight: Tensor, inputs: Tensor | None = None) -> Pattern:
    """The pattern with every selection replaced by what it selects of `weight` [N, K].

    Blocks rank by the sum of their scores' squares (their Frobenius norm), columns of `top_k` likewise, `n_of_m` by the
    scores themselves. Ties go to the lower index. Raises UnsupportedError for scores that rank attention, or for
    `wanda()` without `inputs` (norms of the inputs, [K]).
    """
    if not any(is_selected(op) for op in walk(pattern.node)):
        return pattern
    return _Resolver(weight, inputs, pattern).of(pattern.node)


class _Resolver:
    def __init__(self, weight: Tensor, inputs: Tensor | None, pattern: Pattern) -> None:
        self.weight, self.inputs, self.whole = weight, inputs, pattern

    def of(self, op: Op) -> Pattern:
        """The pattern of one node."""
        if not is_selected(op):
            return self._with_data(op)
        if op["scores"] not in SCORES or op.kind not in ("block", "top_k", "n_of_m"):
            raise UnsupportedError(
                f"pattern: {short_text(op)}", given="a selection that does not rank weights",
                allowed="block, top_k and n_of_m with scores=magnitude() or wanda()",
            )  # fmt: skip
        if op["scores"] == "wanda()" and self.inputs is None:
            raise UnsupportedError(
                f"pattern: {short_text(op)}", given="no inputs", allowed="norms of the weight's inputs, [K]",
                remedy="pass inputs=, or calibrate through sp.sparsify(model, …, calibration=batches)",
            )  # fmt: skip
        scores = scores_of(self.weight, self.inputs if op["scores"] == "wanda()" else None)
        if op.operands:  # among
            wanted = mask_of(self.of(op.operands[0]), self.weight)
            scores = scores.masked_fill(~wanted, -1.0)
        return _SELECTED[op.kind](op, scores)

    def _with_data(self, op: Op) -> Pattern:
        if op.kind in ("or", "and", "not"):
            inner = [self.of(operand) for operand in op.operands]
            return inner[0] | inner[1] if op.kind == "or" else inner[0] & inner[1] if op.kind == "and" else ~inner[0]
        if any(is_selected(inner) for inner in walk(op)):
            raise UnsupportedError(
                f"pattern: {short_text(op)}",
                given=f"a selection inside {op.kind}",
                allowed="selections under |, & and ~",
            )
        return patterns.part(self.whole, op)


def largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` of the last axis are largest, ties to the lower index; what scores below 0 never wins."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return chosen & (scores >= 0)


def tiled_scores(scores: Tensor, rows: int, cols: int) -> Tensor:
    """Norms of blocks [R, C] of scores [N, K]; blocks without candidates are below 0."""
    n, k = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -k % cols, 0, -n % rows), value=-1.0)
    tiles = padded.view(-(-n // rows), rows, -(-k // cols), cols)
    norms = tiles.clamp(min=0).square().sum((1, 3)).sqrt()
    return torch.where((tiles >= 0).any(3).any(1), norms, -1.0)


def _blocks(op: Op, scores: Tensor) -> Pattern:
    norms = tiled_scores(scores, op["rows"], op["cols"])
    count = max(1, math.floor(op["density"] * norms.numel() + 0.5))
    return patterns.block(op["rows"], op["cols"], mask=largest(norms.flatten(), count).view_as(norms))


def _columns(op: Op, scores: Tensor) -> Pattern:
    norms = tiled_scores(scores, op["rows"], op["cols"])
    chosen = largest(norms, min(op["k"], norms.shape[1]))
    return patterns.block(op["rows"], op["cols"], mask=chosen)


def _n_of_m(op: Op, scores: Tensor) -> Pattern:
    n, m = op["n"], op["m"]
    groups = torch.nn.functional.pad(scores, (0, -scores.shape[1] % m), value=-1.0).unflatten(1, (-1, m))
    return patterns.n_of_m(n, m, mask=largest(groups, n).flatten(1)[:, : scores.shape[1]].contiguous())


_SELECTED = {"block": _blocks, "top_k": _columns, "n_of_m": _n_of_m}


def mask_of(pattern: Pattern, weight: Tensor) -> Tensor:
    """The pattern's pairs of a weight, bool [N, K]: rows are output features, columns input features, both from 0."""
    (n, k), device = weight.shape, weight.device
    if pattern.node.kind == "block" and pattern.node["mask"] is not None:
        return _of_blocks(pattern, n, k).to(device)
    step = max(1, _CHUNK // max(k, 1))
    parts = [
        mask(pattern, n, k, q_offset=0, rows=torch.arange(at, min(at + step, n)), device=device)[0, 0]
        for at in range(0, n, step)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, k, dtype=torch.bool, device=device)


def _of_blocks(pattern: Pattern, n: int, k: int) -> Tensor:
    """The common case, without an index for each pair."""
    rows, cols = pattern.node["rows"], pattern.node["cols"]
    kept = pattern.data[pattern.node["mask"].index].bool()
    if kept.shape[-2:] != (-(-n // rows), -(-k // cols)) or kept.numel() != kept.shape[-2] * kept.shape[-1]:
        raise ShapeError(
            "block: mask", given=f"shape {list(kept.shape)}", allowed=f"[{-(-n // rows)}, {-(-k // cols)}]"
        )
    whole: Tensor = kept.reshape(kept.shape[-2:]).repeat_interleave(rows, 0)[:n].repeat_interleave(cols, 1)[:, :k]
    return whole


def layout_of(node: Op) -> Layout | None:
    """The storage that a pattern names: that of its blocks (1 x 1: a bitmap) or its n of m; None where it names none.

    What is cut out of blocks (`block(…) & …`) is stored as zeros of them.
    """
    if node.kind == "n_of_m":
        return Layout("n_of_m", node["n"], node["m"])
    if node.kind in ("block", "top_k", "cover"):
        single = node["rows"] == node["cols"] == 1
        return Layout("bitmap") if single else Layout("blocks", node["rows"], node["cols"])
    if node.kind == "and":
        found = [layout for layout in map(layout_of, node.operands) if layout is not None]
        return min(found, key=lambda layout: layout.rows * layout.cols, default=None)
    if node.kind == "not":
        one = layout_of(node.operands[0])
        return one if one is not None and one.kind == "blocks" else None
    if node.kind == "or":
        one, other = map(layout_of, node.operands)
        if one is not None and other is not None and one.kind == other.kind == "blocks":
            return Layout("blocks", math.gcd(one.rows, other.rows), math.gcd(one.cols, other.cols))
    return None


def stored(weight: Tensor, pattern: Pattern, inputs: Tensor | None = None, *, strict: str | None = None) -> Stored:
    """The weight [N, K] over a pattern, in the storage that the pattern names, or else in blocks or a bitmap.

    With `strict`, the weight's name, values outside the pattern are a DataError.
    """
    kept, layout = selected(weight, pattern, inputs)
    if strict is not None:
        _refuse_others(weight, kept, strict)
    return pack(weight, kept, layout)


def selected(weight: Tensor, pattern: Pattern, inputs: Tensor | None = None) -> tuple[Tensor, Layout]:
    """Which values of the weight a pattern keeps, bool [N, K], and how they are stored."""
    if weight.dim() != 2:
        raise ShapeError("weight", given=f"shape {list(weight.shape)}", allowed="[output features, input features]")
    for op in walk(pattern.node):
        if op.kind in ("per_head", "documents"):
            raise PatternError(
                "pattern", given=short_text(op), allowed="patterns of rows and columns: weights have no heads"
            )
    found = resolved(pattern, weight, inputs)
    kept = mask_of(found, weight)
    return kept, layout_of(found.node) or _smallest(weight, kept)


def _smallest(weight: Tensor, kept: Tensor) -> Layout:
    """The storage of fewest bytes, but for a bitmap that saves few of them."""
    blocks = min((pack(weight, kept, Layout("blocks", size, size)) for size in _SQUARES), key=lambda one: one.nbytes)
    bitmap = pack(weight, kept, Layout("bitmap"))
    return bitmap.layout if bitmap.nbytes < _BITMAP_PAYS * blocks.nbytes else blocks.layout


def _refuse_others(weight: Tensor, kept: Tensor, name: str) -> None:
    others = (weight.ne(0) & ~kept).nonzero()
    if len(others):
        row, col = others[0].tolist()
        raise DataError(
            f"{name}[{row}, {col}]", given=f"{weight[row, col].item():g}, one of {len(others)} outside the pattern",
            allowed="zeros there", remedy="leave check= out to drop them",
        )  # fmt: skip
