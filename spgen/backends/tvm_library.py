"""The shared libraries of CPU kernels: found in the disk cache, or rendered, compiled and put there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spgen import cache
from spgen.backends import openmp
from spgen.errors import CompileError, ToolchainError
from spgen.ir.node import Op
from spgen.settings import logger, settings
from spgen.target import Target

_LIBRARY, _SOURCE = "kernel.so", "kernel.py"
_TEMPLATES = Path(__file__).parents[1] / "templates"


def load(kernel: Op, target: Target, *, strided: bool = False) -> tuple[Callable[..., None], Path | None]:
    """The compiled function of a kernel, and the file of its source (None where it was compiled in memory)."""
    disk = cache.Cache()
    key = _key(kernel, target, strided)
    directory = disk.get(key)
    if directory is None:
        _refuse_to_compile()
        if not _can_link():
            return _in_memory(kernel, target, strided), None
        directory = disk.get_or_build(
            key, lambda place: _write(kernel, target, strided, place), meta=_meta(kernel, target)
        )
    try:
        return _function(directory / _LIBRARY, kernel.kind), directory / _SOURCE
    except (OSError, RuntimeError) as fault:
        if not disk.invalidate(key, str(fault)):
            raise
    return load(kernel, target, strided=strided)


def render_source(kernel: Op, target: Target, *, strided: bool = False) -> str:
    """The builder code of a kernel; `strided` is for attention, whose last strides may be other than 1."""
    if kernel.kind == "attention":
        from spgen.templates.tvm.attention import attention_source

        return attention_source(kernel, target, strided=strided)
    from spgen.templates.tvm.weights.linear import linear_source, sampled_source

    return (linear_source if kernel.kind == "linear" else sampled_source)(kernel, target)


def compile_elsewhere(kernel: Op, target: Target) -> Path:
    """The file of a kernel's source, beside the object file for a processor that is not this machine's."""
    disk = cache.Cache()
    key = _key(kernel, target, strided=False)
    directory = disk.get(key)
    if directory is None:
        _refuse_to_compile()
        directory = disk.get_or_build(
            key, lambda place: _write_object(kernel, target, place), meta=_meta(kernel, target)
        )
    return directory / _SOURCE


def _meta(kernel: Op, target: Target) -> dict[str, str]:
    return {"kind": kernel.kind, "backend": "tvm", "target": target.key, "kernel": str(kernel)}


def _write_object(kernel: Op, target: Target, directory: Path) -> None:
    from spgen.backends.tvm_compile import compile_source, write_object

    source = directory / _SOURCE
    source.write_text(render_source(kernel, target, strided=False), encoding="utf-8")
    write_object(compile_source(source.read_text(encoding="utf-8"), source, kernel.kind, target), directory)


def _write(kernel: Op, target: Target, strided: bool, directory: Path) -> None:
    from spgen.backends.tvm_compile import compile_source, link

    source = directory / _SOURCE
    source.write_text(render_source(kernel, target, strided=strided), encoding="utf-8")
    link(compile_source(source.read_text(encoding="utf-8"), source, kernel.kind, target), directory)


def _function(library: Path, name: str) -> Callable[..., None]:
    try:
        import tvm_ffi
    except ImportError:
        raise ToolchainError("tvm_ffi", given="not installed", remedy="pip install 'spgen[cpu]'") from None
    openmp.register()
    found: Callable[..., None] = tvm_ffi.load_module(str(library))[name]
    return found


def _in_memory(kernel: Op, target: Target, strided: bool) -> Callable[..., None]:
    """TVM's JIT, with its own threads: for a machine without a linker."""
    from spgen.backends.tvm_compile import compile_source

    os.environ.setdefault("TVM_BIND_THREADS", "0")  # its threads would pin this one to a core
    logger().warning("no linker or C compiler: this kernel is compiled in memory and runs on TVM's own threads")
    source = render_source(kernel, target, strided=strided)
    module = compile_source(source, Path("<spgen kernel>"), kernel.kind, target)
    found: Callable[..., None] = module[kernel.kind]
    return found


def _can_link() -> bool:
    from spgen.backends.tvm_compile import linker

    return linker() is not None and openmp.is_available()


def _refuse_to_compile() -> None:
    if settings().no_compile:
        raise CompileError(
            "kernel",
            given="one that is not in the cache",
            allowed="cached kernels only, since SPGEN_NO_COMPILE is set",
            remedy="unset SPGEN_NO_COMPILE, or fill the cache with `spgen compile`",
        )


def _key(kernel: Op, target: Target, strided: bool) -> str:
    return cache.key(
        kind="tvm", kernel=str(kernel), target=target.key, isa=target.isa, strided=strided, generator=_generator()
    )


@lru_cache(maxsize=1)
def _generator() -> str:
    """Changes with everything that turns a kernel's text into code."""
    files = sorted(file for file in (_TEMPLATES / "tvm").rglob("*") if file.suffix in (".py", ".jinja"))
    digest = hashlib.sha256()
    for file in (*files, _TEMPLATES / "render.py", Path(__file__).with_name("tvm_compile.py")):
        digest.update(file.read_bytes())
    digest.update("".join(map(_version, ("apache-tvm", "apache-tvm-ffi", "torch"))).encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
