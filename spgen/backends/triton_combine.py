"""The kernel that adds up the parts of a split call: a row of one head for each program.

The order of the parts is fixed, so the bits are, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spgen.backends import triton_binary
from spgen.backends.triton_binary import Binary, Specialised, compile_ahead, load_source, rendered
from spgen.backends.triton_compile import TRITON_TYPES, VECTOR
from spgen.backends.triton_launch import Call, Function
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.triton import combine
from spgen.templates.triton.combine import Combination

_WARPS = 4
_POINTERS = ("workspace", "data", "*fp32")


class Combiner:
    """A compiled combination of parts, for any number of them; see SplitKernel."""

    def __init__(self, combination: Combination, target: Target) -> None:
        self.combination, self.target = combination, target
        self._parameters = combine.parameters(combination)
        self._driver_launches = target.kind == "cuda" and not triton_interpreted()
        self._functions: dict[int, Function] = {}
        self._module: ModuleType | None = None
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The file of the rendered source."""
        return rendered("triton/combine.py.jinja", str(self.combination), lambda: combine.symbols(self.combination))

    @property
    def source(self) -> str:
        """The rendered Triton module."""
        return self.path.read_text(encoding="utf-8")

    def binary(self) -> Binary:
        """The binary, from the cache or compiled now; no device is needed."""

        def build() -> tuple[Specialised, Any]:
            function = self.specialised()
            return function, compile_ahead(function, self.target)

        return triton_binary.binary({"kernel": str(self.combination)}, self.target, build)

    def specialised(self) -> Specialised:
        """The rendered function with its types."""
        kinds = {"workspace": "*fp32", "data": f"*{TRITON_TYPES[self.combination.dtype]}"}
        types = {parameter.name: kinds.get(parameter.type, parameter.type) for parameter in self._parameters}
        divisors = {parameter.name: VECTOR for parameter in self._parameters if parameter.type == "workspace"}
        return Specialised(self.path, combine.ENTRY, types, {}, divisors, _WARPS)

    def bind(self, out: Tensor, splits: int) -> Callable[..., None]:
        """What serves all results of this shape and these strides: a function of parts, out, lse and sinks."""
        if not self._driver_launches:
            return partial(self._portable, splits)
        return partial(_launch, Call(self._function(out.get_device()), _rows(out), _sizes(out, splits)))

    def _function(self, device: int) -> Function:
        with self._lock:
            if device not in self._functions:
                kinds = ["changing" if p.type in _POINTERS else "fixed" for p in self._parameters]
                with torch.cuda.device(device):
                    self._functions[device] = self.binary().load(device, kinds)
            return self._functions[device]

    def _portable(self, splits: int, parts: Tensor, out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> None:
        """The same kernel through Triton's own front end."""
        if not _rows(out):
            return
        if self._module is None:
            self._module = load_source(self.path)
        fixed = [parameter.name for parameter in self._parameters if parameter.type not in _POINTERS]
        named = {
            "parts": parts, "out": out, "lse": lse, "sink_logits": sinks,
            **dict(zip(fixed, _sizes(out, splits), strict=True)),
        }  # fmt: skip
        values = {parameter.name: named[parameter.name] for parameter in self._parameters}
        if triton_interpreted():
            self._module.combine[_rows(out),](**values)
        else:
            with torch.cuda.device(out.device):
                self._module.combine[_rows(out),](**values, num_warps=_WARPS)


def _launch(call: Call, parts: Tensor, out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> None:
    results = [parts.data_ptr(), out.data_ptr()]
    if lse is not None:
        results.append(lse.data_ptr())
    if sinks is not None:
        results.append(sinks.data_ptr())
    call(results)


def _rows(out: Tensor) -> int:
    return out.shape[0] * out.shape[1] * out.shape[2]


def _sizes(out: Tensor, splits: int) -> list[int]:
    """What follows the pointers among the arguments."""
    return [splits, splits * _rows(out), out.shape[2], out.shape[1], *out.stride()[:3]]
