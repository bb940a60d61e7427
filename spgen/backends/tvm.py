"""The CPU backend: a level-3 kernel as code for TVM's builder, compiled by LLVM to a small shared library.

A library in the disk cache is loaded by tvm_ffi alone; neither tvm nor Jinja is imported then. Where there is no
linker, TVM's in-process JIT takes its place: such a kernel is compiled again in each process and runs on TVM's
threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spgen.backends.extras import NO_EXTRAS, Extras
from spgen.backends.tvm_library import compile_elsewhere, load, render_source
from spgen.errors import DeviceError
from spgen.ir.config import Config
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.tvm.schedule import check, default_tiles, scratch_size

_built: dict[tuple[Op, Target], AttentionKernel] = {}
_lock = threading.Lock()


def default_config(
    head_dim: int, value_dim: int, dtype: str, target: Target, *, rows: int | None = None, cols: int | None = None,
    height: int | None = None,
) -> Config:  # fmt: skip
    """A configuration that fits the target's vector registers, whatever `rows` and `cols` share, and for any height."""
    return default_tiles(target)


def specialised_config(
    head_dim: int, value_dim: int, dtype: str, target: Target, *, rows: int | None = None, height: int | None = None
) -> None:
    """None: there is one form of CPU kernels."""
    return


def refusal(kernel: Op, target: Target) -> None:
    """Why a kernel does not get the form that its schedule asks for: there is one."""
    return


def served(kernel: Op, target: Target) -> Op:
    """The kernel with the schedule that it gets."""
    return kernel


def build(kernel: Op, target: Target) -> AttentionKernel:
    """The launchable form of a level-3 attention kernel, from the cache or compiled.

    Raises UnsupportedError for what no CPU kernel does, ToolchainError where a tool is missing.
    """
    with _lock:
        if (kernel, target) not in _built:
            _built[kernel, target] = AttentionKernel(kernel, target)
        return _built[kernel, target]


def planner(program: Op, target: Target) -> None:
    """None: the tables of a program are made by tensor operations, as spgen/tables.py defines them."""


class AttentionKernel:
    """A compiled attention kernel. Calls block until the result is there; any thread may call."""

    def __init__(self, kernel: Op, target: Target) -> None:
        check(kernel, target)
        self.kernel, self.target = kernel, target
        self._scratch_size = scratch_size(kernel, target)
        self._local = threading.local()
        self._pass_lse: bool = kernel["lse"]
        self._pass_offset: bool = kernel["q_offset"] != "default"
        self._strided: Callable[..., None] | None = None
        self._function: Callable[..., None]
        self.path: Path | None
        if target.triple:
            self._function, self.path = self._elsewhere, compile_elsewhere(kernel, target)
        else:
            self._function, self.path = load(kernel, target, strided=False)

    @property
    def source(self) -> str:
        """The rendered builder code."""
        if self.path is None:
            return render_source(self.kernel, self.target, strided=False)
        return self.path.read_text(encoding="utf-8")

    def bind(self) -> AttentionKernel:
        """What serves calls whose operands agree in shapes, strides and dtypes: the kernel serves any."""
        return self

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """Write `out` and `lse`; shapes, dtypes and devices of the Operands are the caller's promise (spgen/ops.py)."""
        if not out.numel():
            return
        function = self._function
        if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
            function = self._strided_function()
        arguments: list[Any] = [q, k, v, out]
        if self._pass_lse:
            arguments.append(lse)
        arguments += tables
        cu_q, cu_k, softcap, sinks, bias, _ = extras
        if cu_q is not None:
            arguments += (_int32(cu_q), _int32(cu_k))
        if self._pass_offset:
            arguments.append(_int32(q_offset))
        arguments += [x for x in (_int32(kv_lengths), sinks, bias) if x is not None]
        arguments.append(scale)
        if softcap is not None:
            arguments.append(softcap)
        function(*arguments, self._scratch())

    def _elsewhere(self, *arguments: Any) -> None:
        raise DeviceError("kernel", given=f"one for {self.target.triple}", allowed="one for this machine: target cpu")

    def _scratch(self) -> Tensor:
        """A row of memory for each thread; a set for each thread that calls."""
        workers = torch.get_num_threads()
        kept: Tensor | None = getattr(self._local, "scratch", None)
        if kept is None or kept.shape[0] != workers:
            kept = self._local.scratch = torch.empty(workers, self._scratch_size)
        return kept

    def _strided_function(self) -> Callable[..., None]:
        with _lock:
            if self._strided is None:
                self._strided, _ = load(self.kernel, self.target, strided=True)
            return self._strided


def _int32(value: int | Tensor | None) -> int | Tensor | None:
    return value.int().contiguous() if isinstance(value, Tensor) else value
