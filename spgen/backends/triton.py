"""The GPU backend: a level-3 kernel rendered as Triton source, compiled ahead of time, launched through the driver.

On CUDA devices neither Triton nor Jinja is imported once a kernel is in the disk cache. On HIP devices, and on the CPU
in Triton's interpreter (`TRITON_INTERPRET=1`), the same source runs through Triton's own launcher.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.backends.triton_compile import (
    ELEMENT_BYTES,
    Binary,
    Variant,
    arguments,
    binary,
    constants_of,
    load_source,
    source_path,
)  # fmt: skip
from spgen.backends.triton_launch import MAX_GRID, Launch, TensorMap, driver, float_bits
from spgen.backends.triton_schedule import default_schedule as default_schedule
from spgen.errors import ShapeError, ToolchainError
from spgen.ir.kernel import option, parts
from spgen.ir.node import Op
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.triton.attention import check, parameters

_SMALLEST_SCALE = 1e-30  # stands for 0, which would turn a masked score of -inf into NaN
_MANY_LAUNCHES = 4096
_VECTOR = 16  # bytes that one load instruction moves

_built: dict[tuple[Op, str, bool], AttentionKernel] = {}
_lock = threading.Lock()


def build(kernel: Op, target: Target) -> AttentionKernel:
    """The launchable form of a level-3 attention kernel; its source is rendered now, its binaries at first use.

    Raises UnsupportedError for a kernel that cannot be expressed in Triton.
    """
    key = (kernel, target.key, triton_interpreted())
    with _lock:
        if key not in _built:
            check(kernel)
            if triton_interpreted():
                _refuse_late_interpreter()
            _built[key] = AttentionKernel(kernel, target, source_path(kernel))
        return _built[key]


class AttentionKernel:
    """A compiled attention kernel. Calls are asynchronous, on the current stream of the tensors' device."""

    def __init__(self, kernel: Op, target: Target, path: Path) -> None:
        self.kernel, self.target, self.path = kernel, target, path
        self.dtype: str = kernel["dtype"]
        self.tables = parts(kernel, "table")
        self._parameters = parameters(kernel)
        self._has_tensor_offset: bool = kernel["q_offset"] == "tensor"
        self._driver_launches = target.kind == "cuda" and not triton_interpreted()
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self._binaries: dict[Variant, Binary] = {}
        self._functions: dict[tuple[Variant, int], int] = {}
        self._module: Any = None
        self._lock = threading.RLock()

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
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        """Write `out` and `lse`. Shapes, dtypes and devices are the caller's promise; see spgen/ops.py."""
        if not self._driver_launches:
            return self._portable(q, k, v, out, lse, tables, q_offset, kv_lengths, scale)
        device = q.get_device()
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        changing = [q_at, k_at, v_at, out_at]
        key: tuple[Any, ...] = (
            device, scale < 0, (q_at | k_at | v_at | out_at) & 15, q.shape, q.stride(), k.shape, k.stride(),
            v.stride(), out.stride(),
        )  # fmt: skip
        if lse is not None and self.kernel["lse"]:
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
        for table in tables:
            changing.append(table.data_ptr())
            key += (table.shape, table.stride())
        changing.append(float_bits(abs(scale) or _SMALLEST_SCALE))
        launch = self._launches.get(key)
        if launch is None:
            launch = self._prepare(key, changing, q, k, v, out, tables, q_offset, kv_lengths, scale)
        if device == torch._C._cuda_getDevice():
            launch(changing, torch._C._cuda_getCurrentRawStream(device))
        else:
            with torch.cuda.device(device):
                launch(changing, torch._C._cuda_getCurrentRawStream(device))
        return None

    def _prepare(
        self, key: tuple[Any, ...], changing: list[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        tables: Sequence[Tensor], q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float,
    ) -> Launch:  # fmt: skip
        """What all calls of these shapes and strides share; compiles the variant they need if it is new."""
        with self._lock:
            if len(self._launches) >= _MANY_LAUNCHES:
                self._launches.clear()
            sizes = _sizes(self.tables, q, k, v, out, tables)
            aligned = not key[2] and _is_aligned(sizes, ELEMENT_BYTES[self.dtype])
            variant = Variant(aligned, False, scale < 0, _index_type(q_offset), _index_type(kv_lengths))
            launch = None
            if aligned and self._may_use_tensor_maps(k):
                launch = self._launch(replace(variant, tma=True), changing, sizes, k, v)
            if launch is None:
                launch = self._launch(variant, changing, sizes, k, v)
            assert launch is not None
            self._launches[key] = launch
            return launch

    def _may_use_tensor_maps(self, k: Tensor) -> bool:
        """Whether K and V can come through tensor descriptors: rows of a tile adjacent, hardware from sm_90 on."""
        return (
            int(self.target.arch.removeprefix("sm_")) >= 90
            and option(self.kernel, "tma", 1) == 1
            and any(op["contiguous"] and op["key"] is None for op in parts(self.kernel, "segment"))
            and self.kernel["block_n"] <= 256
            and k.numel() > 0
            and driver().has_tensor_maps
        )

    def _launch(
        self, variant: Variant, changing: list[int], sizes: dict[str, int], k: Tensor, v: Tensor
    ) -> Launch | None:
        """The prepared launch, or None if the tensors cannot be described by tensor maps."""
        device, built = k.get_device(), self._binary(variant)
        values: list[Any] = []
        moving: list[int] = []
        boxes = iter(built.boxes)
        for parameter in arguments(self.kernel, variant):
            if parameter.type == "desc":
                source, tensor = (1, k) if parameter.name == "k_blocks" else (2, v)
                tensor_map = self._tensor_map(source, changing[source], tensor, next(boxes))
                if not tensor_map.is_valid:
                    return None
                values.append(tensor_map)
                continue
            if parameter.name not in sizes:
                moving.append(len(values))
            values.append(sizes.get(parameter.name, 0))
        values += [0] * built.scratch
        grid = self._grid(sizes)
        return Launch(self._function(variant, device), device, grid, built.threads, built.shared, values, moving)

    def _tensor_map(self, source: int, pointer: int, tensor: Tensor, box: dict[str, Any]) -> TensorMap:
        item = ELEMENT_BYTES[self.dtype]
        # the step of an axis of one element is never taken, but must be legal
        strides = [
            stride if size > 1 else _VECTOR // item
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]  # fmt: skip
        return TensorMap(source, pointer, self.dtype, item, tensor.shape, [*strides[:-1], 1], box)

    def _binary(self, variant: Variant) -> Binary:
        if variant not in self._binaries:
            self._binaries[variant] = binary(self.kernel, self.path, variant, self.target)
        return self._binaries[variant]

    def _function(self, variant: Variant, device: int) -> int:
        if (variant, device) not in self._functions:
            built = self._binary(variant)
            with torch.cuda.device(device):
                self._functions[variant, device] = driver().load(built.code, built.entry, built.shared, device)
        return self._functions[variant, device]

    def _grid(self, sizes: dict[str, int]) -> int:
        """One program per row tile and query head, or per packed group of heads."""
        pack: int = self.kernel["pack"]
        rows: int = self.kernel["block_m"] // pack
        tiles = -(-sizes["q_len"] // rows)
        grid = sizes["batch"] * sizes["n_key_heads"] * (sizes["group"] // pack) * tiles
        if grid > MAX_GRID:
            raise ShapeError(
                "q", given=f"{grid} tiles of rows", allowed=f"at most {MAX_GRID}", remedy="split the batch"
            )
        return grid

    def _portable(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        """The same kernel through Triton's own front end."""
        sizes = _sizes(self.tables, q, k, v, out, tables)
        grid = self._grid(sizes)
        if not grid:
            return
        named: dict[str, Any] = {
            **sizes, "q": q, "k": k, "v": v, "out": out, "lse": lse, "k_blocks": None, "v_blocks": None,
            "q_offset": q_offset, "kv_lengths": kv_lengths, "scale": abs(scale) or _SMALLEST_SCALE,
            **{f"{op['name']}_table": table for op, table in zip(self.tables, tables, strict=True)},
            **constants_of(self.kernel, Variant(negative=scale < 0)),
        }  # fmt: skip
        values = {parameter.name: named[parameter.name] for parameter in self._parameters}
        if self._module is None:
            self._module = load_source(self.path)
        if triton_interpreted():
            self._module.attention[grid,](**values)
        else:
            warps, stages = option(self.kernel, "warps", 4), option(self.kernel, "stages", 2)
            with torch.cuda.device(q.device):
                self._module.attention[grid,](**values, num_warps=warps, num_stages=stages)


def _sizes(
    named: Sequence[Op], q: Tensor, k: Tensor, v: Tensor, out: Tensor, tables: Sequence[Tensor]
) -> dict[str, int]:
    """Every argument that depends on shapes and strides alone; the stride of an axis of one element is 0."""
    heads, key_heads = q.shape[1], k.shape[1]
    sizes = {
        "batch": q.shape[0], "q_len": q.shape[2], "k_len": k.shape[2], "n_key_heads": key_heads,
        "group": heads // max(key_heads, 1),
    }  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        for axis, size, stride in zip("bhnd", tensor.shape, tensor.stride(), strict=True):
            sizes[f"{name}_{axis}"] = stride if size > 1 else (1 if axis == "d" else 0)
    for op, table in zip(named, tables, strict=True):
        name = f"{op['name']}_table"
        for axis, size, stride in zip("bhr", table.shape, table.stride(), strict=False):
            sizes[f"{name}_{axis}"] = stride if size > 1 else 0
        sizes[f"{name}_rows"], sizes[f"{name}_cols"] = table.shape[2:]
    return sizes


def _is_aligned(sizes: dict[str, int], item: int) -> bool:
    """Whether last strides are 1 and all others multiples of 16 bytes."""
    strides = [sizes[f"{tensor}_{axis}"] for tensor in ("q", "k", "v", "out") for axis in "bhn"]
    return all(sizes[f"{x}_d"] == 1 for x in ("q", "k", "v")) and not any(stride * item % _VECTOR for stride in strides)


def _index_type(value: int | Tensor | None) -> str:
    return "i64" if isinstance(value, Tensor) and value.dtype == torch.int64 else "i32"


def _refuse_late_interpreter() -> None:
    """Triton's own functions are made for the interpreter or for compiling when Triton is imported, once for all."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(tl.max, JITFunction):
        raise ToolchainError(
            "TRITON_INTERPRET", given="set after Triton was imported", remedy="set it before the process starts"
        )
