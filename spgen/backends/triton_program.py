"""A rendered Triton module with its launches: for kernels of which calls fix the sizes, and nothing else.

On CUDA devices neither Triton nor Jinja is imported once a binary is in the disk cache. On HIP devices, and on the CPU
in Triton's interpreter (`TRITON_INTERPRET=1`), the same source runs through Triton's own launcher.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spgen.backends import triton_binary
from spgen.backends.triton_binary import Binary, Specialised, compile_ahead, load_source, rendered
from spgen.backends.triton_compile import VECTOR
from spgen.backends.triton_counters import counters
from spgen.backends.triton_launch import MAX_GRID, Call, Function, TensorMap
from spgen.errors import CompileError, ShapeError
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.triton.attention import Parameter

_MANY_CALLS = 4096
_EARLY_FROM = 90  # compute capability that lets kernels begin before others end


@dataclass(frozen=True)
class Form:
    """One function of a module: tensors first among its parameters, then numbers.

    Kinds of parameters are Triton's types, or names of `types` for pointers, or "step" and "size": int64 and int32
    that are multiples of `vector` in the aligned variant, in which all tensors lie at multiples of 16 bytes. `boxes`
    are the types of parameters that are tensor descriptors, which stand between tensors and numbers. `registers` caps
    those of a thread (0: what fits), so that several programs fit a multiprocessor. An `early` function may be launched
    before what precedes it in its stream has ended, on GPUs that can: of templates that wait for it if `early` is set.
    """

    entry: str
    parameters: tuple[Parameter, ...]
    types: Mapping[str, str]
    vector: int
    warps: int = 4
    stages: int = 1
    boxes: Mapping[str, str] = field(default_factory=dict)
    registers: int = 0
    early: bool = False

    def type_of(self, parameter: Parameter) -> str:
        """Triton's type of a parameter."""
        if parameter.name in self.boxes:
            return self.boxes[parameter.name]
        kinds = {"step": "i64", "size": "i32", **self.types}
        return kinds.get(parameter.type, parameter.type)

    @property
    def tensors(self) -> int:
        """How many parameters are pointers."""
        return sum(self.type_of(parameter).startswith("*") for parameter in self.parameters)

    def allows(self, pointers: Sequence[int], numbers: Sequence[int]) -> bool:
        """Whether the aligned variant serves a call."""
        steps = zip(self.parameters[self.tensors + len(self.boxes) :], numbers, strict=True)
        return not any(at % VECTOR for at in pointers) and not any(
            number % self.vector for parameter, number in steps if parameter.type in ("step", "size")
        )


class Program:
    """The functions of one rendered module. Calls are asynchronous, on the current stream of the tensors' device."""

    def __init__(
        self, template: str, text: str, symbols: Callable[[], Mapping[str, Any]], forms: Sequence[Form], target: Target
    ) -> None:
        self.target = target
        self.forms = {form.entry: form for form in forms}
        self._portable = target.kind != "cuda" or triton_interpreted()
        self._early = not self._portable and int(target.arch.removeprefix("sm_")) >= _EARLY_FROM
        self._early &= any(form.early for form in forms)
        self.text, self._template, self._symbols = text, template, symbols
        if self._early:
            self.text, self._symbols = f"{text}, early", lambda: {**symbols(), "early": True}
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._functions: dict[tuple[Any, ...], Function] = {}
        self._module: ModuleType | None = None
        self._lock = threading.RLock()

    @property
    def path(self) -> Path:
        """The file of the rendered source; rendered again if someone emptied the cache."""
        return rendered(self._template, self.text, self._symbols)

    def launch(self, entry: str, tensors: Sequence[Tensor], numbers: Sequence[int], grid: int) -> None:
        """Run a function over the arguments in their order, if the grid holds any program."""
        if grid > MAX_GRID:
            raise ShapeError("x", given=f"{grid} tiles of rows", allowed=f"at most {MAX_GRID}", remedy="split x")
        if self._portable:
            return self._launch_portable(entry, tensors, numbers, grid)
        pointers = [tensor.data_ptr() for tensor in tensors]
        shared = 0
        for pointer in pointers:
            shared |= pointer
        key = (entry, tensors[0].get_device(), shared % VECTOR, grid, *numbers)
        call = self._calls.get(key) or self._prepare(key, pointers, numbers)
        return call(pointers)

    def _prepare(self, key: tuple[Any, ...], pointers: Sequence[int], numbers: Sequence[int]) -> Call:
        entry, device, _, grid = key[:4]
        with self._lock:
            if len(self._calls) >= _MANY_CALLS:
                self._calls.clear()
            aligned = self.forms[entry].allows(pointers, numbers)
            early = self._early and self.forms[entry].early
            self._calls[key] = Call(self._function(entry, aligned, device), grid, numbers, early=early)
            return self._calls[key]

    def map(
        self, entry: str, tensors: Sequence[tuple[int, Tensor]], numbers: Sequence[int], grid: int, draws: bool = True
    ) -> Call | None:
        """A launch of an aligned function through tensor maps, of which each call brings all pointers.

        `tensors` are what the maps show, with four axes, and their places among the pointers. None where the hardware
        cannot express them. If programs draw what to do, the grid is bounded by the multiprocessors, and a counter is
        the last pointer.
        """
        maps = []
        for (place, tensor), box in zip(tensors, self.binary(entry).boxes, strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            # the step of an axis of one element is never taken, but must be legal
            steps = [step if size > 1 else VECTOR for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
            steps[-1] = 1
            shape, item = tensor.shape, tensor.element_size()
            maps.append(TensorMap(place, tensor.data_ptr(), dtype, item, shape, steps, box))
        if not all(one.is_valid for one in maps):
            return None
        device = tensors[0][1].get_device()
        with self._lock:
            function = self._function(entry, True, device)
        if not draws:
            return Call(function, grid, numbers, maps, early=self._early and self.forms[entry].early)
        return Call(function, min(grid, self.target.cores), numbers, maps, counters(device).of)

    def _function(self, entry: str, aligned: bool, device: int) -> Function:
        key = (entry, aligned, device)
        if key not in self._functions:
            form = self.forms[entry]
            kinds = ["changing"] * form.tensors + ["map"] * len(form.boxes)
            kinds += ["fixed"] * (len(form.parameters) - len(kinds))
            with torch.cuda.device(device):
                self._functions[key] = self.binary(entry, aligned).load(device, kinds)
        return self._functions[key]

    def binary(self, entry: str, aligned: bool = True) -> Binary:
        """A compiled function, from the cache or compiled now; no device is needed.

        Raises CompileError if it does not fit the target.
        """
        fields = {"kernel": f"{entry}: {self.text}", "variant": {"aligned": aligned}}
        return triton_binary.binary(fields, self.target, lambda: self._build(entry, aligned))

    def precompile(self, entry: str) -> Mapping[str, int]:
        """Bring the binaries of aligned calls into the cache; what that of `entry` takes."""
        for other in self.forms:
            self.binary(other)
        return self.binary(entry).resources

    def _build(self, entry: str, aligned: bool) -> tuple[Specialised, Any]:
        function = self.specialised(entry, aligned)
        built = compile_ahead(function, self.target)
        if built.metadata.shared > self.target.smem_bytes:
            raise CompileError(
                entry, given=f"{built.metadata.shared} bytes of shared memory",
                allowed=f"at most {self.target.smem_bytes} on {self.target.arch}",
                remedy="choose smaller tiles, or fewer stages",
            )  # fmt: skip
        return function, built

    def specialised(self, entry: str, aligned: bool = True) -> Specialised:
        """A rendered function with its types."""
        form = self.forms[entry]
        types = {parameter.name: form.type_of(parameter) for parameter in form.parameters}
        divisors: dict[str, int] = {}
        if aligned:
            divisors = {name: VECTOR for name, kind in types.items() if kind.startswith("*")}
            divisors |= {one.name: form.vector for one in form.parameters if one.type in ("step", "size")}
        return Specialised(self.path, entry, types, {}, divisors, form.warps, form.stages, form.registers)

    def _launch_portable(self, entry: str, tensors: Sequence[Tensor], numbers: Sequence[int], grid: int) -> None:
        """The same function through Triton's own front end."""
        if not grid:
            return
        if self._module is None:
            self._module = load_source(self.path)
        function = getattr(self._module, entry)[grid,]
        if triton_interpreted():
            function(*tensors, *numbers)
        else:
            with torch.cuda.device(tensors[0].device):
                function(*tensors, *numbers, num_warps=self.forms[entry].warps, num_stages=self.forms[entry].stages)
