"""Random tensors for the places of a pattern: what users' data hold, -1, repeats, any order, beyond the end, nothing.

All draws come from a `random.Random`, so they serve hypothesis (`st.randoms()`) and seeded campaigns alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from spgen.data import describe, places, role_of
from spgen.ir.node import Op, Slot, rewrite
from spgen.patterns import Pattern


@dataclass(frozen=True)
class Call:
    """The sizes of one call; of a packed batch `q_len` and `kv_len` are the longest, `rows` those of each sequence."""

    q_len: int
    kv_len: int
    q_heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    rows: tuple[int, ...] | None = None

    def tiles(self, op: Op) -> tuple[int, int]:
        """Row tiles and column tiles of the `rows` and `cols` of an operation."""
        return -(-self.q_len // op["rows"]), -(-self.kv_len // op["cols"])


def generator(rng: Random) -> torch.Generator:
    """A source of tensors."""
    return torch.Generator().manual_seed(rng.randint(0, 2**16))


def leading(rng: Random, call: Call) -> tuple[int, ...]:
    """The axes before a tensor's own: none, heads, or batch and heads."""
    heads = sorted({1, call.kv_heads, call.q_heads})
    forms: list[tuple[int, ...]] = [(), *((h,) for h in heads)]
    return rng.choice(forms + [(b, h) for b in sorted({1, call.batch}) for h in heads])


def integer_dtype(rng: Random) -> torch.dtype:
    """One of those that indices have."""
    return rng.choice([torch.int32, torch.int64])


def random_mask(rng: Random, shape: tuple[int, ...], dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask of any density, none and all included."""
    density = rng.choice([0.0, 0.1, 0.3, 0.7, 1.0])
    return (torch.rand(shape, generator=generator(rng)) < density).to(dtype)


def random_list(rng: Random, shape: tuple[int, ...], high: int, low: int, dtype: torch.dtype) -> Tensor:
    """A few integers from `low` to a little beyond `high`: what is out of range is ignored."""
    count = rng.randint(0, rng.choice([6, 6, 6, 40]))
    return torch.randint(low, max(high, low) + 2, (*shape, count), generator=generator(rng)).to(dtype)


def random_order(rng: Random, shape: tuple[int, ...], length: int, dtype: torch.dtype) -> Tensor:
    """Permutations."""
    return torch.rand((*shape, length), generator=generator(rng)).argsort(-1).to(dtype)


def order_of_rows(rng: Random, shape: tuple[int, ...], call: Call, dtype: torch.dtype) -> Tensor:
    """Permutations of the rows of each sequence, then what lies behind them."""
    if call.rows is None:
        return random_order(rng, shape, call.q_len, dtype)
    behind = torch.arange(call.q_len) >= torch.tensor(call.rows)[:, None, None]
    keys = torch.rand((call.batch, shape[-1], call.q_len), generator=generator(rng))
    return (keys + 2 * behind).argsort(-1).to(dtype)


def row_pointers(rng: Random, shape: tuple[int, ...], tiles: int, dtype: torch.dtype) -> Tensor:
    counts = torch.randint(0, 4, (*shape, tiles), generator=generator(rng))
    return torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).to(dtype)


def csr_indices(rng: Random, shape: tuple[int, ...], tiles: tuple[int, int], dtype: torch.dtype) -> Tensor:
    entries = 3 * tiles[0] + rng.randint(0, 2)  # as many as `row_pointers` can ask for
    return torch.randint(-1, tiles[1] + 2, (*shape, entries), generator=generator(rng)).to(dtype)


def boundaries(rng: Random, call: Call, dtype: torch.dtype) -> Tensor:
    """cu_seqlens; some documents are empty, some positions belong to none."""
    return torch.tensor(sorted(rng.randint(0, call.kv_len) for _ in range(rng.randint(1, 6))), dtype=dtype)


def random_tensor(
    rng: Random, op: Op, name: str, call: Call, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Data for the place `name` of `op`, with axes `shape` before its own."""
    if op.kind in ("block", "top_k"):
        rows, cols = call.tiles(op)
        if name == "mask":
            return random_mask(rng, (*shape, rows, cols), dtype)
        if op.kind == "block" and op["indptr"] is not None:
            if name == "indptr":
                return row_pointers(rng, shape, rows, dtype)
            return csr_indices(rng, shape, (rows, cols), dtype)
        return random_list(rng, (*shape, rows), cols, -2, dtype)
    others: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("n_of_m", "mask"): lambda: random_mask(rng, (*shape, call.q_len, call.kv_len), dtype),
        ("documents", "cu_seqlens"): lambda: boundaries(rng, call, dtype),
        ("permuted", "q"): lambda: order_of_rows(rng, shape, call, dtype),
        ("permuted", "k"): lambda: random_order(rng, shape, call.kv_len, dtype),
        ("columns", "index"): lambda: random_list(rng, shape, call.kv_len, -2, dtype),
        ("diagonals", "offsets"): lambda: random_list(rng, shape, call.kv_len, -4, dtype),
        ("vertical_slash", "columns"): lambda: random_list(rng, shape, call.kv_len, -2, dtype),
        ("vertical_slash", "offsets"): lambda: random_list(rng, shape, call.kv_len, -4, dtype),
    }
    return others[op.kind, name]()


def redrawn(rng: Random, pattern: Pattern, call: Call) -> Pattern:
    """The same pattern with other data, for a call of other lengths: what is compiled stays."""
    data = list(pattern.data)
    for op, name, slot in places(pattern.node):
        own = len(role_of(op, name).axes)
        shape = tuple(call.batch if dim == "B" else int(dim) for dim in slot.dims[: len(slot.dims) - own])
        data[slot.index] = random_tensor(rng, op, name, call, shape, getattr(torch, slot.dtype))
    return Pattern(pattern.node, tuple(data))


def fitted(node: Op, data: tuple[Tensor, ...]) -> Pattern:
    """The pattern of `node` over those of `data` that it uses, its slots as the tensors are now."""
    used = sorted({slot.index for _, _, slot in places(node)})

    def rule(op: Op) -> Op:
        attrs = tuple((name, _slot(op, name, value) if isinstance(value, Slot) else value) for name, value in op.attrs)
        return Op(op.name, op.operands, attrs)

    def _slot(op: Op, name: str, slot: Slot) -> Slot:
        return describe(used.index(slot.index), f"{op.kind}: {name}", role_of(op, name), data[slot.index])

    return Pattern(rewrite(node, rule), tuple(data[index] for index in used))
