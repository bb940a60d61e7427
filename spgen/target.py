"""What the compiler knows about the machine a kernel is for.

A :class:`Target` is a value: its text is part of the cache key, and the cost model reads its numbers. Peaks are
the arithmetic limit of the data sheet (dense, no structured sparsity), in FLOP/s; bandwidths in bytes/s.
A number that is not known is 0: whoever uses it then has to do without a prediction.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spgen.errors import DeviceError, ToolchainError

KINDS = ("cpu", "cuda", "hip")
_T = 1e12
_KB = 1024

# Shared memory is what one block may opt into, not what the SM has. Every configuration must fit the smallest
# (99 KB on sm_86, sm_89 and sm_120; 64 KB of LDS on gfx942).
GPU_ARCHS: dict[str, dict[str, Any]] = {
    "sm_75": {"smem_bytes": 64 * _KB, "max_warps": 32},
    "sm_80": {"smem_bytes": 163 * _KB, "max_warps": 64},
    "sm_86": {"smem_bytes": 99 * _KB, "max_warps": 48},
    "sm_89": {"smem_bytes": 99 * _KB, "max_warps": 48},
    "sm_90": {"smem_bytes": 227 * _KB, "max_warps": 64},
    "sm_100": {"smem_bytes": 227 * _KB, "max_warps": 64},
    "sm_120": {"smem_bytes": 99 * _KB, "max_warps": 48},
    "gfx942": {"smem_bytes": 64 * _KB, "max_warps": 32, "warp_size": 64},
}

# name: (arch, multiprocessors, bandwidth, L2 bytes, tensor-core peak of 16-bit types, of tf32, plain fp32)
_GPUS: dict[str, tuple[str, int, float, int, float, float, float]] = {
    "A100-SXM4-40GB": ("sm_80", 108, 1.56e12, 40 << 20, 312 * _T, 156 * _T, 19.5 * _T),
    "A100-SXM4-80GB": ("sm_80", 108, 2.04e12, 40 << 20, 312 * _T, 156 * _T, 19.5 * _T),
    "A10": ("sm_86", 72, 0.60e12, 6 << 20, 125 * _T, 62.5 * _T, 31.2 * _T),
    "RTX 3090": ("sm_86", 82, 0.94e12, 6 << 20, 71 * _T, 35.6 * _T, 35.6 * _T),
    "L4": ("sm_89", 58, 0.30e12, 48 << 20, 121 * _T, 60 * _T, 30.3 * _T),
    "L40S": ("sm_89", 142, 0.86e12, 96 << 20, 362 * _T, 183 * _T, 91.6 * _T),
    "RTX 4090": ("sm_89", 128, 1.01e12, 72 << 20, 165 * _T, 82.6 * _T, 82.6 * _T),
    "H100 80GB HBM3": ("sm_90", 132, 3.35e12, 50 << 20, 989 * _T, 494 * _T, 67 * _T),
    "H100 PCIe": ("sm_90", 114, 2.04e12, 50 << 20, 756 * _T, 378 * _T, 51 * _T),
    "H200": ("sm_90", 132, 4.8e12, 60 << 20, 989 * _T, 494 * _T, 67 * _T),
    "B200": ("sm_100", 148, 8.0e12, 126 << 20, 2250 * _T, 1125 * _T, 80 * _T),
    "MI300X": ("gfx942", 304, 5.3e12, 4 << 20, 1307 * _T, 653 * _T, 163 * _T),
}

# ISA: (LLVM's mcpu, what is there beyond it, fp32 lanes, vector registers)
_ISAS: dict[str, tuple[str, str, int, int]] = {
    "avx512_bf16": ("x86-64-v4", "+avx512bf16", 16, 32),
    "avx512": ("x86-64-v4", "", 16, 32),
    "avx2": ("x86-64-v3", "", 8, 16),
    "neon": ("generic", "", 4, 32),
    "rvv": ("generic-rv64", "+m +a +f +d +c +v", 4, 32),
    "sse2": ("x86-64", "", 4, 16),
    "none": ("generic", "", 4, 16),
}
# processors to compile for that are elsewhere: (LLVM's triple, ISA)
CPU_ARCHS: dict[str, tuple[str, str]] = {
    "aarch64": ("aarch64-linux-gnu", "neon"),
    "riscv64": ("riscv64-linux-gnu", "rvv"),
    "x86-64": ("x86_64-linux-gnu", "sse2"),
    "x86-64-v3": ("x86_64-linux-gnu", "avx2"),
    "x86-64-v4": ("x86_64-linux-gnu", "avx512"),
}
# no system states its memory's bandwidth: what one core of common servers moves, and what a socket does
_CORE_BANDWIDTH = 20e9
_SOCKET_BANDWIDTH = 200e9
# features are those of /proc/cpuinfo
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # together: x86-64-v4
# Whose processors multiply pairs of bf16 faster than fp32: AMD's Zen 5 twice as fast. Intel's take two cycles for each
# vdpbf16ps, which makes pairs half as fast as widening them.
_FAST_BF16 = {"AuthenticAMD", "HygonGenuine"}


@dataclass(frozen=True)
class Target:
    """One kind of processor.

    `kind` is `cpu`, `cuda` or `hip`; `arch` is what the backend's compiler is told (LLVM's mcpu, `sm_90`, `gfx942`);
    `isa` the vector extension of a CPU, `features` what LLVM is told of it beyond `arch`, and `triple` where it is, if
    not here: kernels for it are compiled, and run elsewhere. `cores` are cores or
    multiprocessors, `simd` the fp32 lanes of a vector register (a warp's threads on a GPU), `registers` the vector
    registers of a core (32-bit registers a multiprocessor), `smem_bytes` the shared memory one block may use,
    `l2_bytes` the cache the work shares.
    """

    kind: str
    name: str
    arch: str
    isa: str = ""
    features: str = ""
    triple: str = ""
    cores: int = 1
    simd: int = 1
    registers: int = 0
    smem_bytes: int = 0
    max_warps: int = 0
    l1_bytes: int = 0
    l2_bytes: int = 0
    bandwidth: float = 0.0
    peaks: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def of(device: object) -> Target:
        """The target of a `torch.device`, of its name (`"cpu"`, `"cuda:0"`), or of an arch (`"sm_90"`, `"aarch64"`).

        Raises DeviceError for a device no backend serves.
        """
        text = str(device)
        if text in GPU_ARCHS:
            return _known_arch(text)
        if text in CPU_ARCHS:
            return _cpu_elsewhere(text)
        kind, _, index = text.partition(":")
        if kind == "cpu":
            return _cpu()
        if kind == "cuda" and (index.isdecimal() or not index):
            return _gpu(int(index) if index else None)
        raise DeviceError("device", given=text, allowed=", ".join(("cpu, cuda, cuda:N", *GPU_ARCHS, *CPU_ARCHS)))

    def peak(self, dtype: str) -> float:
        """FLOP/s of a fused multiply-add on `dtype` (`float32`, `bfloat16`, `float16`, `tf32`); 0 if unknown."""
        return dict(self.peaks).get(dtype, 0.0)

    @property
    def key(self) -> str:
        """What a compiled kernel depends on: the kind and the architecture, not the machine's size."""
        return ":".join(filter(None, (self.kind, self.triple, self.arch, self.features)))

    def __str__(self) -> str:
        unit = "cores" if self.kind == "cpu" else "multiprocessors"
        return f"{self.kind} {self.name} ({self.isa or self.arch}, {self.cores} {unit})"


@lru_cache(maxsize=1)
def _cpu() -> Target:
    info = _cpuinfo()
    flags = info.get("flags") or info.get("Features") or ""
    isa = _isa_of(platform.machine().lower(), flags, info.get("vendor_id", ""))
    arch, features, simd, registers = _ISAS[isa]
    cores = _usable_cores()
    # two FMA units on every core this compiler meets with AVX2 or wider; a multiply-add is two operations
    flops = 2 * 2 * simd * cores * _clock(info)
    return Target(
        kind="cpu",
        name=info.get("model name") or platform.processor() or platform.machine() or "cpu",
        arch=arch,
        isa=isa,
        features=features,
        cores=cores,
        simd=simd,
        registers=registers,
        l1_bytes=_cache_bytes(1, 32 * _KB),
        l2_bytes=_cache_bytes(2, 512 * _KB),
        bandwidth=min(cores * _CORE_BANDWIDTH, _SOCKET_BANDWIDTH),
        peaks=_cpu_peaks(isa, flops) if flops else (),
    )


def _cpu_elsewhere(name: str) -> Target:
    """A processor of which only the instructions are known."""
    triple, isa = CPU_ARCHS[name]
    arch, features, simd, registers = _ISAS[isa]
    return Target("cpu", name, arch, isa, features, triple, simd=simd, registers=registers, l1_bytes=32 * _KB)


def _cpu_peaks(isa: str, flops: float) -> tuple[tuple[str, float], ...]:
    """What is not multiplied in pairs is widened to fp32."""
    pairs = 2 if isa == "avx512_bf16" else 1
    return ("float32", flops), ("bfloat16", pairs * flops), ("float16", flops)


def _isa_of(machine: str, flags: str, vendor: str = "") -> str:
    """The widest vector extension that is complete; by machine alone where the system lists no features."""
    have = set(flags.lower().split())
    if have >= _AVX512:
        return "avx512_bf16" if "avx512_bf16" in have and vendor in _FAST_BF16 else "avx512"
    if have >= {"avx2", "fma", "f16c"}:
        return "avx2"
    if machine in ("aarch64", "arm64"):
        return "neon"
    return "sse2" if machine in ("x86_64", "amd64") else "none"


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor; empty where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _usable_cores() -> int:
    # sched_getaffinity honours containers and taskset, and is missing outside Linux
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _clock(info: dict[str, str]) -> float:
    """Hz as the system states it now; 0 if it does not."""
    try:
        return float(info["cpu MHz"]) * 1e6
    except (KeyError, ValueError):
        return 0.0


def _cache_bytes(level: int, default: int) -> int:
    """The size of one core's data cache of this level, from sysfs."""
    base = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in sorted(base.glob("index*")):
        if _read(index / "level") == str(level) and _read(index / "type") in ("Data", "Unified"):
            size = _read(index / "size").removesuffix("K")
            return int(size) * _KB if size.isdecimal() else default
    return default


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _gpu(index: int | None) -> Target:
    try:
        import torch
    except ImportError:
        raise ToolchainError("torch", given="not installed", remedy="pip install torch") from None
    if not torch.cuda.is_available():
        raise DeviceError(
            "device", given="cuda", allowed="a device that torch sees", remedy="use cpu, or sm_90 and so on"
        )
    return _described(index if index is not None else torch.cuda.current_device())


@lru_cache(maxsize=16)
def _described(index: int) -> Target:
    import torch

    properties = torch.cuda.get_device_properties(index)
    hip = bool(torch.version.hip)
    arch = properties.gcnArchName.partition(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    listed = _by_name(properties.name)
    smem = getattr(properties, "shared_memory_per_block_optin", 0) or GPU_ARCHS.get(arch, {}).get(
        "smem_bytes", 48 * _KB
    )
    return Target(
        kind="hip" if hip else "cuda",
        name=properties.name,
        arch=arch,
        cores=properties.multi_processor_count,
        simd=getattr(properties, "warp_size", 32),
        registers=getattr(properties, "regs_per_multiprocessor", 65536),
        smem_bytes=int(smem),
        max_warps=properties.max_threads_per_multi_processor // getattr(properties, "warp_size", 32),
        l2_bytes=int(getattr(properties, "L2_cache_size", 0)),
        bandwidth=listed.bandwidth if listed else 0.0,
        peaks=listed.peaks if listed else (),
    )


def _by_name(name: str) -> Target | None:
    """The listed GPU whose name ends this one (`NVIDIA H200`), the longest name first."""
    for listed in sorted(_GPUS, key=len, reverse=True):
        if listed in name:
            return _listed(listed)
    return None


def _known_arch(arch: str) -> Target:
    """A description without the device: the last listed GPU of the arch, else the arch's limits alone."""
    names = [name for name, row in _GPUS.items() if row[0] == arch]
    return _listed(names[-1]) if names else _bare(arch, name=arch)


def _listed(name: str) -> Target:
    arch, cores, bandwidth, l2_bytes, half, tf32, single = _GPUS[name]
    peaks = (("float16", half), ("bfloat16", half), ("tf32", tf32), ("float32", single))
    return _bare(arch, name=name, cores=cores, bandwidth=bandwidth, l2_bytes=l2_bytes, peaks=peaks)


def _bare(
    arch: str,
    *,
    name: str,
    cores: int = 1,
    bandwidth: float = 0.0,
    l2_bytes: int = 0,
    peaks: Iterable[tuple[str, float]] = (),
) -> Target:
    limits = GPU_ARCHS[arch]
    return Target(
        kind="hip" if arch.startswith("gfx") else "cuda",
        name=name,
        arch=arch,
        cores=cores,
        simd=limits.get("warp_size", 32),
        registers=65536,
        smem_bytes=limits["smem_bytes"],
        max_warps=limits["max_warps"],
        l2_bytes=l2_bytes,
        bandwidth=bandwidth,
        peaks=tuple(peaks),
    )
