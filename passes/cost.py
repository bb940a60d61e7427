"""cost: what a kernel has to do, and how long that should take. It changes nothing.

needed pairs       what the pattern asks for: summed over rows from `keys_of_row`
visited pairs      what the tiles compute: tiles x block_m x block_n
FLOPs              2 D + 2 Dv for a pair
bytes              q, out and lse once; k and v once for each tile that walks them, as the caches see it
time               the larger of arithmetic and memory (roofline), at the rate that such a kernel reaches
"""

from __future__ import annotations

from dataclasses import dataclass

from spgen.ir.expr import TRUE, Expr, const, maximum, minimum, select, var
from spgen.ir.node import Op
from spgen.passes.normalize import leaf_of
from spgen.passes.ownership import is_condition
from spgen.target import Target

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Share of the peak that the unmasked inner loop reaches, by kind of target (docs/notes say how it was measured), and
# what a masked or gathered tile costs beside an unmasked one.
_REACHED = {"cpu": 0.85, "cuda": 0.45, "hip": 0.40}
_MASKED = {"cpu": 1.3, "cuda": 1.4, "hip": 1.4}
_GATHERED = {"cpu": 1.2, "cuda": 1.6, "hip": 1.6}
_LAUNCH_SECONDS = {"cpu": 5e-6, "cuda": 10e-6, "hip": 10e-6}


@dataclass(frozen=True)
class Counts:
    """Tiles of one segment over all programs of a call."""

    name: str
    full: int
    masked: int
    contiguous: bool

    @property
    def tiles(self) -> int:
        """All tiles of the segment."""
        return self.full + self.masked


@dataclass(frozen=True)
class Cost:
    """The work of one call: pairs, FLOPs, bytes, and the predicted seconds with the term that decides them."""

    needed_pairs: int
    visited_pairs: int
    flops: int
    visited_flops: int
    bytes: int
    plan_bytes: int
    seconds: float
    bound: str


def keys_of_row(term: Op) -> Expr | None:
    """How many keys row `i` wants of a term of half-lines, as an expression in i and kv_len; None for other terms."""
    lows, highs, when = [const(0)], [var("kv_len")], TRUE
    for literal in term.operands:
        leaf, positive, body = leaf_of(literal)
        if is_condition(literal):
            when = when & (leaf["predicate"] if positive else ~leaf["predicate"])
            continue
        if leaf.kind != "before" or body.kind == "permuted":
            return None
        (highs if positive else lows).append(leaf["bound"])
    return select(when, maximum(minimum(*highs) - maximum(*lows), 0), 0)


def estimate(
    kernel: Op, counts: list[Counts], needed_pairs: int, shape: tuple[int, int, int, int, int], plan_bytes: int,
    target: Target,
) -> Cost:  # fmt: skip
    """The cost of a kernel whose segments have these tiles; `shape` is (batch, q heads, kv heads, q_len, kv_len)."""
    batch, q_heads, kv_heads, q_len, kv_len = shape
    head_dims = kernel["head_dim"] + kernel["value_dim"]
    tile_pairs = kernel["block_m"] * kernel["block_n"]
    visited = sum(count.tiles for count in counts) * tile_pairs
    size = _BYTES[kernel["dtype"]]
    rows = batch * q_heads * q_len * head_dims * size
    walked = sum(count.tiles for count in counts) * kernel["block_n"] * head_dims * size
    once = batch * kv_heads * kv_len * head_dims * size
    # K and V come from memory once if they fit the shared cache, else once per row tile that walks them.
    moved = rows + plan_bytes + (min(walked, once) if once <= target.l2_bytes else walked // 4)
    arithmetic = _arithmetic_seconds(kernel, counts, target)
    memory = moved / target.bandwidth if target.bandwidth else 0.0
    seconds = max(arithmetic, memory) + _LAUNCH_SECONDS[target.kind]
    return Cost(
        needed_pairs=needed_pairs,
        visited_pairs=visited,
        flops=2 * head_dims * needed_pairs,
        visited_flops=2 * head_dims * visited,
        bytes=moved,
        plan_bytes=plan_bytes,
        seconds=seconds,
        bound="arithmetic" if arithmetic >= memory else "memory",
    )


def _arithmetic_seconds(kernel: Op, counts: list[Counts], target: Target) -> float:
    peak = target.peak(kernel["dtype"]) * _REACHED[target.kind]
    if not peak:
        return 0.0
    tile_flops = 2 * (kernel["head_dim"] + kernel["value_dim"]) * kernel["block_m"] * kernel["block_n"]
    weighted = sum(
        (count.full + count.masked * _MASKED[target.kind]) * (1 if count.contiguous else _GATHERED[target.kind])
        for count in counts
    )
    return float(weighted * tile_flops / peak)
