"""Threads for compiled kernels: a small C file that runs their workers on the OpenMP threads of PyTorch.

TVM would start a pool of its own, which spins against PyTorch's. The C file is compiled once on each machine. A process
forked after a kernel was loaded runs kernels on one thread, as PyTorch's own OpenMP cannot be used there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

from spgen.cache import Cache, key
from spgen.errors import ToolchainError
from spgen.settings import c_compiler, logger

_SOURCE = Path(__file__).with_suffix(".c")
_LIBRARY = "openmp.so"
_SYMBOL = b"__TVMBackendParallelLaunch"


def is_available() -> bool:
    """Whether kernels can run on PyTorch's threads: the library is in the cache, or there is a C compiler."""
    try:
        _launcher()
    except ToolchainError:
        return False
    return True


def fault() -> str:
    """Why kernels cannot share PyTorch's threads, or an empty text; tried as a kernel's first load does."""
    try:
        _launcher()
        ctypes.CDLL(str(_built(Cache(), threads=True) / _LIBRARY))
    except (ImportError, OSError, ToolchainError) as found:
        return str(found).splitlines()[0]
    return ""


def register() -> None:
    """Makes kernels that are loaded from now on use PyTorch's threads. Call it before each load: TVM, imported
    in between, would have put its own pool there.

    Raises ToolchainError where there is no C compiler and no library in the cache.
    """
    context, launch = _launcher()
    if context(_SYMBOL, launch) != 0:
        raise ToolchainError("tvm_ffi", given="no place for threads", remedy="pip install -U 'spgen[cpu]'")


def launch(worker: ctypes._FuncPointer, closure: object) -> None:
    """Run a C function of the workers' contract (openmp.c) once on each thread.

    Raises ToolchainError where there is no C compiler and no library in the cache.
    """
    _library().spgen_parallel_launch(worker, closure, 0)


@lru_cache(maxsize=1)
def _launcher() -> tuple[ctypes._FuncPointer, ctypes.c_void_p]:
    import tvm_ffi.libinfo

    ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    context = ffi.TVMFFIEnvModRegisterContextSymbol
    context.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return context, ctypes.cast(_library().spgen_parallel_launch, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    import torch  # noqa: F401  its OpenMP library must be there first

    library = _loaded()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=library.spgen_run_alone)
    return library


def _loaded() -> ctypes.CDLL:
    cache = Cache()
    try:
        return ctypes.CDLL(str(_built(cache, threads=True) / _LIBRARY))
    except (OSError, ToolchainError) as fault:  # no -fopenmp, or a PyTorch without OpenMP: its symbols are missing
        library = ctypes.CDLL(str(_built(cache, threads=False) / _LIBRARY))
        logger().warning("kernels run on one thread: %s", fault)
        return library


def _built(cache: Cache, *, threads: bool) -> Path:
    text = _SOURCE.read_text(encoding="utf-8")
    name = key(kind="openmp", source=text, threads=threads, machine=platform.machine())
    return cache.get_or_build(name, lambda directory: _compile(directory, threads), meta={"kind": "openmp"})


def _compile(directory: Path, threads: bool) -> None:
    compiler = c_compiler()
    if compiler is None:
        raise ToolchainError("C compiler", given="none found", remedy="install gcc or clang, or set CC")
    # no libraries: OpenMP's symbols are PyTorch's
    flags = ["-O2", "-fPIC", "-shared", "-nostdlib", *(["-fopenmp"] if threads else [])]
    done = subprocess.run(
        [compiler, *flags, str(_SOURCE), "-o", str(directory / _LIBRARY)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ToolchainError(
            compiler, given=done.stderr.strip() or "an error", remedy="install a C compiler that works, or set CC"
        )
