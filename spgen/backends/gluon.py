"""Attention on Hopper through Gluon: warps that bring tiles, warpgroups that multiply, tiles handed out on the way.

What it cannot express is left to plain Triton, over the same tiles, so that plans serve both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from spgen.backends import triton_binary
from spgen.backends.extras import Operands
from spgen.backends.triton import AttentionKernel
from spgen.backends.triton_arguments import bias_steps, index_type, is_aligned, lengths_of, strides_of, table_sizes
from spgen.backends.triton_binary import Binary, Specialised, compile_ahead, rendered
from spgen.backends.triton_compile import ELEMENT_BYTES, TRITON_TYPES, VECTOR, Variant
from spgen.backends.triton_counters import counters
from spgen.backends.triton_launch import Call, TensorMap, driver
from spgen.errors import CompileError, SpgenError, float8_error
from spgen.ir.kernel import KERNEL, option
from spgen.ir.node import Op
from spgen.settings import logger
from spgen.target import Target
from spgen.templates.gluon import attention, resources
from spgen.templates.gluon.boxes import gathers
from spgen.templates.triton.attention import Parameter
from spgen.templates.triton.quantize import padded_keys

_OWN_OPTIONS = (resources.WARPGROUPS, "warps", "stages", "registers")
_TENSORS = ("q", "k", "v", "out")
_FIXED = ("i32", "i64", "stride", "step")


def portable(kernel: Op) -> Op:
    """The same kernel over the same tiles for plain Triton."""
    kept = [text for text in kernel["options"] if text.partition("=")[0] not in _OWN_OPTIONS]
    options = (*kept, f"warps={kernel['block_m'] // 16}", "stages=2", "prefetch=1")
    return KERNEL.make("attention", *kernel.operands, **{**dict(kernel.attrs), "options": options})


class HopperKernel(AttentionKernel):
    """A compiled attention kernel of one program for each multiprocessor."""

    def __init__(self, kernel: Op, target: Target) -> None:
        super().__init__(kernel, target)
        self._parameters = attention.parameters(kernel)
        self._fixed = [p.name for p in self._parameters if p.type in _FIXED and p.name != "q_offset"]
        self._staged = resources.is_staged(kernel)
        self._plain: AttentionKernel | None = None
        self._compiles = True

    @property
    def path(self) -> Path:
        """The file of the rendered source; rendered again if someone emptied the cache."""
        return source_path(self.kernel)

    def _instead(self) -> AttentionKernel:
        """What serves the calls that this form does not."""
        with self._lock:
            if self._plain is None:
                self._plain = AttentionKernel(portable(self.kernel), self.target)
            return self._plain

    def prepare(self, operands: Operands, aligned: bool) -> Call:
        """As AttentionKernel does; a launch of plain Triton's where it has to serve."""
        call = self._prepared(operands) if aligned else None
        if call is None and resources.is_fp8(self.kernel):
            fault = "tensors that tensor maps cannot express" if self._compiles else "Gluon does not compile it here"
            raise float8_error(self.target.arch, fault)
        return call or self._instead().prepare(operands, aligned)

    def _prepared(self, operands: Operands) -> Call | None:
        q, k, v, out, _, tables, q_offset, kv_lengths, scale, extras = operands
        with self._lock:
            if resources.is_fp8(self.kernel):
                v = _turned(v)
            strides = strides_of(q, k, v, out)
            variant = Variant(
                True, True, scale < 0, index_type(q_offset), index_type(kv_lengths), index_type(extras.cu_seqlens_q),
                index_type(extras.cu_seqlens_k),
            )  # fmt: skip
            maps: list[TensorMap] = []
            aligned = strides[-1] == 1 and is_aligned(strides[:-1], ELEMENT_BYTES[self.dtype])
            # offsets of rows that are brought one by one are of 32 bits
            small = not gathers(self.kernel) or k.shape[2] * max(strides[6], strides[10]) < 2**31
            if aligned and small and k.numel() and driver().has_tensor_maps:
                maps = self._maps_or_none(variant, (q, k, v, out))
            if not maps or not all(tensor_map.is_valid for tensor_map in maps):
                return None
            tiles = self._grid(q, extras)
            lengths = lengths_of(q, k, extras)
            rows = [*strides[4:7], *strides[8:11]] if gathers(self.kernel) else []
            packed = lengths[4:] if self.kernel["cu_seqlens"] else [] if self._staged else strides[-4:-3]
            steps = strides[-3:-1] if self.kernel["cu_seqlens"] or not self._staged else []
            sizes = [*lengths[:4], *rows, *packed, *steps, tiles]
            grid = min(tiles, self.target.cores * resources.programs(self.kernel))
            function = self._function(variant, q.get_device())
            return Call(
                function, grid, [*table_sizes(tables), *bias_steps(extras), *sizes], maps, counters(function.device).of
            )

    def _maps_or_none(self, variant: Variant, tensors: Sequence[Tensor]) -> list[TensorMap]:
        """None where Triton's version does not compile the kernel, which is said, and tried, once."""
        try:
            if not self._compiles:
                return []
            sources = (_TENSORS.index(tensor) for _, tensor, _ in attention.descriptors(self.kernel))
            return self._tensor_maps(variant, [(source, tensors[source]) for source in sources])
        except SpgenError:
            raise
        except Exception as fault:  # whatever an experimental language raises
            self._compiles = False
            _say_once(f"{type(fault).__name__}: {fault}".splitlines()[0])
            return []

    def usual_variants(self) -> list[Variant]:
        """What contiguous tensors need."""
        return [Variant(aligned=True, tma=True)]

    def binary(self, variant: Variant) -> Binary:
        """The compiled variant, from the cache or compiled now; no device is needed."""
        if variant not in self._binaries:
            self._binaries[variant] = binary(self.kernel, self.path, variant, self.target)
        return self._binaries[variant]

    def _arguments(self, variant: Variant) -> list[Parameter]:
        return [parameter for parameter in self._parameters if parameter.type != "constexpr"]


def _turned(v: Tensor) -> Tensor:
    """Values of float8 with keys innermost, whole groups of those whose order is their own."""
    batch, heads, keys, channels = v.shape
    step_b, step_h, _, step_d = v.stride()
    return v.as_strided((batch, heads, channels, padded_keys(keys)), (step_b, step_h, step_d, 1))


@lru_cache(maxsize=1)
def _say_once(fault: str) -> None:
    logger().warning(
        "Triton's Gluon does not compile kernels for Hopper here (%s): plain Triton serves, which is slower", fault
    )


def source_path(kernel: Op) -> Path:
    """The file of the rendered source, from the cache or rendered now."""
    return rendered("gluon/attention.py.jinja", str(kernel), lambda: attention.symbols(kernel))


def binary(kernel: Op, source: Path, variant: Variant, target: Target) -> Binary:
    """The compiled variant, from the cache or compiled now. Raises CompileError if it does not fit the target."""
    fields = {"kernel": str(kernel), "form": "gluon", "variant": asdict(variant)}
    one = specialised(kernel, source, variant)
    return triton_binary.binary(fields, target, lambda: (one, _compiled(one, kernel, target)))


def _compiled(one: Specialised, kernel: Op, target: Target) -> Any:
    built = compile_ahead(one, target)
    if built.metadata.shared > target.smem_bytes:
        raise CompileError(
            f"tile {kernel['block_m']} x {kernel['block_n']}, {option(kernel, 'stages', 2)} stages",
            given=f"{built.metadata.shared} bytes of shared memory",
            allowed=f"at most {target.smem_bytes} on {target.arch}", remedy="choose fewer stages",
        )  # fmt: skip
    return built


def specialised(kernel: Op, source: Path, variant: Variant) -> Specialised:
    """The rendered function as a variant needs it."""
    types = {parameter.name: _type(kernel, parameter, variant) for parameter in attention.parameters(kernel)}
    divisors = dict.fromkeys(("q", "k", "v", "out"), VECTOR)
    divisors |= {p.name: VECTOR // 2 for p in attention.parameters(kernel) if p.type in ("stride", "step")}
    shared = resources.programs(kernel) > 1
    cap = resources.REGISTERS // resources.programs(kernel) // resources.threads(kernel) if shared else 0
    return Specialised(source, attention.ENTRY, types, {"NEGATIVE": variant.negative}, divisors, 4, 1, cap)


def _type(kernel: Op, parameter: Parameter, variant: Variant) -> str:
    element = attention.element_of(kernel, parameter.name)
    dtype = TRITON_TYPES[element]
    if parameter.type == "data":
        return f"*{dtype}"
    if parameter.type == "*index":
        return f"*{getattr(variant, parameter.name)}"
    if parameter.type in ("stride", "step"):
        return "i64" if parameter.type == "stride" else "i32"
    if parameter.type == "desc":
        rows, lanes = attention.box_of(kernel, parameter.name)
        size = ELEMENT_BYTES[element]
        swizzle = min(128, size * lanes)
        layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={8 * size}, rank=4)"
        return f"tensordesc<{dtype}[1, 1, {rows}, {lanes}],{layout}>"
    return parameter.type
