"""What the Gluon form's warps write of masked tiles, run over arrays: the pairs are the oracle's, each once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import spgen as sp
from spgen.ir.kernel import KERNEL, parts
from spgen.templates.gluon import attention, segments
from spgen.templates.render import render
from tests.lowering import Lengths, lowered_builder, wanted_pairs

SIZE = 64  # rows and columns of a tile
LENGTH = 170


class Value(np.ndarray):  # type: ignore[type-arg]
    """Integers as Gluon has them; scalars are arrays of one."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        return self.view(dtype) if bitcast else self.astype(dtype)

    def __index__(self) -> int:
        return int(self.item())

    __iadd__, __isub__, __iand__ = np.ndarray.__add__, np.ndarray.__sub__, np.ndarray.__and__  # nothing is in place


def value(x: Any) -> Any:
    found = np.atleast_1d(np.asarray(x))
    return (found.astype(np.int32) if found.dtype == np.int64 and not isinstance(x, Value) else found).view(Value)


class Pointer:
    def __init__(self, memory: Any, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.at + np.asarray(step, dtype=np.int64))

    def read(self, mask: Any, other: int) -> Any:
        inside, at = np.broadcast_arrays(mask, self.at)
        assert ((at >= 0) & (at < len(self.memory)))[inside].all()
        return np.where(inside, self.memory[np.where(inside, at, 0)], other).astype(np.int32).view(Value)


class Anything:
    """Barriers, layouts, and memory of which nothing is read."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter([self] * 6)


class Memory:
    """Shared memory of numbers, or a list of what is stored."""

    def __init__(self, stored: Callable[[int, Any], None] | None = None) -> None:
        self.numbers: dict[int, Any] = {}
        self.stored = stored

    def index(self, at: Any) -> Any:
        place = int(np.asarray(at).item())
        cell = Anything()
        store = self.numbers.__setitem__ if self.stored is None else self.stored
        cell.__dict__.update(load=lambda _: self.numbers[place], store=lambda what: store(place, what))
        return cell


class Language:
    """The part of Gluon's language that these warps use."""

    int32, int64, uint32 = np.int32, np.int64, np.uint32

    def __init__(self) -> None:
        self.drawn = -1

    def __getattr__(self, name: str) -> Any:
        return Anything()

    constexpr = staticmethod(lambda x: x)
    static_range = staticmethod(range)
    sum = staticmethod(lambda x, _: x)
    arange = staticmethod(lambda a, b, _=None: value(np.arange(a, b, dtype=np.int32)))
    full = staticmethod(lambda shape, x, *_: value(np.full(shape, x, np.int32)))
    where = staticmethod(lambda c, a, b: value(np.where(c, a, b)))
    minimum = staticmethod(lambda a, b: value(np.minimum(a, b)))
    maximum = staticmethod(lambda a, b: value(np.maximum(a, b)))
    load = staticmethod(lambda at, mask=True, other=0: at.read(mask, other))
    num_programs = staticmethod(lambda _: 1)
    store = staticmethod(lambda *_, **__: None)

    def atomic_add(self, *_: Any) -> Any:
        self.drawn += 1
        return value(self.drawn)

    def inline_asm_elementwise(self, asm: str, _: str, args: list[Any], *__: Any) -> Any:
        assert asm.startswith("brev")
        bits = np.unpackbits(
            np.ascontiguousarray(args[0], np.int32).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little"
        )
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.int32)[:, 0].view(Value)


def tiles_of(pattern: sp.Pattern, call: Lengths) -> list[tuple[int, int, int, list[int], list[Any]]]:
    """Sequence, head, row tile, columns and words of each tile that has words, in the order in which they come."""
    levels, builder = lowered_builder(pattern, call)
    changed = {"dtype": "bfloat16", "head_dim": 128, "value_dim": 128, "options": ("warpgroups=1", "stages=2")}
    kernel = KERNEL.make("attention", *levels.kernel.operands, **{**dict(levels.kernel.attrs), **changed})
    assert attention.refusal(kernel) is None
    assert segments.marks(kernel)
    text = render("gluon/attention.py.jinja", **attention.symbols(kernel))
    text = re.sub(
        r"^(from|import) .*?(?:\(\n.*?^\)|$)", "", text.partition('"""\n\n')[2], flags=re.MULTILINE | re.DOTALL
    )
    text = text.replace("SLOTS = tl.constexpr(2)", "SLOTS = tl.constexpr(100000)").partition("\nRUN_TIME")[0]
    gluon, anything = Anything(), Anything()
    gluon.__dict__["jit"] = lambda function: function
    places: dict[str, Any] = {
        "gluon": gluon, "tl": Language(), "mbarrier": anything, "tma": anything, "async_copy": anything,
        "fence_async_shared": anything,
    }  # fmt: skip
    exec(compile(text, "attention.py", "exec"), places)
    slots, tables = Memory(), []
    brought: list[list[int] | None] = []
    for op in parts(kernel, "table"):
        table = builder.tables[op["name"]].to(torch.int32)
        b, h, r, c = table.shape
        steps = [step if size > 1 else 0 for size, step in zip((b, h, r), (h * r * c, r * c, c), strict=True)]
        tables.append((Pointer(table.contiguous().flatten().numpy()), *map(value, (*steps, r, c))))
    sizes = tuple(value(x) for x in (call.q_len, call.kv_len, call.kv_heads, call.q_heads // call.kv_heads))
    row_tiles = -(-call.q_len // SIZE) * call.q_heads * call.batch
    lengths = [] if call.kv_lengths is None else [Pointer(call.kv_lengths.numpy().astype(np.int32))]
    places["scheduler"](slots, anything, anything, 0, value(row_tiles), tuple(lengths), tuple(tables), sizes)
    symbols = attention.symbols(kernel)
    words: list[Any] = []
    marks = Memory(lambda _, what: words.append(np.asarray(what).copy()))
    places["marker"](slots, anything, anything, marks, anything, anything, tuple(tables), sizes)
    pairs = iter(zip(*[iter(words)] * (SIZE // 32), strict=True))
    places.update(_noting(brought))
    names = places["producer"].__code__.co_varnames[: places["producer"].__code__.co_argcount - 2]
    known = {"slots": slots, "k": 0, "v": 0, "strides": (0,) * 6}
    places["producer"](*(known.get(name, anything) for name in names), tuple(tables), sizes)
    values, found, number = list(symbols["values"]), [], -1
    for firsts in brought:
        if firsts is None:  # a row tile begins
            number += 1
        elif firsts:
            at = number * len(values)
            b, h, tile = (int(slots.numbers[at + values.index(name)].item()) for name in ("b", "h", "tile"))
            columns = [first + n for first in firsts for n in range(symbols["box"])]
            found.append((b, h, tile, columns, next(pairs)))
    assert next(pairs, None) is None
    return found


def _noting(brought: list[list[int] | None]) -> dict[str, Any]:
    """What the warps that bring tiles call, noting where boxes begin, [] for single rows, None for a row tile."""

    def copy_keys(_k: Any, _rings: Any, _columns: Any, _b: Any, _h: Any, first: int, cs: Any, *_: Any) -> None:
        brought.append([int(np.asarray(first + c).item()) for c in cs])

    def fill(_k: Any, _v: Any, *rest: Any) -> None:
        copy_keys(_k, *rest)

    def fill_tail(_k: Any, _v: Any, rings: Any, columns: Any, _came: Any, *rest: Any) -> Any:
        copy_keys(_k, rings, columns, *rest)
        return rest[-1]

    barriers = Anything()
    barriers.__dict__["expect"] = lambda *_: brought.append(None)  # rows of Q
    gather = lambda *_: brought.append([])  # noqa: E731
    return {"fill": fill, "fill_tail": fill_tail, "gather": gather, "mbarrier": barriers}


def pairs_of(pattern: sp.Pattern, call: Lengths) -> torch.Tensor:
    pairs = torch.zeros(call.batch, call.q_heads, call.q_len, call.kv_len, dtype=torch.int32)
    for b, h, tile, columns, words in tiles_of(pattern, call):
        bits = np.concatenate([word[:, None] >> np.arange(31, -1, -1)[None] & 1 for word in words], 1)
        for r in range(min(SIZE, call.q_len - tile * SIZE)):
            for n in np.flatnonzero(bits[r]):
                pairs[b, h, tile * SIZE + r, columns[n]] += 1
    return pairs


def numbers(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(7), dtype=torch.int32)


OFFSETS = torch.cat([64 + torch.arange(64)[None].expand(2, -1), numbers(LENGTH, 2, 12)], 1).int()
CASES: dict[str, tuple[sp.Pattern, sp.Pattern | None]] = {
    "diagonals": (sp.causal() & sp.diagonals(OFFSETS), None),
    "diagonals to both sides": (sp.diagonals(OFFSETS - 100), None),
    "columns and diagonals": (
        sp.causal() & sp.vertical_slash(numbers(LENGTH, 2, 40), OFFSETS),
        sp.columns(numbers(LENGTH, 2, 40)),
    ),
    "blocks of 32": (sp.causal() & sp.block(32, mask=numbers(3, 2, 6, 6) == 0), None),
    "blocks of 32 rows": (sp.block(32, 64, mask=numbers(3, 2, 6, 3) == 0), None),
}


@pytest.mark.parametrize("lengths", [None, (LENGTH, 77)])
@pytest.mark.parametrize("name", CASES)
def test_words_are_the_pairs(name: str, lengths: tuple[int, ...] | None) -> None:
    pattern, others = CASES[name]
    batch = 1 if lengths is None else len(lengths)
    known = None if lengths is None else torch.tensor(lengths)
    call = Lengths(LENGTH, LENGTH, q_heads=2, batch=batch, kv_lengths=known, block_m=SIZE, block_n=SIZE)
    wanted = wanted_pairs(pattern, call)
    if others is not None:  # which come row by row
        wanted = wanted & ~wanted_pairs(others, call)
    assert torch.equal(pairs_of(pattern, call), wanted.int())
