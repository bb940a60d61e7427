"""The GPU backend: a level-3 kernel rendered as Triton source, compiled ahead of time, launched through the driver.

On CUDA devices neither Triton nor Jinja is imported once a kernel is in the disk cache. On HIP devices, and on the CPU
in Triton's interpreter (`TRITON_INTERPRET=1`), the same source runs through Triton's own launcher.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.backends import triton_plan
from spgen.backends.extras import NO_EXTRAS, Extras, Operands
from spgen.backends.triton_arguments import (
    bias_steps,
    index_type,
    is_aligned,
    is_wide,
    lengths_of,
    strides_of,
    table_sizes,
)  # fmt: skip
from spgen.backends.triton_binary import Binary, load_source
from spgen.backends.triton_bound import SMALLEST_SCALE, Launch, SplitLaunch
from spgen.backends.triton_combine import Combiner
from spgen.backends.triton_compile import (
    ELEMENT_BYTES,
    VECTOR,
    Variant,
    arguments,
    binary,
    constants_of,
    source_path,
    wants_tensor_maps,
)
from spgen.backends.triton_launch import MAX_GRID, Call, Function, TensorMap, driver
from spgen.backends.triton_schedule import default_config as default_config
from spgen.backends.triton_schedule import refusal as refusal
from spgen.backends.triton_schedule import specialised_config as specialised_config
from spgen.errors import ShapeError, ToolchainError, float8_error
from spgen.ir.kernel import FLOAT8, option, parts
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon.resources import WARPGROUPS
from spgen.templates.triton.attention import Parameter, check, parameters
from spgen.templates.triton.attention import partial as partial_kernel
from spgen.templates.triton.combine import Combination

_FIXED_TYPES = ("i32", "i64", "stride", "step", "unit")
_LAST = ("q_d", "k_d", "v_d")

_built: dict[tuple[Op, str, bool], AttentionKernel] = {}
_lock = threading.Lock()


def build(kernel: Op, target: Target) -> AttentionKernel:
    """The launchable form of a level-3 attention kernel; source and binaries are made when they are needed first.

    Raises UnsupportedError for a kernel that cannot be expressed in Triton.
    """
    key = (kernel, target.key, triton_interpreted())
    with _lock:
        if key not in _built:
            check(kernel)
            if triton_interpreted():
                _refuse_late_interpreter()
            _built[key] = _form(kernel, target)
        return _built[key]


def _form(kernel: Op, target: Target) -> AttentionKernel:
    """The class that serves a kernel: by what its schedule asks for, and what that form can express."""
    from spgen.backends import gluon

    if option(kernel, "splits", 1) > 1:
        return SplitKernel(kernel, target)
    reason = refusal(kernel, target)
    if kernel["dtype"] == FLOAT8 and (reason or not option(kernel, WARPGROUPS, 0)):
        raise float8_error(target.arch, reason)
    kernel = served(kernel, target)
    return gluon.HopperKernel(kernel, target) if option(kernel, WARPGROUPS, 0) else AttentionKernel(kernel, target)


def served(kernel: Op, target: Target) -> Op:
    """The kernel with the schedule that it gets: another one where it is refused the form that it asks for."""
    from spgen.backends import gluon

    return gluon.portable(kernel) if refusal(kernel, target) else kernel


def planner(program: Op, target: Target) -> triton_plan.Planner | None:
    """What makes the tables of a level-2 program on the device; None in the interpreter, where torch is quicker."""
    return None if triton_interpreted() else triton_plan.planner(program, target)


class AttentionKernel:
    """A compiled attention kernel. Calls are asynchronous, on the current stream of the tensors' device."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.kernel, self.target = kernel, target
        self.dtype: str = kernel["dtype"]
        self.tables = parts(kernel, "table")
        self._parameters = parameters(kernel)
        self._splits = 0  # programs that share a row tile's keys; 0: the kernel has no such argument
        self._driver_launches = target.kind == "cuda" and not triton_interpreted()
        # the parameters that follow from shapes and strides, in the order of table_sizes, _lengths and _strides
        self._fixed = [p.name for p in self._parameters if p.type in _FIXED_TYPES and p.name != "q_offset"]
        self._binaries: dict[Variant, Binary] = {}
        self._functions: dict[tuple[Variant, int], Function] = {}
        self._module: Any = None
        self._lock = threading.RLock()

    @property
    def path(self) -> Path:
        """The file of the rendered source; rendered again if someone emptied the cache."""
        return source_path(self.kernel)

    @property
    def source(self) -> str:
        """The rendered Triton module."""
        return self.path.read_text(encoding="utf-8")

    @property
    def compile_count(self) -> int:
        """How many binaries this process has compiled or loaded for the kernel."""
        return len(self._binaries)

    def __call__(self, *operands: Any) -> None:
        """Write `out` and `lse`; shapes, dtypes and devices of the Operands are the caller's promise (spgen/ops.py).

        Calls that come again are quicker through `bind`.
        """
        self.bind()(*operands)

    def bind(self) -> Callable[..., None]:
        """What serves calls whose operands, its arguments, agree in shapes, strides, dtypes and device."""
        return Launch(self.prepare) if self._driver_launches else self._portable

    def prepare(self, operands: Operands, aligned: bool) -> Call:
        """What all launches for operands of these shapes and strides share; compiles the variant if it is new.

        `aligned`: the addresses of q, k, v and `out` are multiples of 16 bytes.
        """
        q, k, v, out, _, tables, q_offset, kv_lengths, scale, extras = operands
        with self._lock:
            strides = self._strides(q, k, v, out)
            aligned = aligned and is_aligned(strides, ELEMENT_BYTES[self.dtype])
            variant = Variant(
                aligned, False, scale < 0, index_type(q_offset), index_type(kv_lengths),
                index_type(extras.cu_seqlens_q), index_type(extras.cu_seqlens_k), is_wide(strides),
            )  # fmt: skip
            sizes = [*table_sizes(tables), *bias_steps(extras), *self._lengths(q, k, extras), *strides]
            maps: list[TensorMap] = []
            if aligned and self._may_use_tensor_maps and k.numel() > 0:
                maps = self._tensor_maps(replace(variant, tma=True), [(1, k), (2, v)])
            if maps and all(tensor_map.is_valid for tensor_map in maps):
                variant = replace(variant, tma=True)
            else:
                maps = []
            fixed = [size for size, name in zip(sizes, self._fixed, strict=True) if not (aligned and name in _LAST)]
            return Call(self._function(variant, q.get_device()), self._grid(q, extras), fixed, maps)

    @cached_property
    def _may_use_tensor_maps(self) -> bool:
        return wants_tensor_maps(self.kernel, self.target) and driver().has_tensor_maps

    def _tensor_maps(self, variant: Variant, tensors: Sequence[tuple[int, Tensor]]) -> list[TensorMap]:
        """Maps of tensors, each with where its pointer is among the changing arguments, in the kernel's order."""
        maps = []
        for (source, tensor), box in zip(tensors, self.binary(variant).boxes, strict=True):
            # the step of an axis of one element is never taken, but must be legal
            strides = [step if size > 1 else VECTOR for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
            strides[-1] = 1
            dtype = str(tensor.dtype).removeprefix("torch.")
            item = ELEMENT_BYTES[dtype]
            maps.append(TensorMap(source, tensor.data_ptr(), dtype, item, tensor.shape, strides, box))
        return maps

    def usual_variants(self) -> list[Variant]:
        """What contiguous tensors need, the most usual first."""
        mapped = [Variant(aligned=True, tma=True)] if wants_tensor_maps(self.kernel, self.target) else []
        return [*mapped, Variant(aligned=True)]

    def binary(self, variant: Variant) -> Binary:
        """The compiled variant, from the cache or compiled now; no device is needed."""
        if variant not in self._binaries:
            self._binaries[variant] = binary(self.kernel, self.path, variant, self.target)
        return self._binaries[variant]

    def _function(self, variant: Variant, device: int) -> Function:
        if (variant, device) not in self._functions:
            kinds = ["map" if p.type == "desc" else "fixed" if p.name in self._fixed else "changing"
                     for p in self._arguments(variant)]  # fmt: skip
            with torch.cuda.device(device):
                self._functions[variant, device] = self.binary(variant).load(device, kinds)
        return self._functions[variant, device]

    def _arguments(self, variant: Variant) -> list[Parameter]:
        """The parameters that are arguments of the binary."""
        return arguments(self.kernel, variant)

    def compile_rest(self) -> None:
        """Bring what is launched beside the kernel itself into the cache; no device is needed."""

    def _strides(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[int]:
        return strides_of(q, k, v) if self._splits else strides_of(q, k, v, out)[:-1]

    def _lengths(self, q: Tensor, k: Tensor, extras: Extras) -> list[int]:
        n_parts = q.shape[0] * q.shape[1] * q.shape[2] * self._splits
        return [*lengths_of(q, k, extras), *((self._splits, n_parts) if self._splits else ())]

    def _grid(self, q: Tensor, extras: Extras) -> int:
        """One program per row tile (per slot in a packed batch) and query head, or per packed group; and per split."""
        pack: int = self.kernel["pack"]
        rows: int = self.kernel["block_m"] // pack
        tiles = -(-q.shape[2] // rows)
        if extras.cu_seqlens_q is not None and q.shape[2]:
            tiles = q.shape[2] // rows + extras.cu_seqlens_q.shape[0] + 1
        grid = q.shape[0] * (q.shape[1] // pack) * tiles * max(self._splits, 1)
        if grid > MAX_GRID:
            raise ShapeError(
                "q", given=f"{grid} tiles of rows", allowed=f"at most {MAX_GRID}", remedy="split the batch"
            )
        return grid

    def _portable(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """The same kernel through Triton's own front end."""
        grid, warps, stages = self._grid(q, extras), option(self.kernel, "warps", 4), option(self.kernel, "stages", 2)
        if not grid:
            return
        lengths, strides = self._lengths(q, k, extras), self._strides(q, k, v, out)
        sizes = [*table_sizes(tables), *bias_steps(extras), *lengths, *strides]
        constants = constants_of(self.kernel, Variant(negative=scale < 0), stages)
        named: dict[str, Any] = {
            **dict(zip(self._fixed, sizes, strict=True)), **constants,
            **{f"{op['name']}_table": table for op, table in zip(self.tables, tables, strict=True)},
            "q": q, "k": k, "v": v, "out": out, "lse": lse, "k_blocks": None, "v_blocks": None,
            "q_offset": q_offset, "kv_lengths": kv_lengths, "scale": abs(scale) or SMALLEST_SCALE,
            **extras._asdict(),
        }  # fmt: skip
        values = {parameter.name: named[parameter.name] for parameter in self._parameters}
        if self._module is None:
            self._module = load_source(self.path)
        if triton_interpreted():
            self._module.attention[grid,](**values)
        else:
            with torch.cuda.device(q.device):
                self._module.attention[grid,](**values, num_warps=warps, num_stages=stages)


class SplitKernel(AttentionKernel):
    """Attention whose keys are dealt to several programs per row tile, and their parts added up (Dao et al. 2023).

    For calls with fewer row tiles than the device runs at a time. The parts are a workspace of the call's own:
    splits * (Dv + 1) float32 for each row and head. Other numbers of splits are made of the same binaries. No atomics.
    """

    def __init__(self, kernel: Op, target: Target) -> None:
        super().__init__(partial_kernel(kernel), target)
        self._splits = option(kernel, "splits", 1)
        self._combine = Combiner(Combination.of(kernel), target)
        self._part_size: int = self._splits * (kernel["value_dim"] + 1)

    @property
    def source(self) -> str:
        """Both rendered Triton modules."""
        return "\n\n".join((super().source, self._combine.source))

    def compile_rest(self) -> None:
        """Bring what adds up the parts into the cache."""
        self._combine.binary()

    def bind(self) -> SplitLaunch:
        """As AttentionKernel does."""
        combine = partial(self._combine.bind, splits=self._splits)
        return SplitLaunch(super().bind(), combine, self._part_size, self._splits, self._combine.combination.gaps)


def _refuse_late_interpreter() -> None:
    """Triton's own functions are made for the interpreter or for compiling when Triton is imported, once for all."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(tl.max, JITFunction):
        raise ToolchainError(
            "TRITON_INTERPRET", given="set after Triton was imported", remedy="set it before the process starts"
        )
