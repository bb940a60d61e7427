"""Kernels made ahead of their first call: `spgen compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spgen.compile import compiled
from spgen.errors import ToolchainError
from spgen.passes.schedule import Call
from spgen.target import Target
from spgen.tuned import Sizes, request_for

_TENSOR_MAPS_FROM = 90  # sm_90 and later can bring tiles through tensor descriptors


def compile_text(
    pattern_text: str, *, q_shape: tuple[int, int, int, int], kv_heads: int, kv_len: int, v_dim: int, dtype: str,
    target: str,
) -> Path:  # fmt: skip
    """Compile the kernel of a call into the cache; returns the file of its source, or the object file for another CPU.

    `target` need not be of this machine: `sm_90` compiles for a GPU that is elsewhere, `aarch64` for a CPU. Lengths do
    not matter, but that a call with few rows lets the heads of a group share a row tile. Errors are those of the call.
    """
    chosen = Target.of(target)
    batch, q_heads, q_len, head_dim = q_shape
    call, sizes = Call(dtype, head_dim, v_dim), Sizes(batch, q_len, kv_len)
    kernel = compiled(request_for(pattern_text, call, q_heads, kv_heads, chosen, sizes)).kernel
    if chosen.kind == "cuda":
        _compile_binaries(kernel, chosen)
    if kernel.path is None:
        raise ToolchainError(
            "linker", given="none", allowed="ld and a C compiler, to keep kernels on disk",
            remedy="install gcc or clang",
        )  # fmt: skip
    return Path(kernel.path).with_name("kernel.o") if chosen.triple else Path(kernel.path)


def _compile_binaries(kernel: Any, target: Target) -> None:
    """The variants that contiguous tensors need."""
    from spgen.backends.triton_compile import Variant, binary

    binary(kernel.kernel, kernel.path, Variant(aligned=True), target)
    if int(target.arch.removeprefix("sm_")) >= _TENSOR_MAPS_FROM:
        binary(kernel.kernel, kernel.path, Variant(aligned=True, tma=True), target)
