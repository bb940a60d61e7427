"""Kernels made ahead of their first call: `spgen compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spgen.autotune.work import Resources
from spgen.compile import Request, compiled
from spgen.errors import ToolchainError
from spgen.passes.schedule import Call
from spgen.target import Target
from spgen.tuned import Sizes, request_for
from spgen.weights.compile import Job, kernel_of_job


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
    kernel = compile_request(request_for(pattern_text, call, q_heads, kv_heads, chosen, sizes), all_variants=True)
    if kernel.path is None:
        raise ToolchainError(
            "linker", given="none", allowed="ld and a C compiler, to keep kernels on disk",
            remedy="install gcc or clang",
        )  # fmt: skip
    return Path(kernel.path).with_name("kernel.o") if chosen.triple else Path(kernel.path)


def compile_request(request: Request, *, all_variants: bool = False) -> Any:
    """The kernel of a request, with the binaries that contiguous tensors need in the cache; no device is needed."""
    kernel = compiled(request).kernel
    if request.target.kind != "cpu":
        for variant in kernel.usual_variants()[: None if all_variants else 1]:
            kernel.binary(variant)
        kernel.compile_rest()
    return kernel


def resources_of(request: Request | Job) -> Resources:
    """What the kernel of a request takes of its target, compiled now if it is not in the cache; nothing on a CPU."""
    if isinstance(request, Job):
        return Resources(**kernel_of_job(request).precompile())
    kernel = compiled(request).kernel
    if request.target.kind == "cpu":
        return Resources()
    return Resources(**kernel.binary(kernel.usual_variants()[0]).resources)
