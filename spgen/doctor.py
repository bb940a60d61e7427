"""What this machine offers, what is missing, and how to get it: `spgen doctor`.

Everything is tried rather than assumed: the compiler compiles, packages are imported where that is cheap, the cache
directory is written to; with `run`, a small kernel is compiled, launched and compared with the oracle.
"""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from spgen import targets
from spgen.cache import Cache
from spgen.errors import SpgenError
from spgen.settings import Settings, c_compiler, settings, triton_interpreted
from spgen.target import Target, _cache_bytes, _cpuinfo

# the processor's flags that say which products it adds up, and in which type
_FMA_FLAGS = {
    "fma": "float32", "avx512_bf16": "bfloat16", "avx512_fp16": "float16", "avx512_vnni": "int8", "avx_vnni": "int8",
    "amx_bf16": "bfloat16", "amx_fp16": "float16", "amx_int8": "int8",
    "asimd": "float32", "asimdhp": "float16", "bf16": "bfloat16", "i8mm": "int8", "sve": "float32", "sme": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, whether it is there, what was found, how to get it.

    Nothing needs what is `optional`; `details` are the same facts for programs (`spgen doctor --json`).
    """

    name: str
    present: bool
    found: str
    remedy: str = ""
    optional: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """Whether a backend can compile and run here, and what keeps it from it."""

    name: str
    missing: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Nothing is missing."""
        return not self.missing


def findings(*, run: bool = False) -> list[Finding]:
    """All findings, in the order they are reported; with `run` a kernel is tried on each backend that is ready."""
    found = [*_software(), *_tools(), *_processors(), _cache(), _settings()]
    return [*found, *(_kernel(backend) for backend in backends(found) if run and backend.ready)]


def backends(found: list[Finding]) -> list[Backend]:
    """What the findings mean for each backend."""
    missing = {finding.name for finding in found if not finding.present}
    needs = {
        "tvm (CPU)": ("torch", "tvm", "tvm_ffi", "tvm (CPU) kernel"),
        "triton (GPU)": ("torch", "triton", "GPU", "triton (GPU) kernel"),
    }
    return [Backend(name, tuple(part for part in parts if part in missing)) for name, parts in needs.items()]


def report(found: list[Finding]) -> dict[str, Any]:
    """The findings and verdicts as JSON values."""
    verdicts = [{"name": one.name, "ready": one.ready, "missing": list(one.missing)} for one in backends(found)]
    return {"findings": [asdict(finding) for finding in found], "backends": verdicts}


def _software() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _torch_finding()
    yield _distribution("triton", "triton", "pip install triton (Linux only)")
    yield _gluon()
    yield _distribution("tvm", "apache-tvm", "pip install 'spgen[cpu]'")
    yield _distribution("tvm_ffi", "apache-tvm-ffi", "pip install 'spgen[cpu]'")
    for name, use in (
        ("matplotlib", "pictures in files (spgen show -o)"),
        ("transformers", "models (spgen.integrations.transformers)"),
        ("safetensors", "index data from files (spgen show --data)"),
    ):
        finding = _distribution(name, name, f"pip install {name}, for {use}")
        yield Finding(name, finding.present, finding.found, finding.remedy, True, finding.details)


def _distribution(name: str, distribution: str, remedy: str) -> Finding:
    """By its metadata: importing tvm would take a second, and triton without torch fails."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", remedy)
    wanted = _required().get(distribution, "")
    if not _satisfies(version, wanted):
        return Finding(name, False, f"{version}, and spgen needs {wanted}", f"pip install '{distribution}{wanted}'")
    return Finding(name, True, version, details={"version": version})


@lru_cache(maxsize=1)
def _required() -> dict[str, str]:
    """The versions that spgen's own metadata ask for, by distribution."""
    try:
        lines = metadata.requires("spgen") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return {}
    found = (re.match(r"([A-Za-z0-9_.-]+)\s*([<>=!~0-9.,]*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match and match[2]}


def _satisfies(version: str, wanted: str) -> bool:
    """Whether a version fits bounds such as `>=0.27,<0.28`; what is no number in it does not count."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z]", text)[0])))

    for sign, bound in re.findall(r"(>=|<)([0-9.]+)", wanted):
        if (numbers(version) >= numbers(bound)) != (sign == ">="):
            return False
    return True


@lru_cache(maxsize=1)
def _torch() -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as fault:  # OSError: a library that it needs is missing
        return str(fault)


def _torch_finding() -> Finding:
    finding, torch = _distribution("torch", "torch", "pip install 'torch>=2.8'"), _torch()
    if not finding.present:
        return finding
    if isinstance(torch, str):
        return Finding("torch", False, f"{finding.found}, which cannot be imported: {torch}", "install torch again")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    build = build if torch.version.cuda or torch.version.hip else "built for CPUs alone"
    details = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
               "threads": torch.get_num_threads()}  # fmt: skip
    return Finding("torch", True, f"{torch.__version__}, {build}, {details['threads']} threads", details=details)


def _gluon() -> Finding:
    try:
        importlib.import_module("triton.experimental.gluon")
    except Exception as fault:  # of an experimental package, anything
        return Finding("gluon", False, f"cannot be imported: {fault}", "pip install -U triton", optional=True)
    return Finding("gluon", True, "triton.experimental.gluon is there", optional=True)


def _tools() -> Iterator[Finding]:
    yield _compiler()
    yield _linker()
    yield _openmp()
    yield _threads()


def _compiler() -> Finding:
    compiler, failure = _try_compiling()
    remedy = "install gcc or clang; without one kernels are compiled in memory, again in each process"
    if compiler is None:
        return Finding("C compiler", False, "none found", remedy)
    return Finding("C compiler", not failure, failure or compiler, "" if not failure else remedy)


def _linker() -> Finding:
    """What links a kernel; found where the CPU backend finds it."""
    from spgen.backends.tvm_compile import linker

    command = linker()
    if command is None:
        return Finding("linker", False, "none found", "install binutils or gcc")
    path = shutil.which(command[0]) or command[0]
    return Finding("linker", True, " ".join([path, *command[1:]]), details={"command": command})


def _openmp() -> Finding:
    compiler, failure = _try_compiling("-fopenmp")
    if compiler is not None and not failure:
        return Finding("OpenMP", True, f"{Path(compiler).name} -fopenmp")
    return Finding(
        "OpenMP", False, "no compiler with -fopenmp", "install gcc, or clang with libomp, to share torch's threads"
    )


def _threads() -> Finding:
    """The small library that runs CPU kernels on torch's threads, built if it is not there yet."""
    try:
        from spgen.backends import openmp

        fault = openmp.fault()
    except (ImportError, OSError, SpgenError) as error:
        fault = str(error).splitlines()[0]
    if fault:
        remedy = "see torch, tvm_ffi, C compiler and OpenMP above; until then kernels run on one thread or on TVM's"
        return Finding("threads", False, fault, remedy, optional=True)
    torch = _torch()
    count = torch.get_num_threads() if isinstance(torch, ModuleType) else 1
    return Finding("threads", True, f"CPU kernels run on torch's {count} OpenMP threads", details={"threads": count})


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


def _processors() -> Iterator[Finding]:
    yield _cpu()
    yield _products()
    yield from _gpus()


def _cpu() -> Finding:
    cpu = Target.of("cpu")
    plural = "" if cpu.cores == 1 else "s"
    caches = {f"L{level}": _cache_bytes(level, 0) for level in (1, 2, 3)}
    sizes = ", ".join(f"{name} {_kilobytes(size)}" for name, size in caches.items() if size)
    text = f"{cpu.name}, {cpu.cores} core{plural}, {cpu.isa} (LLVM: {cpu.arch})"
    details = {"name": cpu.name, "cores": cpu.cores, "isa": cpu.isa, "arch": cpu.arch, "cache_bytes": caches,
               "peak_flops": cpu.peak("float32")}  # fmt: skip
    return Finding("CPU", True, f"{text}; {sizes}" if sizes else text, details=details)


def _products() -> Finding:
    """The types that the processor multiplies and adds in one instruction, and the extension that does."""
    info = _cpuinfo()
    have = (info.get("flags") or info.get("Features") or "").lower().split()
    kinds: dict[str, list[str]] = {}
    for flag, dtype in _FMA_FLAGS.items():
        if flag in have:
            kinds.setdefault(dtype, []).append(flag)
    text = ", ".join(f"{dtype} ({', '.join(flags)})" for dtype, flags in kinds.items())
    return Finding("CPU products", True, text or "unknown: the system lists no features", optional=True, details=kinds)


def _kilobytes(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def _gpus() -> Iterator[Finding]:
    remedy = "an NVIDIA or AMD GPU, its driver, and a build of torch for it"
    torch, driver = _torch(), _driver()
    if isinstance(torch, str):
        yield Finding("GPU", False, "unknown without torch", remedy)
        return
    if not torch.cuda.is_available():
        interpreted = "; Triton interprets kernels on the CPU (TRITON_INTERPRET)" if triton_interpreted() else ""
        if driver and not torch.version.cuda:
            remedy = "there is a driver: install a build of torch for CUDA, see pytorch.org"
        known = f", driver {driver}" if driver else ""
        yield Finding("GPU", False, f"torch {torch.__version__} sees none{known}{interpreted}", remedy)
        return
    for index in range(torch.cuda.device_count()):
        gpu = Target.of(f"cuda:{index}")
        memory = torch.cuda.get_device_properties(index).total_memory
        text = f"{gpu}, {memory >> 30} GB, {gpu.smem_bytes // 1024} KB of shared memory a block, driver {driver or '?'}"
        details = {"name": gpu.name, "arch": gpu.arch, "multiprocessors": gpu.cores, "memory_bytes": memory,
                   "smem_bytes": gpu.smem_bytes, "driver": driver}  # fmt: skip
        text += "" if gpu.arch in targets.table("gpu") else f"; no kernels are tuned for {gpu.arch}"
        yield Finding("GPU", True, text, details=details)


def _driver() -> str:
    """The version of NVIDIA's or AMD's kernel driver, or an empty text."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            match = re.search(r"\d+\.\d+(\.\d+)*", Path(file).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if match:
            return match[0]
    return ""


def _cache() -> Finding:
    """Opened the way a compilation would, with a real entry that is thrown away."""
    remedy = "set SPGEN_CACHE_DIR to a directory that you alone can write"
    try:
        cache = Cache()
        count, size, damaged = len(list(cache.entries())), cache.size(), cache.damaged()
        fault = cache.fault()
    except SpgenError as error:
        return Finding("cache", False, str(error).splitlines()[0], error.remedy or remedy)
    if fault:
        return Finding("cache", False, f"{cache.directory}: {fault}", remedy)
    free = shutil.disk_usage(cache.directory).free
    origin = "SPGEN_CACHE_DIR" if settings().cache_dir else "default"
    text = f"{cache.directory} ({origin}), {count} kernels, {size / 1e6:.1f} MB, {free / 1e9:.1f} GB free"
    details = {"directory": str(cache.directory), "kernels": count, "bytes": size, "free_bytes": free,
               "damaged": damaged}  # fmt: skip
    if damaged:
        text += f"; {len(damaged)} damaged, which are rebuilt when needed"
    return Finding("cache", True, text, "`spgen cache prune` removes them" if damaged else "", details=details)


def _settings() -> Finding:
    """What the environment asks for."""
    try:
        chosen = asdict(settings())
    except SpgenError as error:
        return Finding("settings", False, str(error).splitlines()[0], error.remedy)
    default = asdict(Settings())
    changed = {name: str(value) for name, value in chosen.items() if value != default[name]}
    text = ", ".join(f"{name}={value}" for name, value in changed.items())
    return Finding("settings", True, text or "the environment changes none", optional=True, details=changed)


def _kernel(backend: Backend) -> Finding:
    """Compiled (or loaded), launched, and compared with the oracle."""
    name, device = f"{backend.name} kernel", "cpu" if backend.name == "tvm (CPU)" else "cuda"
    start = time.perf_counter()
    try:
        import torch

        import spgen as sp
        from spgen.reference import attention as oracle

        pattern = sp.causal() & (sp.sink(4) | sp.window(100))
        q, k, v = (torch.randn(1, 2, 300, 64, device=device) for _ in range(3))
        error = float((sp.attention(pattern)(q, k, v).double() - oracle(q, k, v, pattern)).abs().max())
    except Exception as fault:  # whatever it is, it belongs into the report
        return Finding(name, False, f"{type(fault).__name__}: {str(fault).splitlines()[0]}", "see the findings above")
    seconds = time.perf_counter() - start
    details = {"seconds": seconds, "error": error}
    if error > 1e-2:  # tf32 on a GPU
        return Finding(name, False, f"wrong by {error:.1e}", "report it, with this output", details=details)
    return Finding(name, True, f"right within {error:.0e}, after {seconds:.1f} s", details=details)
