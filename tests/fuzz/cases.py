"""Cases: a pattern, a call's sizes and options, and the tensors, all of it values that print and read back.

Case n of seed s is the same everywhere: cases come in groups of VARIANTS that share a compiled kernel, and differ in
lengths, data and run-time values. Everything is drawn from `Random(f"{seed}:{group}")`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen.patterns import Pattern
from tests.fuzz.data import Call, redrawn
from tests.fuzz.patterns import Draw

VARIANTS = 8
_TRIES = 3  # most patterns drawn should hold some pairs and not all
HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 1), (6, 3), (7, 1), (8, 1))
DIMS = (16, 16, 32, 64, 64, 128, 80, 96, 192, 256, 1, 5, 17, 33, 72, 100)
DTYPES = ("float32", "float32", "bfloat16", "float16")
LAYOUTS = ("contiguous", "contiguous", "transposed", "padded", "strided")
BIASES = ("none",) * 4 + ("key", "alibi")
_ROW_KINDS = ("any", "any", "short", "one")


@dataclass(frozen=True, eq=False)
class Case:
    """One call. `rows` and `keys` are those of each sequence, all the same unless the batch is `packed`.

    `margins` are rows and keys of a packed batch that belong to no sequence, before the first and behind the last.
    `layout` says how q, k and v lie in memory, `seed` what they hold, `gain` how large q is.
    """

    pattern: Pattern
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    q_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int = 16
    dtype: str = "float32"
    packed: bool = False
    margins: tuple[int, int] = (0, 0)
    q_offset: int | tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: str = "none"
    bias_shape: tuple[int, ...] = ()
    plan: bool = False
    layout: str = "contiguous"
    gain: float = 1.0
    nan_row: bool = False
    seed: int = 0

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.rows)

    @property
    def call(self) -> Call:
        """The sizes that the pattern's data fit."""
        rows = self.rows if self.packed else None
        return Call(max(self.rows), max(self.keys), self.q_heads, self.kv_heads, self.batch, rows)

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and keys of the tensors."""
        if not self.packed:
            return self.rows[0], self.keys[0]
        return sum(self.rows) + sum(self.margins), sum(self.keys) + sum(self.margins)

    def __str__(self) -> str:
        """Python code of the case; what has its default value is left out."""
        parts = [_pattern_code(self.pattern)]
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if value != item.default:
                parts.append(f"{item.name}={value!r}")
        return f"Case(\n    {', '.join(parts)},\n)"


def _pattern_code(pattern: Pattern) -> str:
    tensors = [f"torch.tensor({t.tolist()}, dtype={t.dtype}).reshape({list(t.shape)})" for t in pattern.data]
    return f"sp.pattern({', '.join([repr(repr(pattern)), *tensors])})"


def case(seed: int, number: int) -> Case:
    """Case `number` of a campaign."""
    group, variant = divmod(number, VARIANTS)
    first = _first(seed, group)
    return first if variant == 0 else _variant(Random(f"{seed}:{group}:{variant}"), first)


@lru_cache(maxsize=4)
def _first(seed: int, group: int) -> Case:
    """What a compiled kernel is made for, and its first call."""
    rng = Random(f"{seed}:{group}")
    q_heads, kv_heads = rng.choice(HEADS)
    batch, packed = rng.choice([1, 1, 2, 3]), rng.randint(0, 3) == 0
    head_dim = rng.choice(DIMS)
    fixed: dict[str, Any] = {
        "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "packed": packed,
        "value_dim": head_dim if rng.randint(0, 2) else rng.choice(DIMS), "dtype": rng.choice(DTYPES),
        "layout": rng.choice(LAYOUTS), "sinks": rng.randint(0, 4) == 0, "bias": rng.choice(BIASES),
        "softcap": rng.choice([None, None, None, 5.0]), "scale": rng.choice([None] * 6 + [0.0, -0.2, 0.3, -1.0]),
        "q_offset": rng.choice([None, None, 0, (0,)]), "kv_lengths": rng.choice([None, None, ()]),
    }  # fmt: skip
    kind = rng.choice(_ROW_KINDS)
    rows, keys = _lengths(rng, kind, batch, packed)
    empty = Case(sp.dense(), rows, keys, **fixed)
    draw = Draw(rng, empty.call, max_leaves=rng.choice([2, 4, 6]))
    for _ in range(_TRIES):
        found = _values(rng, replace(empty, pattern=draw.pattern()))
        if _some_pairs(found):
            break
    return found


def _some_pairs(case: Case) -> bool:
    """Whether the pattern holds some pairs and not all, were there no offsets and lengths."""
    call = case.call
    mask = case.pattern.mask(
        call.q_len, call.kv_len, q_heads=call.q_heads, kv_heads=call.kv_heads, batch=call.batch, q_lengths=case.rows
    )
    return 0 < int(mask.sum()) < mask.numel()


def _variant(rng: Random, first: Case) -> Case:
    """Other lengths, data and values for the same kernel."""
    kind = "one" if first.call.q_len == 1 else "short" if first.call.q_len <= 16 else "any"
    rows, keys = _lengths(rng, kind, first.batch, first.packed)
    moved = replace(first, rows=rows, keys=keys)
    return _values(rng, replace(moved, pattern=redrawn(rng, first.pattern, moved.call)))


def _lengths(rng: Random, kind: str, batch: int, packed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    def one(low: int, high: int) -> int:
        return rng.randint(low, rng.choice([min(high, 24), min(high, 90), high]))

    high = {"any": 300, "short": 16, "one": 1}[kind]
    if not packed:
        return (one(1, high),) * batch, (one(1, 300),) * batch
    rows = [rng.choice([0, one(1, high), one(1, high)]) for _ in range(batch)]
    keys = [n if rng.randint(0, 1) else rng.choice([0, one(1, 300), one(1, 300)]) for n in rows]
    rows[0], keys[-1] = max(rows[0], 1), max(keys[-1], 1)
    return tuple(rows), tuple(keys)


def _values(rng: Random, case: Case) -> Case:
    """Run-time values: offsets, lengths, options' numbers, seeds."""
    longest = max(case.keys)
    offsets = tuple(rng.randint(-5, longest + 5) for _ in case.rows)
    lengths = tuple(rng.randint(0, longest + 3) for _ in case.rows)
    tensor = isinstance(case.q_offset, tuple)
    return replace(
        case,
        margins=rng.choice([(0, 0), (1, 2), (3, 0), (0, 40)]) if case.packed else (0, 0),
        q_offset=None if case.q_offset is None else offsets if tensor else offsets[0],
        kv_lengths=None if case.kv_lengths is None else lengths,
        softcap=None if case.softcap is None else rng.choice([0.5, 5.0, 30.0]),
        bias_shape=_bias_shape(rng, case),
        plan=rng.randint(0, 2) == 0,
        gain=rng.choice([1.0, 1.0, 1.0, 6.0]),
        nan_row=rng.randint(0, 19) == 0,
        seed=rng.randint(0, 2**30),
    )


def _bias_shape(rng: Random, case: Case) -> tuple[int, ...]:
    """The axes of a bias before the keys', or of slopes."""
    if case.bias == "alibi":
        return rng.choice([(case.q_heads,), (case.batch, case.q_heads)])
    if case.bias == "none":
        return ()
    heads = rng.choice([1, case.kv_heads, case.q_heads])
    return rng.choice([(), (heads,), (1 if case.packed else case.batch, heads)])


@dataclass(frozen=True)
class Tensors:
    """What a case is called with, on the CPU; `options` are those of the call and of the oracle."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


def tensors_of(case: Case) -> Tensors:
    """The tensors of a case. Whatever lies beyond a length, or beside a view, is NaN."""
    draw = torch.Generator().manual_seed(case.seed)
    rows, keys = case.sizes
    own_rows, own_keys = _owned(case)
    q = case.gain * torch.randn(*own_rows.shape[:1], case.q_heads, rows, case.head_dim, generator=draw)
    q = torch.where(own_rows[:, None, :, None], q, math.nan)
    if case.nan_row:
        q[-1, -1, rows // 2, 0] = math.nan
    shape = own_keys.shape[0], case.kv_heads, keys
    k, v = (
        torch.where(own_keys[:, None, :, None], torch.randn(*shape, dim, generator=draw), math.nan)
        for dim in (case.head_dim, case.value_dim)
    )
    q, k, v = (_laid_out(x.to(getattr(torch, case.dtype)), case.layout) for x in (q, k, v))
    if case.packed:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return Tensors(q, k, v, _options(case, own_keys, draw))


def _owned(case: Case) -> tuple[Tensor, Tensor]:
    """Which rows [B or 1, rows] and keys [B or 1, keys] belong to a sequence."""
    rows, keys = (torch.zeros(1 if case.packed else case.batch, n, dtype=torch.bool) for n in case.sizes)
    lengths = case.keys if case.kv_lengths is None else tuple(map(min, case.keys, case.kv_lengths))
    if not case.packed:
        for b, length in enumerate(lengths):
            keys[b, :length] = True
        return torch.ones_like(rows), keys
    rows[0, case.margins[0] : case.margins[0] + sum(case.rows)] = True
    start = case.margins[0]
    for own, length in zip(case.keys, lengths, strict=True):
        keys[0, start : start + length] = True
        start += own
    return rows, keys


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` [B, H, N, D] with other strides."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        around = torch.full((x.shape[0], x.shape[1], x.shape[2] + 3, x.shape[3] + 5), math.nan, dtype=x.dtype)
        inner = around[:, :, 2:-1, 3:-2]
        return inner.copy_(x)
    if layout == "strided":
        return x.mT.contiguous().mT
    return x


def _options(case: Case, own_keys: Tensor, draw: torch.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if case.packed:
        dtype = torch.int32 if case.seed % 2 else torch.int64
        for name, lengths in (("cu_seqlens_q", case.rows), ("cu_seqlens_k", case.keys)):
            options[name] = torch.tensor([case.margins[0], *lengths]).cumsum(0).to(dtype)
    if case.q_offset is not None:
        options["q_offset"] = torch.tensor(case.q_offset) if isinstance(case.q_offset, tuple) else case.q_offset
    if case.kv_lengths is not None:
        options["kv_lengths"] = torch.tensor(case.kv_lengths)
    if case.sinks:
        options["sink_logits"] = 3 * torch.randn(case.q_heads, generator=draw)
    if case.bias == "alibi":
        options["bias"] = sp.alibi(torch.rand(case.bias_shape, generator=draw))
    elif case.bias == "key":
        bias = torch.randn(*case.bias_shape, own_keys.shape[1], generator=draw)
        bias[torch.rand(bias.shape, generator=draw) < 0.05] = -math.inf
        beyond = ~own_keys.any(0)
        options["bias"] = torch.where(beyond, math.nan, bias)
    return options
