"""The GPU backend: a level-3 kernel rendered as Triton source, compiled ahead of time, launched through the driver.

On CUDA devices neither Triton nor Jinja is imported once a kernel is in the disk cache. On HIP devices, and on the CPU
in Triton's interpreter (`TRITON_INTERPRET=1`), the same source runs through Triton's own launcher.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.backends import triton_plan
from spgen.backends.extras import NO_EXTRAS, Extras
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
from spgen.backends.triton_launch import MAX_GRID, Call, Function, TensorMap, driver, float_bits
from spgen.backends.triton_schedule import default_config as default_config
from spgen.backends.triton_schedule import specialised_config as specialised_config
from spgen.errors import ShapeError, ToolchainError
from spgen.ir.kernel import option, parts
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.gluon.attention import WARPGROUPS
from spgen.templates.triton.attention import Parameter, check, parameters, partial
from spgen.templates.triton.combine import Combination

_SMALLEST_SCALE = 1e-30  # stands for 0, which would turn a masked score of -inf into NaN
_MANY_CALLS = 4096
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
    kernel = served(kernel, target)
    return gluon.HopperKernel(kernel, target) if option(kernel, WARPGROUPS, 0) else AttentionKernel(kernel, target)


def refusal(kernel: Op, target: Target) -> str | None:
    """Why a kernel does not get the form that its schedule asks for; None if it does."""
    from spgen.backends import gluon

    if not option(kernel, WARPGROUPS, 0):
        return None
    return "Triton's interpreter" if triton_interpreted() else gluon.refusal(kernel, target)


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
        self._has_lse: bool = kernel["lse"]
        self._has_sinks: bool = kernel["sinks"]
        self._splits = 0  # programs that share a row tile's keys; 0: the kernel has no such argument
        self._has_tensor_offset: bool = kernel["q_offset"] == "tensor"
        self._driver_launches = target.kind == "cuda" and not triton_interpreted()
        # the parameters that follow from shapes and strides, in the order of _table_sizes, _lengths and _strides
        self._fixed = [p.name for p in self._parameters if p.type in _FIXED_TYPES and p.name != "q_offset"]
        self._calls: dict[tuple[Any, ...], Call | None] = {}  # None: this form does not serve them
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

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """Write `out` and `lse`. Shapes, dtypes and devices are the caller's promise; see spgen/ops.py."""
        if not self._driver_launches:
            return self._portable(q, k, v, out, lse, tables, q_offset, kv_lengths, scale, extras)
        call, changing = self._call(q, k, v, out, lse, tables, q_offset, kv_lengths, scale, extras)
        assert call is not None
        device = call.function.device
        if device == torch._C._cuda_getDevice():
            call(changing, torch._C._cuda_getCurrentRawStream(device))
        else:
            with torch.cuda.device(device):
                call(changing, torch._C._cuda_getCurrentRawStream(device))
        return None

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras,
    ) -> tuple[Call | None, list[int]]:  # fmt: skip
        """The launch of a call (None: this form does not serve it), and the arguments that it brings anew."""
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        changing = [q_at, k_at, v_at, out_at]
        key: tuple[Any, ...] = (
            q.get_device(), scale < 0, (q_at | k_at | v_at | out_at) & 15, q.shape, q.stride(), k.shape, k.stride(),
            v.stride(), out.stride(),
        )  # fmt: skip
        if self._has_lse:
            assert lse is not None
            changing.append(lse.data_ptr())
        if q_offset is not None:
            if self._has_tensor_offset:
                assert isinstance(q_offset, Tensor)
                changing.append(q_offset.data_ptr())
                key += (q_offset.dtype,)
            else:
                changing.append(int(q_offset) & 0xFFFFFFFF)
        if kv_lengths is not None:
            changing.append(kv_lengths.data_ptr())
            key += (kv_lengths.dtype,)
        if extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None:
            changing += (extras.cu_seqlens_q.data_ptr(), extras.cu_seqlens_k.data_ptr())
            key += (extras.cu_seqlens_q.shape, extras.cu_seqlens_q.dtype, extras.cu_seqlens_k.dtype)
        for table in tables:
            changing.append(table.data_ptr())
            key += (table.shape, table.stride())
        changing.append(float_bits(abs(scale) or _SMALLEST_SCALE))
        if extras.softcap is not None:
            changing.append(float_bits(extras.softcap))
        if self._has_sinks:
            assert extras.sink_logits is not None
            changing.append(extras.sink_logits.data_ptr())
        if extras.bias is not None:
            changing.append(extras.bias.data_ptr())
            key += (extras.bias.shape, extras.bias.stride())
        call = self._calls.get(key)
        if call is None:
            call = self._prepare(key, changing, q, k, v, out, tables, q_offset, kv_lengths, scale, extras)
        return call, changing

    def _prepare(
        self, key: tuple[Any, ...], changing: list[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        tables: Sequence[Tensor], q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float,
        extras: Extras,
    ) -> Call | None:  # fmt: skip
        """What all calls of these shapes and strides share; compiles the variant they need if it is new."""
        with self._lock:
            self._forget_many()
            strides = self._strides(q, k, v, out)
            aligned = not key[2] and is_aligned(strides, ELEMENT_BYTES[self.dtype])
            variant = Variant(
                aligned, False, scale < 0, index_type(q_offset), index_type(kv_lengths),
                index_type(extras.cu_seqlens_q), index_type(extras.cu_seqlens_k), is_wide(strides),
            )  # fmt: skip
            sizes = [*table_sizes(tables), *bias_steps(extras), *self._lengths(q, k, extras), *strides]
            maps: list[TensorMap] = []
            if aligned and self._may_use_tensor_maps and k.numel() > 0:
                maps = self._tensor_maps(replace(variant, tma=True), changing, [(1, k), (2, v)])
            if maps and all(tensor_map.is_valid for tensor_map in maps):
                variant = replace(variant, tma=True)
            else:
                maps = []
            fixed = [size for size, name in zip(sizes, self._fixed, strict=True) if not (aligned and name in _LAST)]
            call = Call(self._function(variant, q.get_device()), self._grid(q, extras), fixed, maps)
            self._calls[key] = call
            return call

    def _forget_many(self) -> None:
        """Caches of keys that grow make new calls without end."""
        if len(self._calls) >= _MANY_CALLS:
            self._calls.clear()

    @cached_property
    def _may_use_tensor_maps(self) -> bool:
        return wants_tensor_maps(self.kernel, self.target) and driver().has_tensor_maps

    def _tensor_maps(
        self, variant: Variant, changing: list[int], tensors: Sequence[tuple[int, Tensor]]
    ) -> list[TensorMap]:
        """Maps of tensors, each with where its pointer is among the changing arguments, in the kernel's order."""
        item = ELEMENT_BYTES[self.dtype]
        maps = []
        for (source, tensor), box in zip(tensors, self.binary(variant).boxes, strict=True):
            # the step of an axis of one element is never taken, but must be legal
            strides = [step if size > 1 else VECTOR for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
            strides[-1] = 1
            maps.append(TensorMap(source, changing[source], self.dtype, item, tensor.shape, strides, box))
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
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras,
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
            "q_offset": q_offset, "kv_lengths": kv_lengths, "scale": abs(scale) or _SMALLEST_SCALE,
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
        super().__init__(partial(kernel), target)
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

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """Write `out` and `lse`, as AttentionKernel does."""
        batch, heads, rows, _ = q.shape
        parts = torch.empty(batch * heads * rows * self._part_size, dtype=torch.float32, device=q.device)
        if self._combine.combination.gaps:  # by this are rows known that get no parts
            parts[-batch * heads * rows * self._splits :].fill_(torch.inf)
        if not self._driver_launches:
            self._portable(q, k, v, parts, None, tables, q_offset, kv_lengths, scale, extras)
            return self._combine.portable(parts, out, lse, extras.sink_logits, self._splits)
        call, changing = self._call(q, k, v, out, None, tables, q_offset, kv_lengths, scale, extras)
        assert call is not None
        if call.after is None:
            call.after = self._combine.prepare(out, self._splits)
        results = [parts.data_ptr(), changing[3]]
        changing[3] = results[0]
        if self._combine.combination.lse:
            assert lse is not None
            results.append(lse.data_ptr())
        if self._combine.combination.sinks:
            assert extras.sink_logits is not None
            results.append(extras.sink_logits.data_ptr())
        device = call.function.device
        if device == torch._C._cuda_getDevice():
            _launch_both(call, changing, results)
        else:
            with torch.cuda.device(device):
                _launch_both(call, changing, results)
        return None


def _launch_both(call: Call, changing: list[int], results: list[int]) -> None:
    assert call.after is not None
    stream = torch._C._cuda_getCurrentRawStream(call.function.device)
    call(changing, stream)
    call.after(results, stream)


def _refuse_late_interpreter() -> None:
    """Triton's own functions are made for the interpreter or for compiling when Triton is imported, once for all."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(tl.max, JITFunction):
        raise ToolchainError(
            "TRITON_INTERPRET", given="set after Triton was imported", remedy="set it before the process starts"
        )
