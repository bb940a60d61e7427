"""From a rendered Triton module to a loadable binary, both kept in the disk cache: what all GPU kernels share.

Binaries are made ahead of time, so no device is needed, and neither Triton nor Jinja is imported when one is cached.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from spgen import cache
from spgen.backends.triton_launch import Box, Function, driver
from spgen.errors import CompileError, ToolchainError
from spgen.settings import settings
from spgen.target import Target
from spgen.templates.triton import expressions

_BINARY, _NOTES = "kernel.bin", "kernel.json"


@dataclass(frozen=True)
class Specialised:
    """One function of a rendered module, with everything that its binary fixes.

    `types` maps its parameters, in order, to Triton's types; "constexpr" are those in `constants`. `divisors` says of
    which power of two some arguments are multiples (pointers in bytes). No cap on `registers`: 0.
    """

    source: Path
    entry: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisors: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    registers: int = 0

    @property
    def arguments(self) -> list[str]:
        """The parameters that are arguments of the binary, in order."""
        return [name for name, kind in self.types.items() if kind != "constexpr"]


@dataclass(frozen=True)
class Binary:
    """A compiled function: its code, how to launch it, and the tiles its tensor descriptors bring."""

    code: bytes
    entry: str
    threads: int
    shared: int
    scratch: int  # pointers that the binary takes after the kernel's own arguments
    boxes: tuple[Box, ...]
    resources: Mapping[str, int]  # fields of spgen.autotune.model.Resources

    def load(self, device: int, kinds: list[str]) -> Function:
        """The binary on a device; `kinds` says where each of its arguments comes from (see Function)."""
        handle = driver().load(self.code, self.entry, self.shared, device)
        return Function(handle, device, self.threads, self.shared, kinds, self.scratch)


def rendered(template: str, text: str, symbols: Callable[[], Mapping[str, Any]]) -> Path:
    """The file of a template's source for the program `text`, from the cache or rendered now over `symbols()`."""
    file = Path(template).name.removesuffix(".jinja")

    def write(directory: Path) -> None:
        from spgen.templates.render import render

        (directory / file).write_text(render(template, **symbols()), encoding="utf-8")

    key = cache.key(kind="triton source", template=template, kernel=text, generator=generator())
    return cache.Cache().get_or_build(key, write, meta={"kind": "triton source"}) / file


def load_source(path: Path) -> ModuleType:
    """The module of a rendered file; tracebacks and Triton's own messages show its lines."""
    module = ModuleType(f"spgen_rendered_{path.stem}")
    module.__file__ = str(path)
    # not imported: that would leave a __pycache__ in the cache entry
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module.__dict__)
    return module


def binary(fields: Mapping[str, Any], target: Target, build: Callable[[], tuple[Specialised, Any]]) -> Binary:
    """The binary that `fields` identify, from the cache or made now: `build` gives the function and its compiled form.

    Raises CompileError where compiling is forbidden and the cache does not have it.
    """
    known = {**fields, "target": target.key}
    key = cache.key(kind="triton", generator=generator(), triton=_triton_version(), **known)
    directory = cache.Cache()
    if settings().no_compile and directory.get(key) is None:
        raise CompileError(
            "kernel",
            given="one that is not in the cache",
            allowed="cached kernels only, since SPGEN_NO_COMPILE is set",
            remedy="unset SPGEN_NO_COMPILE, or fill the cache with `spgen compile`",
        )

    def write(entry: Path) -> None:
        function, built = build()
        code = built.asm["cubin" if target.kind == "cuda" else "hsaco"]
        (entry / _BINARY).write_bytes(code)
        (entry / _NOTES).write_text(json.dumps(_notes(function, built, target)), encoding="utf-8")

    entry = directory.get_or_build(key, write, meta={"kind": "triton", **known})
    notes = json.loads((entry / _NOTES).read_text(encoding="utf-8"))
    notes["boxes"] = tuple(Box(box["block"], box["swizzle"]) for box in notes["boxes"])
    return Binary(code=(entry / _BINARY).read_bytes(), **notes)


def compile_ahead(function: Specialised, target: Target) -> Any:
    """Triton's compiled kernel; no device is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: (at,) for at, name in enumerate(function.types)}
    constants = {places[name]: value for name, value in function.constants.items()}
    divisors = {places[name]: [["tt.divisibility", value]] for name, value in function.divisors.items()}
    options = {"num_warps": function.warps, "num_stages": function.stages}
    if target.kind == "cuda":
        device = GPUTarget("cuda", int(target.arch.removeprefix("sm_")), 32)
        options |= {"maxnreg": function.registers} if function.registers else {}
    else:
        device = GPUTarget("hip", target.arch, target.simd)
    entry = getattr(load_source(function.source), function.entry)
    if entry.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    return triton.compile(ASTSource(entry, dict(function.types), constants, divisors), target=device, options=options)


def _notes(function: Specialised, built: Any, target: Target) -> dict[str, Any]:
    """What the launcher and the cost model must know; the number of arguments is checked against the binary's own."""
    from spgen.backends.triton_resources import resources

    meta = built.metadata
    boxes = [
        {"swizzle": box["swizzle"], "block": list(box["block_size"])}
        for box in (getattr(meta, "tensordesc_meta", None) or ())
    ]
    scratch = 0
    if "ptx" in built.asm:
        expected = sum(9 if function.types[name].startswith("tensordesc") else 1 for name in function.arguments)
        head = re.search(r"\.entry\s+\w+\s*\((.*?)\)", built.asm["ptx"], re.DOTALL)
        scratch = len(re.findall(r"\.param\b", head.group(1) if head else "")) - expected
        if not 0 <= scratch <= 2 or any(getattr(meta, f"{kind}_scratch_size", None) for kind in ("global", "profile")):
            raise ToolchainError(
                "triton", given=f"version {_triton_version()}, whose kernels take other arguments",
                remedy="install a version that spgen supports (see its dependencies)",
            )  # fmt: skip
    threads = meta.num_warps * meta.target.warp_size
    taken = asdict(resources(built, target))
    return {
        "entry": meta.name, "threads": threads, "shared": meta.shared, "scratch": scratch, "boxes": boxes,
        "resources": taken,
    }  # fmt: skip


@lru_cache(maxsize=1)
def generator() -> str:
    """A digest of everything that turns a kernel into source and binary, beside Triton itself."""
    templates, own = Path(expressions.__file__).parent, Path(__file__).parent
    files = [path for folder in (templates, templates.parent / "gluon") for path in folder.iterdir() if path.is_file()]
    files += [path for name in ("triton*.py", "gluon*.py") for path in own.glob(name) if path.is_file()]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()


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
