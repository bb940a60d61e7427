"""From a level-3 kernel to rendered source, and from there to a loadable binary, both kept in the disk cache.

One source serves several binaries, its variants: they differ in what the caller's tensors allow, never in a length, a
stride, a batch or a number of heads.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from spgen import cache
from spgen.backends.triton_launch import Box
from spgen.errors import CompileError, ToolchainError
from spgen.ir.expr import tables
from spgen.ir.kernel import option, parts
from spgen.ir.node import Op
from spgen.settings import settings
from spgen.target import Target
from spgen.templates.triton import attention

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_SOURCE, _BINARY, _NOTES = "attention.py", "kernel.bin", "kernel.json"
_VECTOR = 16  # bytes that one load instruction moves


@dataclass(frozen=True)
class Variant:
    """What a binary assumes about its arguments.

    `aligned`: last strides are 1, everything else lies at multiples of 16 bytes. `tma`: K and V tiles come through
    tensor descriptors. `negative`: the scale is. `q_offset`, `kv_lengths`: the integer types of those tensors.
    """

    aligned: bool = False
    tma: bool = False
    negative: bool = False
    q_offset: str = "i32"
    kv_lengths: str = "i32"


@dataclass(frozen=True)
class Binary:
    """A compiled variant: its code, how to launch it, and the tiles its tensor descriptors bring."""

    code: bytes
    entry: str
    threads: int
    shared: int
    scratch: int  # pointers that the binary takes after the kernel's own arguments
    boxes: tuple[Box, ...]


def source_path(kernel: Op) -> Path:
    """The file of the rendered source, from the cache or rendered now."""

    def write(directory: Path) -> None:
        from spgen.templates.render import render

        text = render("triton/attention.py.jinja", **attention.symbols(kernel))
        (directory / _SOURCE).write_text(text, encoding="utf-8")

    key = cache.key(kind="triton source", kernel=str(kernel), generator=_generator())
    return cache.Cache().get_or_build(key, write, meta={"kind": "triton source"}) / _SOURCE


def load_source(path: Path) -> ModuleType:
    """The module of a rendered file; tracebacks and Triton's own messages show its lines."""
    module = ModuleType("spgen_rendered_attention")
    module.__file__ = str(path)
    # not imported: that would leave a __pycache__ in the cache entry
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module.__dict__)
    return module


def binary(kernel: Op, source: Path, variant: Variant, target: Target) -> Binary:
    """The compiled variant, from the cache or compiled now. Raises CompileError if it does not fit the target."""
    fields: dict[str, Any] = {"kernel": str(kernel), "variant": asdict(variant), "target": target.key}
    key = cache.key(kind="triton", generator=_generator(), triton=_triton_version(), **fields)
    directory = cache.Cache()
    if settings().no_compile and directory.get(key) is None:
        raise CompileError(
            "kernel",
            given="one that is not in the cache",
            allowed="cached kernels only, since SPGEN_NO_COMPILE is set",
            remedy="unset SPGEN_NO_COMPILE, or fill the cache with `spgen compile`",
        )

    def write(entry: Path) -> None:
        built = compile_variant(kernel, source, variant, target)
        notes, code = _notes(kernel, built, variant), built.asm["cubin" if target.kind == "cuda" else "hsaco"]
        (entry / _BINARY).write_bytes(code)
        (entry / _NOTES).write_text(json.dumps(notes), encoding="utf-8")

    entry = directory.get_or_build(key, write, meta={"kind": "triton", **fields})
    notes = json.loads((entry / _NOTES).read_text(encoding="utf-8"))
    notes["boxes"] = tuple(Box(box["block"], box["swizzle"]) for box in notes["boxes"])
    return Binary(code=(entry / _BINARY).read_bytes(), **notes)


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
            built = _compile(kernel, source, variant, target, *choice)
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
    """The schedule's cap on registers, by which two programs share a multiprocessor; 0 for none.

    Masks that read tables take so many registers that the cap would more than double their time in spills.
    """
    masks = [op["mask"] for op in parts(kernel, "segment") if op["mask"] is not None]
    return 0 if any(tables(mask) for mask in masks) else option(kernel, "registers", 0)


def _compile(kernel: Op, source: Path, variant: Variant, target: Target, stages: int, registers: int) -> Any:
    """One attempt; `registers` of 0 leaves their number to the compiler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, divisors = _signature(kernel, variant, stages)
    options = {"num_warps": option(kernel, "warps", 4), "num_stages": stages}
    if target.kind == "cuda":
        device = GPUTarget("cuda", int(target.arch.removeprefix("sm_")), 32)
        options |= {"maxnreg": registers} if registers else {}
    else:
        device = GPUTarget("hip", target.arch, target.simd)
    compiled = ASTSource(load_source(source).attention, signature, constants, divisors)
    return triton.compile(compiled, target=device, options=options)


def constants_of(kernel: Op, variant: Variant, stages: int) -> dict[str, Any]:
    """The compile-time arguments of the rendered kernel."""
    return {
        "TMA": variant.tma,
        "NEGATIVE": variant.negative,
        "STAGES": stages,
        "MASKED_STAGES": option(kernel, "masked_stages", stages),
    }


def _signature(
    kernel: Op, variant: Variant, stages: int
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and known divisors of the kernel's arguments, as triton.compile takes them."""
    choices = constants_of(kernel, variant, stages)
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    divisors: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(attention.parameters(kernel)):
        types[parameter.name] = _type(kernel, parameter, variant)
        if types[parameter.name] == "constexpr":
            constants[index,] = choices.get(parameter.name, 1 if parameter.type == "unit" else None)
        elif variant.aligned and parameter.type == "data":
            divisors[index,] = [["tt.divisibility", _VECTOR]]
        elif variant.aligned and parameter.type == "stride":
            divisors[index,] = [["tt.divisibility", _VECTOR // ELEMENT_BYTES[kernel["dtype"]]]]
    return types, constants, divisors


def _type(kernel: Op, parameter: attention.Parameter, variant: Variant) -> str:
    dtype = _TRITON_TYPES[kernel["dtype"]]
    if parameter.type == "data":
        return f"*{dtype}"
    if parameter.type == "desc":
        keys = parameter.name == "k_blocks"
        lanes = attention.padded(kernel["head_dim"])
        lanes = lanes if keys else attention.value_lanes(kernel["value_dim"], kernel["dtype"])
        box = f"tensordesc<{dtype}[1, 1, {kernel['block_n']}, {lanes}]>"
        return box if variant.tma else "constexpr"
    if parameter.type == "*index":
        return f"*{variant.q_offset if parameter.name == 'q_offset' else variant.kv_lengths}"
    if parameter.type == "unit":
        return "constexpr" if variant.aligned else "i64"
    return "i64" if parameter.type == "stride" else parameter.type


def _notes(kernel: Op, built: Any, variant: Variant) -> dict[str, Any]:
    """What the launcher must know; the number of arguments is checked against the binary's own."""
    meta = built.metadata
    boxes = [
        {"swizzle": box["swizzle"], "block": list(box["block_size"])}
        for box in (getattr(meta, "tensordesc_meta", None) or ())
    ]
    scratch = 0
    if "ptx" in built.asm:
        expected = sum(9 if p.type == "desc" else 1 for p in arguments(kernel, variant))
        head = re.search(r"\.entry\s+\w+\s*\((.*?)\)", built.asm["ptx"], re.DOTALL)
        scratch = len(re.findall(r"\.param\b", head.group(1) if head else "")) - expected
        if not 0 <= scratch <= 2 or any(getattr(meta, f"{kind}_scratch_size", None) for kind in ("global", "profile")):
            raise ToolchainError(
                "triton", given=f"version {_triton_version()}, whose kernels take other arguments",
                remedy="install a version that spgen supports (see its dependencies)",
            )  # fmt: skip
    threads = meta.num_warps * meta.target.warp_size
    return {"entry": meta.name, "threads": threads, "shared": meta.shared, "scratch": scratch, "boxes": boxes}


def arguments(kernel: Op, variant: Variant) -> list[attention.Parameter]:
    """The parameters that are arguments of the binary."""
    return [p for p in attention.parameters(kernel) if _type(kernel, p, variant) != "constexpr"]


@lru_cache(maxsize=1)
def _generator() -> str:
    """A digest of everything that turns a kernel into source and binary, beside Triton itself."""
    folder = Path(attention.__file__).parent
    files = [*sorted(path for path in folder.iterdir() if path.is_file()), Path(__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


@lru_cache(maxsize=1)
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        pass  # the wheels of torch's own index have other names
    try:
        import triton
    except ImportError as fault:
        raise ToolchainError("triton", given="not installed", remedy="pip install triton") from fault
    return str(triton.__version__)
