"""What this machine offers, what is missing, and how to get it: `spgen doctor`.

Everything is tried rather than assumed: the compiler compiles, the cache directory is written to.
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from spgen.cache import Cache
from spgen.errors import SpgenError
from spgen.settings import c_compiler, settings, triton_interpreted
from spgen.target import Target


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, whether it is there, what was found, how to get it."""

    name: str
    present: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Backend:
    """Whether a backend can compile and run here, and what keeps it from it."""

    name: str
    missing: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Nothing is missing."""
        return not self.missing


def findings() -> list[Finding]:
    """All findings, in the order they are reported."""
    return list(_findings())


def backends(found: list[Finding]) -> list[Backend]:
    """What the findings mean for each backend."""
    missing = {finding.name for finding in found if not finding.present}
    needs = {"tvm (CPU)": ("torch", "tvm"), "triton (GPU)": ("torch", "triton", "GPU")}
    return [Backend(name, tuple(part for part in parts if part in missing)) for name, parts in needs.items()]


def _findings() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _distribution("torch", "torch", "pip install 'torch>=2.8'")
    yield _distribution("tvm", "apache-tvm", "pip install 'spgen[cpu]'")
    yield _distribution("triton", "triton", "pip install triton (Linux only)")
    yield _compiler()
    yield _openmp()
    yield Finding("CPU", True, _cpu_text())
    yield from _gpus()
    yield _cache()


def _distribution(name: str, distribution: str, remedy: str) -> Finding:
    """By its metadata: importing tvm would take a second, and triton without torch fails."""
    try:
        return Finding(name, True, metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", remedy)


def _compiler() -> Finding:
    compiler, failure = _try_compiling()
    remedy = "install gcc or clang; without one kernels are compiled in memory, again in each process"
    if compiler is None:
        return Finding("C compiler", False, "none found", remedy)
    return Finding("C compiler", not failure, failure or compiler, "" if not failure else remedy)


def _openmp() -> Finding:
    compiler, failure = _try_compiling("-fopenmp")
    if compiler is not None and not failure:
        return Finding("OpenMP", True, f"{Path(compiler).name} -fopenmp")
    return Finding(
        "OpenMP", False, "no compiler with -fopenmp", "install gcc, or clang with libomp, to share torch's threads"
    )


def _try_compiling(*flags: str) -> tuple[str | None, str]:
    """Build a shared library of one function: the compiler's path, and what went wrong if anything did."""
    compiler = c_compiler()
    if compiler is None:
        return None, "none found"
    with tempfile.TemporaryDirectory(prefix="spgen-") as directory:
        command = [compiler, *flags, "-shared", "-fPIC", "-x", "c", "-", "-o", str(Path(directory, "probe.so"))]
        try:
            result = subprocess.run(
                command, input="int probe(void) { return 0; }", text=True, capture_output=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as fault:
            return compiler, str(fault)
    lines = result.stderr.strip().splitlines()
    return compiler, "" if result.returncode == 0 else (lines[-1] if lines else f"exit code {result.returncode}")


def _cpu_text() -> str:
    cpu = Target.of("cpu")
    plural = "" if cpu.cores == 1 else "s"
    return f"{cpu.name}, {cpu.cores} core{plural}, {cpu.isa} (LLVM: {cpu.arch})"


def _gpus() -> Iterator[Finding]:
    remedy = "an NVIDIA or AMD GPU, its driver, and a build of torch for it"
    try:
        import torch
    except ImportError:
        yield Finding("GPU", False, "unknown without torch", remedy)
        return
    if not torch.cuda.is_available():
        interpreted = "; Triton interprets kernels on the CPU (TRITON_INTERPRET)" if triton_interpreted() else ""
        yield Finding("GPU", False, f"torch {torch.__version__} sees none{interpreted}", remedy)
        return
    for index in range(torch.cuda.device_count()):
        gpu = Target.of(f"cuda:{index}")
        yield Finding("GPU", True, f"{gpu}, {gpu.smem_bytes // 1024} KB of shared memory a block")


def _cache() -> Finding:
    """Opened the way a compilation would, with a real entry that is thrown away."""
    remedy = "set SPGEN_CACHE_DIR to a directory that you alone can write"
    try:
        cache = Cache()
        count, size = len(list(cache.entries())), cache.size()
        fault = cache.fault()
    except SpgenError as error:
        return Finding("cache", False, str(error).splitlines()[0], error.remedy or remedy)
    if fault:
        return Finding("cache", False, f"{cache.directory}: {fault}", remedy)
    origin = "SPGEN_CACHE_DIR" if settings().cache_dir else "default"
    return Finding("cache", True, f"{cache.directory} ({origin}), {count} kernels, {size / 1e6:.1f} MB")
