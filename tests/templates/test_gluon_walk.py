"""Products that walk bitmaps: the rendered function, run over NumPy lane by lane, against the dense product."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from spgen.backends.gluon_walk import tensors
from spgen.ir.config import Config
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.gluon import walk
from spgen.templates.render import render
from spgen.weights.compile import kernel_of
from tests.products import NORMS, Product, wanted

_32, _64 = 2**32 - 1, 2**64 - 1
_LINE = re.compile(r"(?:@(!?)(\w+) )?([\w.]+)(?: ([^;]*))?;")
_SIZES = {"s8": 1, "u16": 2, "b32": 4, "f32": 4}


class Array(np.ndarray[Any, Any]):
    """A tensor, or a number, whatever its layout."""

    def to(self, dtype: Any) -> Array:
        return self if dtype is None else self.astype(dtype)


def array(values: Any, dtype: Any = None) -> Array:
    return np.asarray(values, dtype).view(Array)


class Pointer:
    """Addresses of a tensor's elements."""

    def __init__(self, source: Tensor, at: Any) -> None:
        self.source, self.at = source, at
        self.dtype = SimpleNamespace(element_ty=None)

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.source, self.at + np.asarray(step, np.int64) * self.source.element_size())

    def to(self, _: Any) -> Array:
        return array(self.at)

    def index(self) -> Any:
        return (self.at - self.source.data_ptr()) // self.source.element_size()


class Shared:
    """Shared memory of float32, of which `index` gives a tile; words' columns at the same place are neighbours."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.cells = np.full((shape[0], shape[2], shape[1]), np.nan, np.float32)

    def index(self, at: int) -> Any:
        return SimpleNamespace(store=lambda tile: self.cells.__setitem__(at, tile.T))


def number(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & _32))[0])


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def memory(address: int, size: int) -> int:
    import ctypes

    return int.from_bytes(ctypes.string_at(address, size), "little")


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a, "cvt.u16.u32": lambda a: a & 0xFFFF, "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b, "shl.b32": lambda a, b: a << b & _32, "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfind.u32": lambda a: (a.bit_length() - 1) & _32, "bmsk.clamp.b32": lambda a, b: (1 << min(b, 32)) - 1 << a & _32,
    "add.u32": lambda a, b: a + b & _32, "add.u64": lambda a, b: a + b & _64,
    "mad.lo.s32": lambda a, b, c: a * b + c & _32, "mad.wide.u32": lambda a, b, c: a * b + c & _64,
    "setp.ne.u32": lambda a, b: int(a != b), "mul.rn.f32": lambda a, b: bits(number(a) * number(b)),
    "cvt.f32.f16": lambda a: bits(float(np.uint16(a).view(np.float16))),
    "cvt.rn.f32.s32": lambda a: bits(a - 2**32 if a >> 31 else a),
    "fma.rn.f32": lambda a, b, c: bits(number(a) * number(b) + number(c)),
}  # fmt: skip


@cache
def parsed(text: str) -> tuple[list[tuple[str | None, str | None, str, list[str]]], dict[str, int]]:
    """The lines of a piece of assembly, and where its labels are."""
    lines: list[tuple[str | None, str | None, str, list[str]]] = []
    labels = {}
    for line in re.sub(r"//.*", "", text).strip("{} \n").split("\n"):
        if line.strip().endswith(":"):
            labels[line.strip()[:-1]] = len(lines)
        elif line.strip() and not line.strip().startswith(".reg"):
            match = re.fullmatch(_LINE, line.strip())
            assert match, line
            lines.append((match[1], match[2], match[3], [one.strip() for one in (match[4] or "").split(",")]))
    return lines, labels


def lane(text: str, registers: dict[str, int], shared: Any) -> dict[str, int]:
    """Run a piece of assembly."""
    lines, labels = parsed(text)
    at = 0

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return registers[name] if name in registers else int(name, 0)

    def address(name: str) -> int:
        base, _, step = name.strip("[]").partition(" + ")
        return value(base) + int(step or 0)

    while at < len(lines):
        inverted, guard, name, (target, *operands) = lines[at]
        at += 1
        if guard is not None and bool(registers[guard]) == (inverted == "!"):
            continue
        if name == "bra":
            at = labels[target]
        elif name == "ld.shared.f32":
            place = address(operands[0])
            assert place % 4 == 0
            assert 0 <= place < 4 * len(shared)
            registers[target] = bits(shared[place // 4])
        elif name.startswith("ld.global"):
            read = memory(address(operands[0]), _SIZES[name.split(".")[-1]])
            registers[target] = read | (_32 - 0xFF if name.endswith("s8") and read > 127 else 0)
        else:
            registers[target] = OPERATIONS[name](*map(value, operands))
    return registers


def fake() -> tuple[ModuleType, dict[str, ModuleType]]:
    """Modules in place of Triton's."""
    gl, gluon, triton = (ModuleType(name) for name in ("gl", "gluon", "triton"))
    gluon.jit = triton.jit = lambda f=None, **_: f or (lambda g: g)  # type: ignore[attr-defined]
    memories: list[Shared] = []

    def allocate(_: Any, shape: Any, __: Any) -> Shared:
        memories.append(Shared(tuple(shape)))
        return memories[-1]

    def load(at: Pointer, mask: Any, other: Any) -> Array:
        index, kept = np.broadcast_arrays(at.index(), mask)
        flat = (
            at.source
            if at.source.dim() == 1
            else at.source.as_strided((at.source.untyped_storage().nbytes() // at.source.element_size(),), (1,))
        )
        cells = flat.float().numpy() if flat.is_floating_point() else flat.numpy()
        return array(
            np.where(kept, cells[np.where(kept, index, 0)], other) if len(cells) else np.full(kept.shape, other)
        )

    def store(at: Pointer, value: Any, mask: Any) -> None:
        kept = np.broadcast_to(mask, value.shape)
        at.source.view(-1)[torch.from_numpy(at.index()[kept].astype(np.int64))] = torch.from_numpy(
            np.asarray(value)[kept]
        ).to(at.source.dtype)

    def assembled(text: str, _: str, operands: list[Any], **named: Any) -> Any:
        if "global_smem" in text:
            return 0
        if "popc" in text:
            return array(np.bitwise_count(np.asarray(operands[0]).astype(np.uint32)), np.int64)
        many = isinstance(named["dtype"], tuple)
        outs = len(named["dtype"]) if many else 1
        whole = [np.broadcast_to(one, operands[0].shape) for one in operands]
        results = np.zeros((outs, *operands[0].shape), np.float32)
        for place in np.ndindex(operands[0].shape):
            given = [bits(one[place]) if one.dtype.kind == "f" else int(one[place]) & (_64 if i == 4 else _32)
                     for i, one in enumerate(whole)]  # fmt: skip
            registers = {f"${outs + i}": one for i, one in enumerate(given)}
            done = lane(text, registers, memories[-1].cells.reshape(-1))
            results[(slice(None), *place)] = [number(done[f"${i}"]) for i in range(outs)]
        return tuple(map(array, results)) if many else array(results[0])

    gl.__dict__.update({
        "constexpr": lambda value: value, "BlockedLayout": lambda *_: None, "SwizzledSharedLayout": lambda *_: None,
        "SliceLayout": lambda *_: None, "int32": np.int32, "int64": np.int64, "float32": np.float32,
        "arange": lambda first, last, **_: array(np.arange(first, last)), "minimum": np.minimum, "load": load,
        "zeros": lambda shape, dtype, _: array(np.zeros(shape, dtype)), "store": store, "thread_barrier": lambda: None,
        "sum": lambda a, axis: a.sum(axis), "allocate_shared_memory": allocate, "inline_asm_elementwise": assembled,
    })  # fmt: skip
    tl = ModuleType("tl")
    tl.__dict__.update({"where": lambda *of: array(np.where(*of))})
    gluon.language, triton.language = gl, tl  # type: ignore[attr-defined]
    root = "triton.experimental"
    experimental = ModuleType("experimental")
    experimental.gluon = gluon  # type: ignore[attr-defined]
    modules = {"triton": triton, "triton.language": tl, root: experimental, f"{root}.gluon": gluon,
               f"{root}.gluon.language": gl}  # fmt: skip
    return gl, modules


def run(kernel: Op, arguments: list[Any]) -> None:
    """All programs of a launch, one after the other."""
    gl, modules = fake()
    names: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, modules):
        exec(render("gluon/walk.py.jinja", **walk.symbols(kernel)), names)
    given = [Pointer(one, np.int64(one.data_ptr())) if isinstance(one, Tensor) else array(one) for one in arguments]
    n = arguments[-4]
    for program in range(-(-n // walk.rows(kernel))):
        gl.program_id = lambda _, program=program: program  # type: ignore[attr-defined]
        names["linear"](*given)


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("values", ["", "int8", "float8_e4m3fn", "float16", "float32"])
def test_products(m: int, values: str) -> None:
    dtype = values if values.startswith("float") and "8" not in values else "bfloat16"
    stored = "" if dtype == values else values
    for density, n, k in ((0.0, 3, 70), (0.1, 5, 2100), (1.0, 2, 130), (0.4, 9, 63)):
        product = Product(m, n, k, "bitmap()", dtype, stored, density, gated=k == 130, bias=n > 2, activation="relu")
        x, weights, bias = product.tensors()
        rows = 1 if m == 1 else 2 if m == 2 else 4
        config = Config(rows, 8 if k == 63 else 4, ("walk=1", "warps=4", "words=32"))
        kernel = kernel_of(product.request(weights, Target.of("sm_90")), product.sizes(weights), config)
        y = torch.full((m, n), torch.nan, dtype=x.dtype)
        given = [x, *(one for weight in weights for one in tensors(weight)), *([] if bias is None else [bias]), y]
        run(kernel, [*given, n, k, m, x.stride(0)])
        correct = wanted(product, x, weights, bias)
        assert (y.double() - correct).norm() <= NORMS[dtype] * correct.norm(), product
