"""Float8 of q, k and v with their scales, by two Triton kernels: the peaks of k's and v's heads, then all values.

Maxima do not depend on their order, so the bits are always the same.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spgen.backends import triton_binary
from spgen.backends.triton_arguments import index_type, strides_of
from spgen.backends.triton_binary import Specialised, compile_ahead, load_source, rendered
from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR
from spgen.backends.triton_launch import MAX_GRID, Call, Function
from spgen.errors import ShapeError
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.triton import quantize
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.quantize import PEAK_ROWS, PEAKS, QUANTIZE, ROWS, Quantization

_WARPS = 4
_MANY_CALLS = 4096


@lru_cache(maxsize=256)
def quantizer(quantization: Quantization, target: Target) -> Quantizer:
    """The kernels for one kind of tensors, compiled when the first call needs them."""
    return Quantizer(quantization, target)


class Quantizer:
    """Compiled kernels that make float8. Calls are asynchronous, on the current stream of the tensors' device."""

    def __init__(self, quantization: Quantization, target: Target) -> None:
        self.quantization, self.target = quantization, target
        self._functions: dict[tuple[Any, ...], Function] = {}
        self._calls: dict[tuple[Any, ...], list[Call]] = {}
        self._module: ModuleType | None = None
        self._lock = threading.RLock()

    @property
    def path(self) -> Path:
        """The file of the rendered source."""
        one = self.quantization
        return rendered("triton/quantize.py.jinja", str(one), lambda: quantize.symbols(one))

    def __call__(self, tensors: Sequence[Tensor], kv_lengths: Tensor | None, results: Sequence[Tensor]) -> None:
        """Write values and scales of q, k and v: six results, of the shapes that spgen/quantize.py gives them."""
        peaks = torch.zeros(2, max(results[4].numel(), 1), dtype=torch.int32, device=tensors[0].device)
        named = dict(zip("qkv", tensors, strict=True)) | {"k_peaks": peaks[0], "v_peaks": peaks[1]}
        named |= dict(zip([f"{n}_{part}" for part in ("values", "scales") for n in "qkv"], results, strict=True))
        if kv_lengths is not None:
            named["kv_lengths"] = kv_lengths
        if triton_interpreted() or self.target.kind != "cuda":
            return self._portable(named)
        pointers = {entry: [named[p.name].data_ptr() for p in _tensors(self._of(entry))] for entry in quantize.ENTRIES}
        for entry, call in zip(quantize.ENTRIES, self._prepare(named, pointers[QUANTIZE]), strict=True):
            call(pointers[entry])
        return None

    def _of(self, entry: str) -> tuple[Parameter, ...]:
        return quantize.parameters(self.quantization, entry)

    def _prepare(self, named: dict[str, Tensor], pointers: list[int]) -> list[Call]:
        """What all calls of these shapes and strides share; compiles what is new."""
        tensors = [named[name] for name in "qkv"]
        lengths = named.get("kv_lengths")
        unaligned = any(at % VECTOR for at in pointers[:3])
        key = (
            tensors[0].get_device(), unaligned, index_type(lengths), *[(t.shape, t.stride()) for t in tensors]
        )  # fmt: skip
        with self._lock:
            if key not in self._calls:
                if len(self._calls) >= _MANY_CALLS:
                    self._calls.clear()
                aligned = not unaligned and _is_aligned(tensors, ELEMENT_BYTES[self.quantization.dtype])
                self._calls[key] = [
                    self._call(entry, tensors, aligned, index_type(lengths)) for entry in quantize.ENTRIES
                ]
            return self._calls[key]

    def _call(self, entry: str, tensors: Sequence[Tensor], aligned: bool, index: str) -> Call:
        sizes = _sizes(tensors)
        fixed = [sizes[p.name] for p in self._of(entry) if p.name in sizes and not (aligned and p.type == "unit")]
        return Call(self._function(entry, aligned, index, tensors[0].get_device()), _grid(entry, sizes), fixed)

    def _function(self, entry: str, aligned: bool, index: str, device: int) -> Function:
        key = (entry, aligned, index, device)
        if key not in self._functions:
            one = self.specialised(entry, aligned, index)
            fields = {"kernel": f"{entry}: {self.quantization}", "variant": {"aligned": aligned, "index": index}}
            built = triton_binary.binary(fields, self.target, lambda: (one, compile_ahead(one, self.target)))
            pointers = {parameter.name for parameter in _tensors(self._of(entry))}
            kinds = ["changing" if name in pointers else "fixed" for name in one.arguments]
            with torch.cuda.device(device):
                self._functions[key] = built.load(device, kinds)
        return self._functions[key]

    def specialised(self, entry: str, aligned: bool = True, index: str = "i32") -> Specialised:
        """The rendered function with its types; `aligned`: last strides are 1, all else multiples of 16 bytes."""
        element = TRITON_TYPES[self.quantization.dtype]
        names = {
            "data": f"*{element}", "float8": f"*{TRITON_TYPES['float8_e4m3fn']}", "*index": f"*{index}",
            "unit": "constexpr" if aligned else "i64",
        }  # fmt: skip
        types = {parameter.name: names.get(parameter.type, parameter.type) for parameter in self._of(entry)}
        divisors = {parameter.name: VECTOR for parameter in self._of(entry) if parameter.type == "float8"}
        if aligned:
            steps = VECTOR // ELEMENT_BYTES[self.quantization.dtype]
            divisors |= {name: VECTOR for name in "qkv" if name in types}
            divisors |= {name: steps for name in types if name[2:] in ("b", "h", "n") and name[0] in "qkv"}
        constants = {name: 1 for name, kind in types.items() if kind == "constexpr"}
        return Specialised(self.path, entry, types, constants, divisors, _WARPS)

    def _portable(self, named: dict[str, Tensor]) -> None:
        """The same kernels through Triton's own front end."""
        if self._module is None:
            self._module = load_source(self.path)
        sizes = _sizes([named[name] for name in "qkv"])
        for entry in quantize.ENTRIES:
            values: dict[str, Any] = {p.name: named.get(p.name, sizes.get(p.name)) for p in self._of(entry)}
            if _grid(entry, sizes):
                getattr(self._module, entry)[_grid(entry, sizes),](**values)


def _tensors(parameters: Sequence[Parameter]) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.type not in ("i32", "i64", "unit")]


def _sizes(tensors: Sequence[Tensor]) -> dict[str, int]:
    """Every number among the arguments."""
    q, k, _ = tensors
    steps = strides_of(*tensors)
    names = [f"{name}_{axis}" for name in "qkv" for axis in "bhnd"]
    return dict(zip(names, steps, strict=True)) | {
        "q_len": q.shape[2], "n_heads": q.shape[1], "n_sequences": q.shape[0], "k_len": k.shape[2],
        "n_key_heads": k.shape[1],
    }  # fmt: skip


def _grid(entry: str, sizes: dict[str, int]) -> int:
    heads = sizes["n_sequences"] * sizes["n_key_heads"]
    if entry == PEAKS:
        return heads * -(-sizes["k_len"] // PEAK_ROWS)
    queries = sizes["n_sequences"] * sizes["n_heads"] * -(-sizes["q_len"] // ROWS)
    grid = queries + 2 * heads * -(-sizes["k_len"] // ROWS)
    if grid > MAX_GRID:
        raise ShapeError("q", given=f"{grid} tiles of rows", allowed=f"at most {MAX_GRID}", remedy="split the batch")
    return grid


def _is_aligned(tensors: Sequence[Tensor], item: int) -> bool:
    """Whether last strides are 1 and all others multiples of 16 bytes."""
    steps = strides_of(*tensors)
    return all(step == 1 for step in steps[3::4]) and (
        gcd(*(step for at, step in enumerate(steps) if at % 4 != 3)) * item % VECTOR == 0
    )
