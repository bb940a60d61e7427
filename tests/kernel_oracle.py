"""What a level-3 attention kernel means, interpreted literally: the oracle of both backends.

`interpret` walks the row tiles and segments of a kernel text with `ir.expr.evaluate`, counts how often each
(row, key) pair is visited, and computes attention over those pairs in float64. It checks what the lowering promises
on the way: no pair twice, whole tiles inside the keys, contiguous columns within a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spgen.backends.extras import NO_EXTRAS, Extras
from spgen.ir.expr import Expr, evaluate
from spgen.ir.kernel import parts
from spgen.ir.node import Op

Env = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """`out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq] in float64, `written` [B, Hq, Lq] and `pairs` [B, Hq, Lq, Lk]."""

    out: torch.Tensor
    lse: torch.Tensor
    written: torch.Tensor
    pairs: torch.Tensor


@dataclass(frozen=True)
class Place:
    """Where a sequence lies: `b` is its number, `at` the index of its row in batched tensors."""

    b: int
    at: int
    rows: slice
    keys: slice


def sequences_of(q: torch.Tensor, k: torch.Tensor, extras: Extras) -> list[Place]:
    """The sequences of a call; in a packed batch also what lies before the first and behind the last."""
    if extras.cu_seqlens_q is None or extras.cu_seqlens_k is None:
        return [Place(b, b, slice(0, q.shape[2]), slice(0, k.shape[2])) for b in range(len(q))]
    rows = [0, *extras.cu_seqlens_q.clamp(0, q.shape[2]).tolist(), q.shape[2]]
    keys = extras.cu_seqlens_k.clamp(0, k.shape[2]).tolist()
    keys = [keys[0], *keys, keys[-1]]
    return [
        Place(n - 1, 0, slice(rows[n], max(rows[n + 1], rows[n])), slice(keys[n], max(keys[n + 1], keys[n])))
        for n in range(len(rows) - 1)
    ]


def interpret(
    kernel: Op,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: Sequence[torch.Tensor] = (),
    *,
    q_offset: int | torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    scale: float | None = None,
    extras: Extras = NO_EXTRAS,
) -> Expected:
    """The result of `kernel`; tensors may live anywhere, the result is on the CPU. Rows not written stay 0 and -inf."""
    batch, heads, q_len, _ = q.shape
    pairs = torch.zeros(batch, heads, q_len, k.shape[2], dtype=torch.bool)
    distance = torch.zeros(batch, q_len, k.shape[2], dtype=torch.int64)
    written = torch.zeros(batch, heads, q_len, dtype=torch.bool)
    group = heads // k.shape[1]
    named = {
        op["name"]: (op["heads"], table.cpu().long()) for op, table in zip(parts(kernel, "table"), tables, strict=True)
    }
    for found in sequences_of(q, k, extras):
        b, rows = found.b, found.rows.stop - found.rows.start
        keys = found.keys.stop - found.keys.start
        last = 0 if extras.cu_seqlens_q is None else len(extras.cu_seqlens_q) - 2
        entry = b if extras.cu_seqlens_q is None else min(max(b, 0), last)
        kv_len = keys if kv_lengths is None else min(max(int(kv_lengths[entry]), 0), keys)
        offset = _q_offset(kernel, q_offset, entry, kv_len, rows)
        distance[found.at, found.rows, found.keys] = (torch.arange(rows)[:, None] + offset - torch.arange(keys)).abs()
        for h in range(heads):
            env = {
                "b": b, "hk": h // group, "q_len": rows, "kv_len": kv_len, "q_offset": offset,
                "q_start": found.rows.start if kernel["cu_seqlens"] else 0,
                "k_start": found.keys.start if kernel["cu_seqlens"] else 0, "n_heads": heads, "group": group,
            }  # fmt: skip
            if kernel["pack"] == 1:
                env["h"] = h
            head = {"one": 0, "kv": h // group, "q": h}
            own = {
                name: table[min(entry, len(table) - 1), min(head[kind], table.shape[1] - 1)]
                for name, (kind, table) in named.items()
            }
            count = _count_pairs(kernel, env, own, written[found.at, h, found.rows], keys)
            assert not (count > 1).any(), f"a pair of sequence {b}, head {h} is visited more than once"
            pairs[found.at, h, found.rows, found.keys] = count > 0
    bias = _dense_bias(kernel, extras, distance, heads)
    out, lse = masked_attention(q, k, v, pairs, scale, extras.softcap, extras.sink_logits, bias)
    return Expected(out, lse, written, pairs)


def _dense_bias(kernel: Op, extras: Extras, distance: torch.Tensor, heads: int) -> torch.Tensor | None:
    """What is added to the scores, [B or 1, Hq, Lq or 1, Lk]."""
    if extras.bias is None:
        return None
    bias = extras.bias.cpu().double()
    if kernel["bias"] == "key":
        return bias.flatten(1, 2)[:, :, None]
    slopes = bias[..., None, None]
    if extras.cu_seqlens_q is None:
        return -slopes * distance[:, None]
    rows = torch.arange(distance.shape[1])
    own = (torch.searchsorted(extras.cu_seqlens_q.cpu().long(), rows, right=True) - 1).clamp(0, None)
    slopes = (
        slopes[own.clamp(max=len(slopes) - 1), :, 0, 0]
        if len(slopes) > 1
        else slopes[:, :, 0, 0].expand(len(rows), heads)
    )
    return -slopes.T[None, :, :, None] * distance[:, None]


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor, scale: float | None = None,
    softcap: float | None = None, sinks: torch.Tensor | None = None, bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention over the pairs alone, in float64; what is not in a pair is not read. Empty rows give 0 and -inf."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    used = pairs.any(-2).unflatten(1, (-1, group)).any(2)[..., None]  # keys that any row of the group reads
    q, k, v = (x.cpu().double() for x in (q, k, v))
    k, v = (torch.where(used, x, 0).repeat_interleave(group, 1) for x in (k, v))
    scores = scale * (q @ k.mT)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = (scores if bias is None else scores + bias).masked_fill(~pairs, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.cpu().double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.where(scores > -math.inf, (scores - lse[..., None]).exp(), 0)
    return weights[..., : k.shape[2]] @ v, lse


def _q_offset(kernel: Op, q_offset: int | torch.Tensor | None, b: int, kv_len: int, q_len: int) -> int:
    if kernel["q_offset"] == "default":
        assert q_offset is None
        return kv_len - q_len
    assert q_offset is not None
    return int(q_offset[b]) if isinstance(q_offset, torch.Tensor) else q_offset


def _count_pairs(
    kernel: Op, env: Env, tables: Mapping[str, torch.Tensor], written: torch.Tensor, keys: int
) -> torch.Tensor:
    """How often each (row, key) is visited; marks the rows that are stored."""
    count = torch.zeros(env["q_len"], keys, dtype=torch.int64)
    rows = kernel["block_m"] // kernel["pack"]
    for tile in range(-(-env["q_len"] // rows)):
        program: Env = {**env, "tile": tile}
        value = _evaluator(program, tables)
        valid = _bind_rows(kernel, program, value, rows)
        assert not written[program["r"][valid, 0]].any(), "a row is stored twice"
        written[program["r"][valid, 0]] = True
        for segment in parts(kernel, "segment"):
            _visit(segment, program, value, valid, kernel["block_n"], count)
    return count


def _bind_rows(kernel: Op, program: Env, value: Callable[[Expr], Any], rows: int) -> torch.Tensor:
    """Adds s, r, i and the lets to `program`; vectors over rows are [rows, 1]. Returns which rows are stored."""
    s = program["tile"] * rows + torch.arange(rows)[:, None]
    program["s"] = program["r"] = s
    if kernel["row"] is not None:
        program["r"] = torch.as_tensor(value(kernel["row"])).expand_as(s)
    program["i"] = program["r"] + program["q_offset"]
    for let in parts(kernel, "let"):
        result = value(let["value"])
        is_vector = isinstance(result, torch.Tensor) and result.ndim == 2
        assert let["per"] == "row" or not is_vector, f"let {let['name']} is not a scalar"
        program[let["name"]] = result
    r = program["r"]
    return ((s < program["q_len"]) & (r >= 0) & (r < program["q_len"]))[:, 0]


def _visit(
    segment: Op, program: Env, value: Callable[[Expr], Any], valid: torch.Tensor, block_n: int, count: torch.Tensor
) -> None:
    start, stop = int(value(segment["start"])), int(value(segment["stop"]))
    full_start, full_stop = start, start
    left_stop = start
    if segment["full_start"] is not None:
        left_stop = full_start = int(value(segment["full_start"]))
        full_stop = int(value(segment["full_stop"]))
    assert start <= full_start <= full_stop <= stop, f"{segment['name']}: {start, full_start, full_stop, stop}"
    right = full_start + (full_stop - full_start) // block_n * block_n
    runs = ((start, left_stop, True), (full_start, right, False), (right, stop, True))
    for begin, end, masked in runs:
        for p0 in range(begin, end, block_n):
            p = torch.arange(p0, min(p0 + block_n, end))[None, :]
            _visit_tile(segment, {**program, "p": p}, value, valid, masked, count)


def _visit_tile(
    segment: Op, env: Env, value: Callable[[Expr], Any], valid: torch.Tensor, masked: bool, count: torch.Tensor
) -> None:
    p = env["p"]
    c = torch.as_tensor(value(segment["column"], env)).expand_as(p)
    if segment["contiguous"]:
        assert torch.equal(c, c[:, :1] + p - p[:, :1]), f"{segment['name']}: columns of a tile are not contiguous"
    env["c"] = c
    j = c if segment["key"] is None else torch.as_tensor(value(segment["key"], env)).expand_as(p)
    env["j"] = j
    inside = (j >= 0) & (j < env["kv_len"])
    assert masked or inside.all(), f"{segment['name']}: a whole tile leaves the keys"
    pairs = inside & valid[:, None]
    if masked and segment["mask"] is not None:
        pairs = pairs & torch.as_tensor(value(segment["mask"], env)).bool()
    lane, column = pairs.expand(len(valid), -1).nonzero(as_tuple=True)
    count.index_put_((env["r"][lane, 0], j[0, column]), torch.tensor(1), accumulate=True)


def _evaluator(program: Env, tables: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    operations = _operations(tables)

    def value(node: Expr, env: Env | None = None) -> Any:
        return evaluate(node, program if env is None else env, operations)

    return value


def _operations(tables: Mapping[str, torch.Tensor]) -> dict[str, Callable[..., Any]]:
    """The operations of ir.expr on Python integers and int64 tensors alike."""

    def load(table: str, row: Any, col: Any) -> Any:
        data = tables[table]
        row, col = torch.broadcast_tensors(torch.as_tensor(row), torch.as_tensor(col))
        inside = (row >= 0) & (row < data.shape[0]) & (col >= 0) & (col < data.shape[1])
        found = torch.full(row.shape, -1, dtype=torch.int64)
        found[inside] = data[row[inside], col[inside]]
        return found

    def bit(table: str, row: Any, x: Any) -> Any:
        x = torch.as_tensor(x)
        data = tables[table]
        row, x = torch.broadcast_tensors(torch.as_tensor(row), x)
        inside = (row >= 0) & (row < data.shape[0]) & (x >= 0) & (x < 32 * data.shape[1])
        found = torch.zeros(row.shape, dtype=torch.bool)
        found[inside] = (data[row[inside], x[inside] // 32] >> (x[inside] % 32)) & 1 == 1
        return found

    def word(table: str, row: Any, x: Any) -> Any:
        places = torch.arange(32)
        row, x = torch.broadcast_tensors(torch.as_tensor(row), torch.as_tensor(x))
        total = (bit(table, row[..., None], x[..., None] + places).long() << places).sum(-1)
        return torch.where(total >= 2**31, total - 2**32, total)

    def count_le(table: str, row: Any, x: Any) -> Any:
        data = tables[table]
        row, x = torch.broadcast_tensors(torch.as_tensor(row), torch.as_tensor(x))
        inside = (row >= 0) & (row < data.shape[0])
        found = torch.zeros(row.shape, dtype=torch.int64)
        found[inside] = (data[row[inside]] <= x[inside][..., None]).sum(-1)
        return found

    def two(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], Any]:
        return lambda a, b: f(torch.as_tensor(a), torch.as_tensor(b))

    return {
        "add": two(torch.add), "sub": two(torch.sub), "mul": two(torch.mul),
        "floordiv": two(lambda a, b: torch.div(a, b, rounding_mode="floor")), "mod": two(torch.remainder),
        "min": two(torch.minimum), "max": two(torch.maximum), "abs": lambda a: torch.as_tensor(a).abs(),
        "shl": two(torch.bitwise_left_shift), "shr": two(torch.bitwise_right_shift),
        "lt": two(torch.lt), "le": two(torch.le), "eq": two(torch.eq), "ne": two(torch.ne),
        "and": two(torch.bitwise_and), "or": two(torch.bitwise_or), "xor": two(torch.bitwise_xor),
        "not": lambda a: ~torch.as_tensor(a),
        "select": lambda c, a, b: torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)),
        "load": load, "bit": bit, "word": word, "count_le": count_le,
    }  # fmt: skip
