"""A level-3 attention kernel's variants: the types and constants from which Triton compiles each of its binaries.

One source serves several binaries, its variants: they differ in what the caller's tensors allow, never in a length, a
stride, a batch or a number of heads.
"""

from __future__ import annotations

from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from spgen.backends import triton_binary
from spgen.backends.triton_binary import Binary, Specialised, compile_ahead, rendered
from spgen.errors import CompileError
from spgen.ir.kernel import option, parts
from spgen.ir.node import Op
from spgen.target import Target
from spgen.templates.triton import attention

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8e4nv"}
_REGISTERS = 64 * 1024  # of a multiprocessor
VECTOR = 16  # bytes that one load instruction moves
_TENSOR_MAPS_FROM = 90  # sm_90 and later can bring tiles through tensor descriptors
_LARGEST_BOX = 256  # rows that a descriptor brings at once


@dataclass(frozen=True)
class Variant:
    """What a binary assumes about its arguments.

    `aligned`: last strides are 1, everything else lies at multiples of 16 bytes. `tma`: K and V tiles come through
    tensor descriptors. `negative`: the scale is. `wide`: a step from row to row is beyond int32. The others: the
    integer types of those tensors.
    """

    aligned: bool = False
    tma: bool = False
    negative: bool = False
    q_offset: str = "i32"
    kv_lengths: str = "i32"
    cu_seqlens_q: str = "i32"
    cu_seqlens_k: str = "i32"
    wide: bool = False


def wants_tensor_maps(kernel: Op, target: Target) -> bool:
    """Whether K and V can come through tensor descriptors: rows of a tile adjacent, hardware from sm_90 on."""
    return (
        target.kind == "cuda"
        and int(target.arch.removeprefix("sm_")) >= _TENSOR_MAPS_FROM
        and option(kernel, "tma", 1) == 1
        and any(op["contiguous"] and op["key"] is None for op in parts(kernel, "segment"))
        and kernel["block_n"] <= _LARGEST_BOX
    )


def source_path(kernel: Op) -> Path:
    """The file of the rendered source, from the cache or rendered now."""
    return rendered("triton/attention.py.jinja", str(kernel), lambda: attention.symbols(kernel))


def binary(kernel: Op, source: Path, variant: Variant, target: Target) -> Binary:
    """The compiled variant, from the cache or compiled now. Raises CompileError if it does not fit the target."""
    fields = {"kernel": str(kernel), "variant": asdict(variant)}
    return triton_binary.binary(
        fields, target, lambda: (specialised(kernel, source, variant), compile_variant(kernel, source, variant, target))
    )


def compile_variant(kernel: Op, source: Path, variant: Variant, target: Target) -> Any:
    """Triton's compiled kernel, made ahead of time: no device is needed. Raises CompileError if it does not fit."""
    from triton.runtime.errors import PTXASError

    stages, registers = option(kernel, "stages", 2), _register_cap(kernel)
    shared = 0
    # ptxas crashes on a few programs, which other stages turn into programs that it takes; masks that read many tables
    # need shared memory of their own, which fewer stages leave them
    for choice in ((stages, registers), (stages + 1, 0), (1, 0)):
        if shared and choice[0] >= stages:
            continue
        with suppress(PTXASError), redirect_stdout(StringIO()):  # Triton prints the whole program
            built = compile_ahead(specialised(kernel, source, variant, *choice), target)
            shared = built.metadata.shared
            if shared <= target.smem_bytes:
                return built
    if shared:
        raise CompileError(
            f"tile {kernel['block_m']} x {kernel['block_n']}",
            given=f"{shared} bytes of shared memory",
            allowed=f"at most {target.smem_bytes} on {target.arch}",
            remedy="choose smaller tiles",
        )
    raise CompileError(
        f"{source}", given="a program that ptxas crashes on", remedy="choose another schedule, and report this pattern"
    )


def _register_cap(kernel: Op) -> int:
    """The schedule's cap on registers, by which several programs share a multiprocessor; 0 for none.

    Masks that read tables pair by pair take so many registers that the cap would more than double their time in spills.
    Rows that are gathered in one stage pass through registers, which costs a program.
    """
    cap = option(kernel, "registers", 0)
    if not cap or attention.reads_per_pair(kernel):
        return 0
    if option(kernel, "stages", 2) > 1 or not attention.gathers(kernel):
        return cap
    threads = 32 * option(kernel, "warps", 4)
    programs = max(_REGISTERS // (cap * threads) - 1, 1)
    return _REGISTERS // (programs * threads) // 8 * 8


def constants_of(kernel: Op, variant: Variant, stages: int) -> dict[str, Any]:
    """The compile-time arguments of the rendered kernel."""
    return {
        "TMA": variant.tma,
        "NEGATIVE": variant.negative,
        "STAGES": stages,
        "MASKED_STAGES": option(kernel, "masked_stages", stages),
    }


def specialised(kernel: Op, source: Path, variant: Variant, stages: int = 2, registers: int = 0) -> Specialised:
    """The rendered function as a variant needs it; `registers` of 0 leaves their number to the compiler."""
    choices = constants_of(kernel, variant, stages)
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisors: dict[str, int] = {}
    for parameter in attention.parameters(kernel):
        types[parameter.name] = _type(kernel, parameter, variant)
        if types[parameter.name] == "constexpr":
            constants[parameter.name] = choices.get(parameter.name, 1 if parameter.type == "unit" else None)
        elif parameter.type == "workspace" or (variant.aligned and parameter.type == "data"):
            divisors[parameter.name] = VECTOR
        elif variant.aligned and parameter.type in ("stride", "step"):
            divisors[parameter.name] = VECTOR // ELEMENT_BYTES[kernel["dtype"]]
    return Specialised(
        source, attention.ENTRY, types, constants, divisors, option(kernel, "warps", 4), stages, registers
    )


def _type(kernel: Op, parameter: attention.Parameter, variant: Variant) -> str:
    dtype = TRITON_TYPES[kernel["dtype"]]
    if parameter.type == "data":
        return f"*{dtype}"
    if parameter.type == "workspace":
        return "*fp32"
    if parameter.type == "desc":
        keys = parameter.name == "k_blocks"
        lanes = attention.padded(kernel["head_dim"])
        lanes = lanes if keys else attention.value_lanes(kernel["value_dim"], kernel["dtype"])
        box = f"tensordesc<{dtype}[1, 1, {kernel['block_n']}, {lanes}]>"
        return box if variant.tma else "constexpr"
    if parameter.type == "*index":
        return f"*{getattr(variant, parameter.name)}"
    if parameter.type == "step":
        return "i64" if variant.wide else "i32"
    if parameter.type == "unit":
        return "constexpr" if variant.aligned else "i64"
    return "i64" if parameter.type == "stride" else parameter.type


def arguments(kernel: Op, variant: Variant) -> list[attention.Parameter]:
    """The parameters that are arguments of the binary."""
    return [p for p in attention.parameters(kernel) if _type(kernel, p, variant) != "constexpr"]
