"""Products that expand 2:4 weights: the rendered functions, run over NumPy, against the dense product."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from spgen.ir.config import Config
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.gluon import expanded
from spgen.templates.render import render
from spgen.weights.compile import Request, Sizes, kernel_of
from spgen.weights.storage import Layout, Stored, dequantized, pack, quantized

ROWS = 64


def kernel(values: str, block_m: int = 8, options: tuple[str, ...] = (), **flags: Any) -> Op:
    request = Request("bfloat16", Layout("n_of_m", 2, 4), values, values != "bfloat16", Target.of("sm_90"), **flags)
    return kernel_of(request, Sizes(block_m, 128, 512, 256), Config(block_m, 128, ("warpgroups=2", *options)))


class Number(int):
    """A number that has `to`."""

    def to(self, _: Any) -> Number:
        return self

    def __floordiv__(self, other: int) -> Number:
        return Number(int(self) // other)


def layout(*fields: Any, **named: Any) -> SimpleNamespace:
    return SimpleNamespace(value=fields, fields=fields)


def assembled(text: str, constraints: str, operands: list[Any], **named: Any) -> Any:
    """What a piece of the template's assembly does, of which lanes hold `choice` as the last operand."""
    words = [np.asarray(one).astype(np.int64) & 0xFFFFFFFF for one in operands]
    if named.get("pack") == 4:
        return words[0] >> 8 * np.arange(4) & 0xFF  # of four copies a byte each
    if text.startswith("mov.b32 {$0, $1}"):
        return (words[0] & 0xFFFF).astype(np.uint16), (words[0] >> 16).astype(np.uint16)
    results = constraints.count("=")
    known = {f"${results + i}": word for i, word in enumerate(words)}
    for operation, arguments in re.findall(r"^\s*(?!\.reg)([a-z][\w.:]+) ([^;]+);", text, re.M):
        to, *sources = re.split(r",\s*", arguments)
        values = [known[one] if one in known else np.int64(int(one, 0)) for one in sources]
        known[to] = OPERATIONS[operation](*values) & 0xFFFFFFFF
    return tuple(known[f"${i}"] for i in range(results))


def permuted(low: Any, high: Any, selector: Any) -> Any:
    """`prmt`: bytes by the selector's lowest three bits, or eight times their sign by its fourth."""
    source = [word >> 8 * i & 0xFF for word in (low, high) for i in range(4)]
    total = 0 * selector
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = np.choose(nibble & 7, source)
        total = total | np.where(nibble > 7, (byte >> 7) * 0xFF, byte) << 8 * i
    return total


def shuffled(choice: Any, lane: Any, *_: Any) -> Any:
    """`shfl`: thread t of four in row g is lane 4 g + t."""
    return choice[0, 0, :, :, 0].reshape(32)[lane & 31]


def looked_up(a: Any, b: Any, c: Any, table: int) -> Any:
    """`lop3`, bit by bit."""
    total = 0 * a
    for i in (one for one in range(8) if int(table) >> one & 1):
        total = total | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return total


OPERATIONS: dict[str, Callable[..., Any]] = {
    "and.b32": np.bitwise_and, "xor.b32": np.bitwise_xor, "shl.b32": np.left_shift, "shr.u32": np.right_shift,
    "prmt.b32": permuted, "lop3.b32": looked_up, "shfl.sync.idx.b32": shuffled,
}  # fmt: skip


def fake(store: Callable[..., None]) -> dict[str, ModuleType]:
    """Modules in place of Triton's: tensors are arrays, whatever their layout."""
    gl, tl, gluon, triton, hopper = (ModuleType(name) for name in ("gl", "tl", "gluon", "triton", "hopper"))
    gluon.jit = triton.jit = lambda f=None, **_: f or (lambda g: g)  # type: ignore[attr-defined]
    names = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "DistributedLinearLayout")
    known: dict[str, Any] = dict.fromkeys(names, layout)
    known |= {
        "constexpr": lambda value: value if isinstance(value, int | float) else SimpleNamespace(value=value),
        "int32": np.int64, "float8e4nv": None, "bfloat16": None, "float16": None, "inline_asm_elementwise": assembled,
        "arange": lambda first, last, _=None: np.arange(first, last, dtype=np.int64),
        "where": np.where, "reshape": np.reshape, "permute": np.transpose,
        "join": lambda a, b: np.stack((a, b), -1), "split": lambda a: (a[..., 0], a[..., 1]),
        "full": lambda shape, value, *_: np.full(shape, value), "broadcast": lambda a, b: np.broadcast_arrays(a, b),
        "convert_layout": lambda value, *_, **__: value,
    }  # fmt: skip
    gl.__dict__.update(known)
    tl.__dict__.update(known | {"store": store, "int64": np.int64})
    for name in ("fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait"):
        setattr(hopper, name, None)
    gluon.language, triton.language = gl, tl  # type: ignore[attr-defined]
    root = "triton.experimental.gluon"
    return {
        "triton": triton, "triton.language": tl, "triton.experimental": ModuleType("experimental"), root: gluon,
        f"{root}.language": gl, f"{root}.language.nvidia": ModuleType("nvidia"),
        f"{root}.language.nvidia.hopper": hopper,
    }  # fmt: skip


def loaded(one: Op, store: Callable[..., None] = lambda *_, **__: None) -> dict[str, Any]:
    modules = fake(store)
    modules["triton.experimental"].gluon = modules["triton.experimental.gluon"]  # type: ignore[attr-defined]
    names: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, modules):
        exec(render("gluon/expanded.py.jinja", **expanded.symbols(one)), names)
    for group in range(4):
        names[f"widened_{group}"] = lambda words, group=group: widened(words, group, one["values"])
    return names


def widened(words: Any, group: int, values: str) -> Any:
    """A group's two values as words of two bf16."""
    if values == "int4":
        codes = [words >> (8 * group + 4 * i) & 15 for i in range(2)]
        numbers = [np.where(code > 7, code - 16, code).astype(np.float32) for code in codes]
    else:
        codes = [words >> (16 * (group % 2) + 8 * i) & 255 for i in range(2)]
        kind = torch.int8 if values == "int8" else torch.float8_e4m3fn
        numbers = [torch.from_numpy(code.astype(np.uint8)).view(kind).float().numpy() for code in codes]
    first, second = (number.view(np.uint32).astype(np.int64) >> 16 for number in numbers)
    return first | second << 16


def weight(values: str, columns: int) -> Stored:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(ROWS, columns, generator=generator).bfloat16()
    order = torch.rand(ROWS, columns // 4, 4, generator=generator).argsort(-1)
    kept = (order < 2).flatten(1) & (torch.rand(ROWS, columns, generator=generator) < 0.7)
    stored = pack(dense, kept, Layout("n_of_m", 2, 4))
    return stored if values == "bfloat16" else quantized(stored, values)


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """An array with the conversions that `arrange` makes."""

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        if dtype == "float8e4nv":
            return tensor(torch.from_numpy(np.asarray(self)).to(torch.float8_e4m3fn).float().numpy())
        return (np.atleast_1d(self).view(dtype).reshape(self.shape) if bitcast else self.astype(dtype)).view(Tensor)


def tensor(value: Any) -> Tensor:
    return np.asarray(value).view(Tensor)


def arranged(x: torch.Tensor, one: Op) -> Any:
    """A row of x as `arrange` writes it, float64."""
    parts, columns = expanded.parts(one), expanded.step(one)
    # apart: numbers of 32 bits, where two of x are one; and where the factor goes
    source = x.float().numpy() if parts > 1 else x.view(torch.int32).numpy().astype(np.int64)
    out, factors = np.full(parts * len(source), np.nan), []

    def store(at: Any, value: Any, mask: Any = None) -> None:
        if mask is None:
            factors.append(float(value))
        else:
            out[at[mask]] = value[mask]

    names = loaded(one, store)
    tl = names["tl"]
    tl.__dict__.update({
        "program_id": lambda _: Number(0), "float32": np.float32, "int32": np.int32, "float8e4nv": "float8e4nv",
        "full": lambda shape, value, dtype: tensor(np.full(shape, value, dtype)), "abs": np.abs, "maximum": np.maximum,
        "max": lambda values, _: tensor(values.max(0)),
        "where": lambda *choice: tensor(np.where(*choice)),
        "load": lambda at, mask, other: tensor(np.where(mask, source[np.where(mask, at, 0)], source.dtype.type(other))),
    })  # fmt: skip
    parameters = dict.fromkeys(parameter.name for parameter in expanded.parameters(one, "arrange"))
    given = {"x": 0, "arranged": 0, "k": len(source), "steps": 1, "x_m": 0}
    with np.errstate(invalid="ignore"):
        names["arrange"](**{**parameters, **given, **({"factors": 0} if parts > 1 else {})})
    if parts > 1:
        return (out[:columns] + out[columns:] / 16) * factors[0]
    pairs = out.astype(np.int64)
    lying = np.stack((pairs & 0xFFFF, pairs >> 16 & 0xFFFF), -1).reshape(-1).astype(np.uint32)
    return (lying << 16).view(np.float32).astype(np.float64)


def quarter(names: dict[str, Any], stored: Stored, one: Op, at: int) -> Any:
    """64 rows by a quarter's columns as the tensor cores take them, float32."""
    boxes, near = expanded.boxes(one), 4 // expanded.boxes(one)
    words = stored.values.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    bits = stored.index[0].view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    tile = words.reshape(ROWS, boxes, -1)[:, at // near].reshape(4, 2, 8, 4, near, -1)[..., at % near, :]
    if expanded.parts(one) > 1:
        own = bits.reshape(4, 2, 8, boxes, 4, near)[:, :, :, at // near, :, at % near]
        dense = names["operand"](tile, own, names["choices"]())
        return torch.from_numpy(dense.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    halves = bits.reshape(4, 2, 8, *((2, 4) if boxes == 2 else (4, 2)))
    half = halves[:, :, :, at // 2] if boxes == 2 else halves[..., at // 2]
    dense = names["operand"](tile, half, names["choices"](), at)
    return (dense.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("values", "m", "parts"),
    [("bfloat16", 8, 1), ("float8_e4m3fn", 8, 2), ("float8_e4m3fn", 128, 1), ("int8", 8, 1), ("int4", 8, 2),
     ("int4", 128, 1)],
)  # fmt: skip
def test_the_order_of_columns_and_the_places_of_values(values: str, m: int, parts: int) -> None:
    one = kernel(values, m)
    assert expanded.parts(one) == parts
    step = expanded.step(one)
    stored = weight(values, step)
    x = torch.randn(step).bfloat16()
    columns = arranged(x, one)
    names = loaded(one)
    of = step // 4
    total = sum(quarter(names, stored, one, at) @ columns[of * at : of * at + of] for at in range(4))
    plain = stored if stored.scales is None else Stored(
        stored.layout, stored.shape, dequantized(stored) / stored.scales[:, None], stored.index
    )  # fmt: skip
    wanted = plain.dense().double().numpy() @ x.double().numpy()
    assert np.linalg.norm(total - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_int4_as_float8() -> None:
    codes = torch.arange(16).repeat(16).view(2, 16, 8)
    codes[1] = torch.randint(16, (16, 8), generator=torch.Generator().manual_seed(4))
    words = (codes.numpy().astype(np.int64) << 4 * np.arange(8)).sum(-1)
    halves = np.stack(loaded(kernel("int4"))["as_float8"](words), -1)
    found = torch.from_numpy(halves[..., None] >> 8 * np.arange(4) & 0xFF).to(torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(found.float().flatten(-2), torch.where(codes > 7, codes - 16, codes).float())


@pytest.mark.parametrize("size", [1e-38, 1e-3, 1.0, 3e37])
def test_two_parts_of_float8_are_bf16(size: float) -> None:
    """But for what is less than 2^-21 of the row's largest; infinity anywhere makes the row's factor NaN."""
    one = kernel("float8_e4m3fn")
    x = (torch.randn(512, generator=torch.Generator().manual_seed(2)) * size).bfloat16()
    x[::5] *= 2.0**-9
    x[::7] *= 2.0**-17
    x[3] = 0.0
    found, wanted = np.sort(arranged(x, one)), np.sort(x.double().numpy())
    largest = np.abs(wanted).max()
    assert np.abs(found - wanted).max() <= 2.0**-21 * largest
    exact = np.abs(wanted) >= 2.0**-7 * largest
    assert exact.sum() > 300
    assert (found == wanted)[exact].all()
    x[9] = float("inf")
    assert np.isnan(arranged(x, one)).all()


def test_a_consumer_can_wait_for_all_that_it_takes_at_once() -> None:
    assert expanded.expresses(kernel("int8", 64, ("stages=1",)))
    assert not expanded.expresses(kernel("int8", 64, ("stages=1",), gated=True))
    assert expanded.expresses(kernel("int8", 64, ("stages=2",), gated=True))
    assert not expanded.expresses(kernel("float8_e4m3fn", 32, ("together=2", "x_stages=1")))
    assert expanded.expresses(kernel("float8_e4m3fn", 32, ("together=2", "x_stages=2")))


def test_what_the_form_expresses() -> None:
    assert expanded.expresses(kernel("bfloat16"))
    assert expanded.expresses(kernel("int4", 256, gated=True))
    assert not expanded.expresses(kernel("bfloat16", 24))
    assert not expanded.expresses(kernel("bfloat16", 512))
    assert not expanded.expresses(kernel("bfloat16", transposed=True))
    assert not expanded.expresses(kernel_of(
        Request("bfloat16", Layout("n_of_m", 4, 8), "bfloat16", False, Target.of("sm_90")), Sizes(8, 128, 512, 256),
        Config(8, 128, ("warpgroups=2",)),
    ))  # fmt: skip
