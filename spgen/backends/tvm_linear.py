"""Products with sparse weights on the CPU: kernels for TVM, compiled and launched as those of attention."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.backends.tvm_library import compile_elsewhere, load, render_source
from spgen.errors import DeviceError
from spgen.ir.config import Config
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.tvm.weights.schedule import (
    check,
    check_sampled,
    linear_tiles,
    sampled_scratch,
    sampled_tiles,
    tiles_of,
)
from spgen.weights.compile import Request, Sizes
from spgen.weights.storage import Stored

_STREAMED = 4 << 20  # bytes of y from which it is stored past the caches (docs/notes/sparse-weights.md)
_ALIGNED = 64
_MANY_SHAPES = 256
_local = threading.local()


def default_config(request: Request, sizes: Sizes) -> Config:
    """Dot products for few rows of x, else tiles of rows that fill their vectors."""
    layout = request.layout
    height = layout.cols if request.transposed else layout.rows
    return linear_tiles(sizes.m, layout.kind, height, request.transposed, request.target)


def build(kernel: Op, target: Target) -> LinearKernel:
    """The launchable form of a level-3 `linear` kernel, from the cache or compiled.

    Raises UnsupportedError for what no CPU kernel does, ToolchainError where a tool is missing.
    """
    check(kernel, target)
    return LinearKernel(kernel, target)


def sampled_config(request: Request, sizes: Sizes) -> Config:
    """Rows of g and x that fit the nearer caches."""
    return sampled_tiles()


def build_sampled(kernel: Op, target: Target) -> SampledKernel:
    """The launchable form of a level-3 `sampled` kernel, likewise."""
    check_sampled(kernel, target)
    return SampledKernel(kernel, target)


class _Compiled:
    """A compiled kernel. Calls block until the result is there; any thread may call."""

    def __init__(self, kernel: Op, target: Target) -> None:
        self.kernel, self.target = kernel, target
        self._function: Callable[..., None]
        self.path: Path | None
        if target.triple:
            self._function, self.path = self._elsewhere, compile_elsewhere(kernel, target)
        else:
            self._function, self.path = load(kernel, target)

    @property
    def source(self) -> str:
        """The rendered builder code."""
        if self.path is None:
            return render_source(self.kernel, self.target)
        return self.path.read_text(encoding="utf-8")

    def precompile(self) -> dict[str, int]:
        """Nothing is left to compile, and nothing is known of registers."""
        return {}

    def _elsewhere(self, *arguments: Any) -> None:
        raise DeviceError("kernel", given=f"one for {self.target.triple}", allowed="one for this machine: target cpu")


class LinearKernel(_Compiled):
    """y = activation(x W^T + bias) and its kin."""

    def __init__(self, kernel: Op, target: Target) -> None:
        super().__init__(kernel, target)
        self._tiles = tiles_of(kernel, target)
        self._scratch = self._tiles.scratch
        self._index = {"blocks": slice(3, 7) if kernel["transposed"] else slice(0, 3)}.get(
            kernel["storage"], slice(None)
        )

    def __call__(self, x: Tensor, weights: Sequence[Stored], bias: Tensor | None, y: Tensor) -> None:
        """Write `y`; shapes, dtypes and devices are the caller's promise."""
        if not y.numel():
            return
        tiles = self._tiles
        m, inputs = x.shape
        width = tiles.padded(inputs)
        arguments: list[Any] = [x]
        if not tiles.dots:
            row_tiles = -(-m // tiles.block_m)
            staged = _memory("staged", row_tiles, width, tiles.block_m)
        elif in_place := width == inputs and x.dtype == torch.float32:
            staged = x
        else:
            staged = _memory("staged", m, width)
        arguments += [staged, y]
        if bias is not None:
            arguments.append(bias.to(x.dtype))
        for weight in weights:
            values = weight.values
            arguments.append(values if values.is_floating_point() and values.itemsize > 1 else values.view(torch.uint8))
            if weight.scales is not None:
                arguments.append(weight.scales)
            arguments += weight.index[self._index]
        if tiles.dots:
            arguments.append(int(not in_place))
        elif tiles.streams:
            whole = y.data_ptr() % _ALIGNED == 0 and y.shape[1] % tiles.lanes == 0
            arguments.append(int(whole and y.nbytes >= _STREAMED))
        self._function(*arguments, _memory("scratch", torch.get_num_threads(), self._scratch))


class SampledKernel(_Compiled):
    """The gradient of stored blocks."""

    def __init__(self, kernel: Op, target: Target) -> None:
        super().__init__(kernel, target)
        self._scratch = sampled_scratch(kernel, target)

    def __call__(self, g: Tensor, x: Tensor, stored: Stored, out: Tensor) -> None:
        """Write `out`, shaped as the stored values; shapes, dtypes and devices are the caller's promise."""
        if not out.numel():
            return
        scratch = _memory("scratch", torch.get_num_threads(), self._scratch)
        self._function(g, x, *stored.index[:3], out, scratch)


def _memory(name: str, *shape: int) -> Tensor:
    """fp32 values that this thread's calls share, as a tensor of this shape."""
    kept: dict[tuple[int, ...], Tensor] = _local.__dict__.setdefault(name, {})
    found = kept.get(shape)
    if found is None:
        size, whole = math.prod(shape), kept.get(())
        if whole is None or len(whole) < size or len(kept) > _MANY_SHAPES:
            kept.clear()
            whole = kept[()] = torch.empty(max(size, 0 if whole is None else len(whole)))
        found = kept[shape] = whole[:size].view(shape)
    return found
