"""Products that expand 2:4 weights: the rendered functions, run over NumPy, against the dense product."""

from __future__ import annotations

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

ROWS, COLUMNS = 64, 256


def kernel(values: str, block_m: int = 8, **flags: Any) -> Op:
    request = Request("bfloat16", Layout("n_of_m", 2, 4), values, values != "bfloat16", Target.of("sm_90"), **flags)
    return kernel_of(request, Sizes(block_m, 128, 512, 256), Config(block_m, 128, ("warpgroups=2",)))


class Number(int):
    """A number that has `to`."""

    def to(self, _: Any) -> Number:
        return self

    def __floordiv__(self, other: int) -> Number:
        return Number(int(self) // other)


def layout(*fields: Any, **named: Any) -> SimpleNamespace:
    return SimpleNamespace(value=fields, fields=fields)


def assembled(text: str, _: str, operands: list[Any], **named: Any) -> Any:
    """What the two pieces of assembly of the template do."""
    words = [np.asarray(one).astype(np.int64) & 0xFFFFFFFF for one in operands]
    if "shfl" not in text:
        return (words[0] & 0xFFFF).astype(np.uint16), (words[0] >> 16).astype(np.uint16)
    pairs, codes, choice = words
    lanes = choice[0, 0, :, :, 0].reshape(32)  # thread t of four in row g is lane 4 g + t
    choice = lanes[codes & 31]
    source = [pairs >> 8 * i & 0xFF if i < 4 else 0 * pairs for i in range(8)]
    placed = []
    for selected in (choice, choice >> 16):
        nibbles = [selected >> 4 * i & 15 for i in range(4)]
        assert all((nibble < 8).all() for nibble in nibbles)
        placed.append(sum(np.choose(nibble, source) << 8 * i for i, nibble in enumerate(nibbles)))
    return tuple(placed)


def fake(store: Callable[..., None]) -> dict[str, ModuleType]:
    """Modules in place of Triton's: tensors are arrays, whatever their layout."""
    gl, tl, gluon, triton, hopper = (ModuleType(name) for name in ("gl", "tl", "gluon", "triton", "hopper"))
    gluon.jit = triton.jit = lambda f=None, **_: f or (lambda g: g)  # type: ignore[attr-defined]
    names = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "DistributedLinearLayout")
    known: dict[str, Any] = dict.fromkeys(names, layout)
    known |= {
        "constexpr": lambda value: value if isinstance(value, int) else SimpleNamespace(value=value),
        "int32": np.int64, "bfloat16": None, "float16": None, "inline_asm_elementwise": assembled,
        "arange": lambda first, last, _=None: np.arange(first, last, dtype=np.int64),
        "where": np.where, "reshape": np.reshape, "permute": np.transpose,
        "join": lambda a, b: np.stack((a, b), -1), "split": lambda a: (a[..., 0], a[..., 1]),
        "broadcast": lambda a, b: np.broadcast_arrays(a, b),
        "convert_layout": lambda value, *_, **__: value,
    }  # fmt: skip
    gl.__dict__.update(known)
    tl.__dict__.update(known | {"store": store, "int64": np.int64})
    for name in ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait"):
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


def weight(values: str) -> Stored:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
    order = torch.rand(ROWS, COLUMNS // 4, 4, generator=generator).argsort(-1)
    kept = (order < 2).flatten(1) & (torch.rand(ROWS, COLUMNS, generator=generator) < 0.7)
    stored = pack(dense, kept, Layout("n_of_m", 2, 4))
    return stored if values == "bfloat16" else quantized(stored, values)


def arranged(x: torch.Tensor, one: Op) -> Any:
    """A row of x as `arrange` writes it: pairs of columns."""
    pairs, out = x.view(torch.int32).numpy().astype(np.int64), np.full(COLUMNS // 2, -1, np.int64)

    def store(at: Any, value: Any, mask: Any) -> None:
        out[at[mask]] = value[mask]

    names = loaded(one, store)
    tl = names["tl"]
    tl.program_id = lambda _: Number(0)
    tl.load = lambda at, mask, other: np.where(mask, pairs[np.where(mask, at, 0)], other)
    parameters = dict.fromkeys(parameter.name for parameter in expanded.parameters(one, "arrange"))
    names["arrange"](**{**parameters, "x": 0, "arranged": 0, "k": len(pairs), "steps": 1, "x_m": 0})
    return out


def quarter(names: dict[str, Any], stored: Stored, one: Op, at: int) -> Any:
    """64 rows by a quarter's 64 columns as the tensor cores take them, float32."""
    boxes, near = expanded.boxes(one), 4 // expanded.boxes(one)
    words = stored.values.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    bits = stored.index[0].view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    tile = words.reshape(ROWS, boxes, -1)[:, at // near].reshape(4, 2, 8, 4, near, -1)[..., at % near, :]
    halves = bits.reshape(4, 2, 8, *((2, 4) if boxes == 2 else (4, 2)))
    half = halves[:, :, :, at // 2] if boxes == 2 else halves[..., at // 2]
    dense = names["operand"](tile, half, names["choices"](), at)
    return (dense.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("values", ["bfloat16", "float8_e4m3fn", "int8", "int4"])
def test_the_order_of_columns_and_the_places_of_values(values: str) -> None:
    one, stored = kernel(values), weight(values)
    x = torch.randn(COLUMNS).bfloat16()
    pairs = arranged(x, one)
    lying = np.stack((pairs & 0xFFFF, pairs >> 16 & 0xFFFF), -1).reshape(-1).astype(np.uint32)
    columns = (lying << 16).view(np.float32).astype(np.float64)
    names = loaded(one)
    total = sum(quarter(names, stored, one, at) @ columns[64 * at : 64 * at + 64] for at in range(4))
    plain = stored if stored.scales is None else Stored(
        stored.layout, stored.shape, dequantized(stored) / stored.scales[:, None], stored.index
    )  # fmt: skip
    wanted = plain.dense().double().numpy() @ x.double().numpy()
    assert np.linalg.norm(total - wanted) <= 1e-6 * np.linalg.norm(wanted)


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
