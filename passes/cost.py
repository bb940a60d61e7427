"""cost: what a kernel has to do. It changes nothing; spgen/autotune/model.py says how long that should take.

needed pairs       what the pattern asks for: summed over rows from `keys_of_row`
visited pairs      what the tiles compute: tiles x block_m x block_n
FLOPs              2 D + 2 Dv for a pair
bytes              q, out and lse once; k and v once for each tile that walks them, as the caches see it
"""

from __future__ import annotations

from dataclasses import dataclass

from spgen.ir.expr import TRUE, Expr, const, maximum, minimum, select, var
from spgen.ir.node import Op
from spgen.passes.normalize import leaf_of
from spgen.passes.ownership import is_condition

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


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
    """The work of one call: pairs, FLOPs and bytes."""

    needed_pairs: int
    visited_pairs: int
    flops: int
    visited_flops: int
    bytes: int
    plan_bytes: int


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


def cost_of(
    kernel: Op, counts: list[Counts], needed_pairs: int, shape: tuple[int, int, int, int, int], plan_bytes: int,
    l2_bytes: int,
) -> Cost:  # fmt: skip
    """The cost of a kernel whose segments have these tiles; `shape` is (batch, q heads, kv heads, q_len, kv_len).

    K and V that fit `l2_bytes` come from memory once.
    """
    batch, q_heads, kv_heads, q_len, kv_len = shape
    head_dims = kernel["head_dim"] + kernel["value_dim"]
    tile_pairs = kernel["block_m"] * kernel["block_n"]
    visited = sum(count.tiles for count in counts) * tile_pairs
    size = _BYTES[kernel["dtype"]]
    rows = batch * q_heads * q_len * head_dims * size
    walked = sum(count.tiles for count in counts) * kernel["block_n"] * head_dims * size
    once = batch * kv_heads * kv_len * head_dims * size
    # K and V come from memory once if they fit the shared cache, else once per row tile that walks them.
    moved = rows + plan_bytes + (min(walked, once) if once <= l2_bytes else walked // 4)
    return Cost(
        needed_pairs=needed_pairs,
        visited_pairs=visited,
        flops=2 * head_dims * needed_pairs,
        visited_flops=2 * head_dims * visited,
        bytes=moved,
        plan_bytes=plan_bytes,
    )
