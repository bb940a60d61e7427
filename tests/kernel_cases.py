"""Level-3 attention kernels written by hand, with inputs: what every backend must get right.

`CASES` maps a name to a function of the schedule (block_m, block_n) that returns a `Case`. Memory that no kernel may
multiply (keys beyond `kv_lengths`, rows around a view) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spgen.backends.extras import NO_EXTRAS, Extras
from spgen.ir.kernel import KERNEL
from spgen.ir.node import Op
from tests.kernel_oracle import Expected, interpret

PAD = 2**31 - 1


@dataclass
class Case:
    """A kernel and the arguments of one call."""

    kernel: Op
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: Sequence[torch.Tensor] = ()
    q_offset: int | torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    scale: float = field(default=0.0)
    extras: Extras = NO_EXTRAS

    def __post_init__(self) -> None:
        self.scale = self.scale or 1 / math.sqrt(self.q.shape[-1])

    def expected(self) -> Expected:
        return interpret(
            self.kernel, self.q, self.k, self.v, self.tables,
            q_offset=self.q_offset, kv_lengths=self.kv_lengths, scale=self.scale, extras=self.extras,
        )  # fmt: skip


def program(*parts: tuple[str, dict[str, Any]], **attention: Any) -> Op:
    """A kernel, written as text and read back; `parts` are ("table" | "let" | "segment", attributes)."""
    defaults = {
        "dtype": "float32", "head_dim": 64, "value_dim": 64, "block_m": 64, "block_n": 64, "pack": 1,
        "q_offset": "default", "kv_lengths": False, "cu_seqlens": False, "softcap": False, "sinks": False,
        "bias": "none", "lse": True, "options": [],
    }  # fmt: skip
    lines = [_line(n, f"kernel.{kind}", 0, attrs) for n, (kind, attrs) in enumerate(parts)]
    lines.append(_line(len(parts), "kernel.attention", len(parts), {**defaults, **attention}))
    return KERNEL.read("\n".join(lines) + "\n")


def _line(number: int, name: str, operands: int, attrs: dict[str, Any]) -> str:
    inside = ", ".join(f"{key} = {_value(value)}" for key, value in attrs.items() if value is not None)
    inputs = ", ".join(f"%{n}" for n in range(operands))
    types = ", ".join(["!kernel.value"] * operands)
    return f'%{number} = "{name}"({inputs}) {{{inside}}} : ({types}) -> !kernel.value'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def table(name: str, heads: str = "one") -> tuple[str, dict[str, Any]]:
    return "table", {"name": name, "heads": heads}


def let(name: str, value: str, per: str = "program") -> tuple[str, dict[str, Any]]:
    return "let", {"name": name, "per": per, "value": value}


def segment(
    start: str, stop: str, *, full: tuple[str, str] | None = None, mask: str | None = None, column: str = "p",
    key: str | None = None, contiguous: bool = True, name: str = "run",
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    full_start, full_stop = full or (None, None)
    return "segment", {
        "name": name, "contiguous": contiguous, "column": column, "key": key, "start": start,
        "full_start": full_start, "full_stop": full_stop, "stop": stop, "mask": mask,
    }  # fmt: skip


def tensors(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int = 64, value_dim: int | None = None,
    *, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, value_dim or head_dim))
    q, k, v = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return q, k, v


def dense(block_m: int, block_n: int) -> Case:
    """Every pair; lengths that divide nothing."""
    run = segment("0", "kv_len", full=("0", "kv_len"))
    return Case(program(run, block_m=block_m, block_n=block_n), *tensors(2, 4, 2, 77, 150))


CAUSAL_LETS = (
    let("first", "tile * {rows} + q_offset"),
    let("last", "min(tile * {rows} + {rows}, q_len) + q_offset"),
)


def causal_parts(rows: int, extra: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    lets = [let(attrs["name"], attrs["value"].format(rows=rows), attrs["per"]) for _, attrs in CAUSAL_LETS]
    mask = "j <= i" if extra is None else f"(j <= i) & {extra}"
    stop = "max(0, min(last, kv_len))"
    full = ("0", f"max(0, min(first + 1, {stop}))")
    return [*lets, segment("0", stop, full=full, mask=mask)]


def causal(block_m: int, block_n: int) -> Case:
    """More keys than rows: the diagonal is shifted."""
    parts = causal_parts(block_m)
    return Case(program(*parts, block_m=block_m, block_n=block_n), *tensors(1, 4, 1, 130, 200))


def causal_long_rows(block_m: int, block_n: int) -> Case:
    """More rows than keys: the first rows are empty, and q_offset is negative."""
    parts = causal_parts(block_m)
    return Case(program(*parts, block_m=block_m, block_n=block_n), *tensors(1, 2, 2, 150, 70))


def packed_causal(block_m: int, block_n: int) -> Case:
    """Three query heads of a group in one tile: 64 // 3 rows, dead lanes."""
    parts = causal_parts(block_m // 3)
    return Case(program(*parts, block_m=block_m, block_n=block_n, pack=3), *tensors(2, 6, 2, 45, 120))


def window_and_sink(block_m: int, block_n: int) -> Case:
    """Two disjoint segments: a window with both edges masked, and a sink before it."""
    parts = [
        let("first", f"tile * {block_m} + q_offset"),
        let("last", f"min(tile * {block_m} + {block_m}, q_len) + q_offset"),
        let("low", "max(0, first - 99)"),
        let("high", "max(low, min(last, kv_len))"),
        let("full_low", "min(max(low, last - 100), high)"),
        segment(
            "low", "high", full=("full_low", "max(full_low, min(first + 1, high))"), mask="(i - 100 < j) & (j <= i)"
        ),
        segment("0", "min(7, max(0, last))", mask="(j <= i) & (j <= i - 100)", name="sink"),
    ]
    return Case(program(*parts, block_m=block_m, block_n=block_n), *tensors(1, 4, 2, 300, 300))


def block_list(block_m: int, block_n: int) -> Case:
    """Ascending lists of key blocks, per query head; positions are found in a second table. Some rows are empty."""
    size = 32
    generator = torch.Generator().manual_seed(3)
    q, k, v = tensors(2, 4, 2, 200, 230)
    tiles = -(-q.shape[2] // block_m)
    chosen = torch.rand(2, 4, tiles, -(-k.shape[2] // size), generator=generator) < 0.4
    chosen[0, 1] = False
    blocks = torch.where(chosen, torch.arange(chosen.shape[-1]), PAD).sort(-1).values.int()
    whole = k.shape[2] // size  # the last block is short
    counts = torch.stack([chosen.sum(-1), chosen[..., :whole].sum(-1)], -1)
    splits = torch.stack(
        [0 * counts[..., 0], 0 * counts[..., 0], counts[..., 1] * size, counts[..., 0] * size], -1
    ).int()
    contiguous = block_n <= size
    run = segment(
        "load(splits, tile, 0)", "load(splits, tile, 3)", full=("load(splits, tile, 1)", "load(splits, tile, 2)"),
        column=f"load(blocks, tile, p // {size}) * {size} + p % {size}", contiguous=contiguous,
    )  # fmt: skip
    kernel = program(table("blocks", "q"), table("splits", "q"), run, block_m=block_m, block_n=block_n)
    return Case(kernel, q, k, v, (blocks, splits))


def gathered_columns(block_m: int, block_n: int) -> Case:
    """A sorted list of columns per key head, causal; entries beyond the keys are ignored."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = tensors(1, 4, 2, 90, 260)
    lists = [sorted(torch.randperm(300, generator=generator)[:97].tolist()) for _ in range(2)]
    columns = torch.tensor(lists, dtype=torch.int32)[None, :, None]
    parts = [
        table("columns", "kv"),
        let("first", f"tile * {block_m} + q_offset"),
        let("last", f"min(tile * {block_m} + {block_m}, q_len) + q_offset"),
        let("whole", "count_le(columns, 0, min(first, kv_len - 1))"),
        let("count", "count_le(columns, 0, last - 1)"),
        segment(
            "0", "count", full=("0", "whole"), column="load(columns, 0, p)", contiguous=False, mask="j <= i"
        ),
    ]  # fmt: skip
    return Case(program(*parts, block_m=block_m, block_n=block_n), q, k, v, (columns,))


def permuted(block_m: int, block_n: int) -> Case:
    """Rows and keys in another order: a row map, a key map, block bits over the ranks, causal over the originals."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = tensors(1, 2, 2, 140, 140)
    row_order, key_order = (torch.randperm(140, generator=generator).int() for _ in range(2))
    bits = torch.randint(-(2**31), 2**31, (1, 1, 9, 1), generator=generator).int()
    parts = [
        table("rows"),
        table("keys"),
        table("bits"),
        segment(
            "0", "kv_len", column="p", key="load(keys, 0, c)",
            mask="(j <= i) & bit(bits, s // 16, c // 16)",
        ),
    ]  # fmt: skip
    kernel = program(*parts, block_m=block_m, block_n=block_n, row="load(rows, 0, s)")
    return Case(kernel, q, k, v, (row_order.view(1, 1, 1, -1), key_order.view(1, 1, 1, -1), bits))


def arithmetic(block_m: int, block_n: int) -> Case:
    """Every operation, floored division of negatives included; row lets; a table indexed by row and column."""
    generator = torch.Generator().manual_seed(6)
    q, k, v = tensors(2, 4, 4, 100, 90)
    steps = torch.randint(-9, 9, (2, 4, 30, 12), generator=generator).int().sort(-1).values
    table_terms = (
        "(select(odd, abs(own + j - i) % 4, (i ^ j) & 3) << 1 < 5)",
        "(load(steps, r // 3, (i - j) // 8) <= near % 6)",
        "(count_le(steps, r // 4, j % 17 - 8) > 3)",
    )
    parts = [
        table("steps", "q"),
        let("phase", "h * 3 - 5 + b"),
        let("near", "(i - 40) // 7", "row"),
        let("odd", "(r % 2 == 1) | (s < 3)", "row"),
        let("own", "load(steps, r // 4, 5)", "row"),
        segment("0", "50", mask=" & ".join(table_terms) + " | ((j - i + phase) // -3 % 7 == 1)"),
        segment(
            "50", "kv_len", mask="((j - i + phase) % 5 - 2 >> 1 < 0) & ~((near - j) // 11 == -2) | odd & (j % 3 == 0)"
        ),
        segment("3", "3", mask="select(abs(i - j) < 4, min(i, j), max(i, j) & 3) != 2", name="never"),
    ]
    return Case(program(*parts, block_m=block_m, block_n=block_n), q, k, v, (steps,))


def lengths_and_offsets(block_m: int, block_n: int) -> Case:
    """Padded sequences (NaN beyond the length) with an offset each, one of them empty."""
    q, k, v = tensors(4, 2, 1, 70, 160)
    lengths = torch.tensor([160, 97, 0, 500])
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = math.nan
    parts = causal_parts(block_m, "((j - h) % 3 < 2)")
    parts[-1][1].update(full_start=None, full_stop=None)
    kernel = program(*parts, block_m=block_m, block_n=block_n, q_offset="tensor", kv_lengths=True)
    return Case(kernel, q, k, v, q_offset=torch.tensor([90, 27, 0, -5]), kv_lengths=lengths)


def scalar_offset(block_m: int, block_n: int) -> Case:
    """Rows before and after the keys; widths that are no multiple of a vector; no log-sum-exp asked for."""
    q, k, v = tensors(1, 3, 3, 66, 80, 50, 23)
    parts = causal_parts(block_m)
    kernel = program(*parts, block_m=block_m, block_n=block_n, q_offset="scalar", head_dim=50, value_dim=23, lse=False)
    return Case(kernel, q, k, v, q_offset=-20, scale=-0.3)


def spilled_list(block_m: int, block_n: int) -> Case:
    """A list with -1, entries far outside, and tables without rows or columns: nothing is read out of bounds."""
    q, k, v = tensors(1, 2, 2, 40, 50)
    columns = torch.tensor([[[[-1, 3, 4, 49, 50, 10**9, PAD]]]], dtype=torch.int32)
    empty = torch.zeros(1, 1, 0, 0, dtype=torch.int32)
    mask = (
        "~bit(empty, i, j) & (load(empty, r, j) < 0) & (count_le(empty, i - j, j) == 0) & (load(columns, 0, -1) == -1)"
    )
    parts = [
        table("columns"),
        table("empty"),
        segment("0", "9", column="load(columns, 0, p)", contiguous=False, mask=mask),
        segment("count_le(empty, 0, 5)", "load(empty, 0, 0) + 1", mask="j < i", name="none"),
    ]
    return Case(program(*parts, block_m=block_m, block_n=block_n), q, k, v, (columns, empty))


def words(block_m: int, block_n: int) -> Case:
    """Diagonals as bits: 32 of them are read at once for each column, beyond both ends of the table as well."""
    q, k, v = tensors(1, 4, 2, 150, 130)
    bits = torch.randint(-(2**31), 2**31, (1, 2, 1, 8), generator=torch.Generator().manual_seed(7)).int()
    lane = f"(s - tile * {block_m})"
    reads = [f"word(bits, 0, tile * {block_m} + {32 * n} - j + 90)" for n in range(-(-block_m // 32))]
    chosen = reads[-1]
    for n, read in reversed(list(enumerate(reads[:-1]))):
        chosen = f"select({lane} < {32 * n + 32}, {read}, {chosen})"
    run = segment("0", "kv_len", mask=f"({chosen} >> ({lane} % 32) & 1) != 0")
    return Case(program(table("bits", "kv"), run, block_m=block_m, block_n=block_n), q, k, v, (bits,))


def capped_scores(block_m: int, block_n: int) -> Case:
    """softcap * tanh(score / softcap), where scores are large; a negative scale."""
    q, k, v = tensors(1, 4, 2, 90, 120)
    kernel = program(*causal_parts(block_m), block_m=block_m, block_n=block_n, softcap=True)
    return Case(kernel, 9 * q, k, v, scale=-0.3, extras=Extras(softcap=4.0))


def sink_logits(block_m: int, block_n: int) -> Case:
    """A learned logit in each head's denominator, far below and above the scores; rows without keys have it alone."""
    q, k, v = tensors(2, 4, 2, 120, 70)
    kernel = program(*causal_parts(block_m), block_m=block_m, block_n=block_n, sinks=True)
    return Case(kernel, q, k, v, extras=Extras(sink_logits=torch.tensor([0.0, -30.0, 45.0, 1.5])))


def biased_keys(block_m: int, block_n: int) -> Case:
    """A bias per key and query head, -inf among it (whole rows too); everything at once with a packed group."""
    q, k, v = tensors(2, 6, 2, 25, 140)
    bias = torch.randn(2, 2, 3, 140, generator=torch.Generator().manual_seed(8))
    bias[0, 1, :, ::3] = -math.inf
    bias[1, 0, 2] = -math.inf
    kernel = program(*causal_parts(block_m // 3), block_m=block_m, block_n=block_n, pack=3, bias="key", softcap=True)
    return Case(kernel, q, k, v, extras=Extras(softcap=2.5, bias=bias))


def shared_bias(block_m: int, block_n: int) -> Case:
    """One bias for all heads and sequences (strides 0), with sinks."""
    q, k, v = tensors(2, 4, 2, 70, 100)
    bias = torch.randn(100, generator=torch.Generator().manual_seed(9)).expand(1, 2, 2, 100)
    kernel = program(*causal_parts(block_m), block_m=block_m, block_n=block_n, bias="key", sinks=True)
    return Case(kernel, q, k, v, extras=Extras(sink_logits=torch.tensor([1.0, 2.0, -1.0, 0.5]), bias=bias))


def alibi(block_m: int, block_n: int) -> Case:
    """A slope per head and sequence, rows before and behind the keys."""
    q, k, v = tensors(2, 4, 1, 66, 80)
    slopes = torch.rand(2, 4, generator=torch.Generator().manual_seed(10))
    run = segment("0", "kv_len", full=("0", "kv_len"))
    kernel = program(run, block_m=block_m, block_n=block_n, bias="alibi", q_offset="tensor")
    return Case(kernel, q, k, v, q_offset=torch.tensor([30, -20]), extras=Extras(bias=slopes))


def _packed(heads: int, kv_heads: int, head_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Extras]:
    """Seven sequences, some without rows or keys, as views of [T, H, D]; rows and keys at both ends are nobody's."""
    cu_q = torch.tensor([3, 3, 80, 81, 200, 264, 264, 300], dtype=torch.int32)
    cu_k = torch.tensor([5, 30, 130, 130, 260, 300, 350, 420], dtype=torch.int64)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(1, heads, kv_heads, 307, 430, head_dim))
    for x in (k, v):
        x[:, :, :5] = x[:, :, 420:] = math.nan
    return q, k, v, Extras(cu_q, cu_k)


def packed_batch(block_m: int, block_n: int) -> Case:
    """Sequences one behind the other, causal."""
    q, k, v, extras = _packed(4, 2)
    kernel = program(*causal_parts(block_m), block_m=block_m, block_n=block_n, cu_seqlens=True)
    return Case(kernel, q, k, v, extras=extras)


def packed_group(block_m: int, block_n: int) -> Case:
    """Sequences one behind the other, the heads of a group in one tile, lengths and offsets of their own."""
    q, k, v, extras = _packed(6, 2)
    parts = causal_parts(block_m // 3)
    attributes = {"pack": 3, "cu_seqlens": True, "q_offset": "tensor", "kv_lengths": True, "sinks": True}
    kernel = program(*parts, block_m=block_m, block_n=block_n, **attributes)
    extras = extras._replace(sink_logits=torch.randn(6, generator=torch.Generator().manual_seed(11)))
    lengths, offsets = torch.tensor([25, 60, 9, 100, -1, 50, 70]), torch.tensor([0, 5, 9, -30, 3, 4, 60]).int()
    return Case(kernel, q, k, v, kv_lengths=lengths, q_offset=offsets, extras=extras)


def packed_lists(block_m: int, block_n: int) -> Case:
    """A table with a row per slot, one with a row per sequence, and biases by packed key."""
    q, k, v, extras = _packed(4, 4)
    generator = torch.Generator().manual_seed(12)
    slots = 307 // block_m + 7 + 2
    starts = torch.randint(0, 40, (1, 4, slots, 1), generator=generator).int()
    steps = torch.randint(1, 4, (7, 1, 1, 1), generator=generator).int()
    parts = [
        table("starts", "q"),
        table("steps"),
        let("slot", f"q_start // {block_m} + b + 1 + tile"),
        segment(
            "load(starts, slot, 0)", "max(kv_len, load(starts, slot, 0))",
            mask="(j + k_start + i) % load(steps, 0, 0) == 0",
        ),
    ]  # fmt: skip
    kernel = program(*parts, block_m=block_m, block_n=block_n, cu_seqlens=True, bias="key", softcap=True)
    bias = torch.randn(1, 4, 1, 430, generator=generator)
    return Case(kernel, q, k, v, (starts, steps), extras=extras._replace(softcap=3.0, bias=bias))


def packed_alibi(block_m: int, block_n: int) -> Case:
    """Slopes per sequence and head of a packed batch."""
    q, k, v, extras = _packed(4, 2)
    run = segment("0", "kv_len", full=("0", "kv_len"))
    kernel = program(run, block_m=block_m, block_n=block_n, cu_seqlens=True, bias="alibi", q_offset="scalar")
    slopes = torch.rand(7, 4, generator=torch.Generator().manual_seed(13))
    return Case(kernel, q, k, v, q_offset=7, extras=extras._replace(bias=slopes))


CASES: dict[str, Callable[[int, int], Case]] = {
    case.__name__: case
    for case in (
        dense, causal, causal_long_rows, packed_causal, window_and_sink, block_list, gathered_columns, permuted,
        arithmetic, lengths_and_offsets, scalar_offset, spilled_list,
    )
}  # fmt: skip
# words of bits, score options and packed batches
MORE_CASES: dict[str, Callable[[int, int], Case]] = {
    case.__name__: case
    for case in (
        words, capped_scores, sink_logits, biased_keys, shared_bias, alibi, packed_batch, packed_group, packed_lists,
        packed_alibi,
    )
}  # fmt: skip
