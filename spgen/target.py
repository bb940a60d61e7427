"""What the compiler knows about the machine a kernel is for.

A :class:`Target` is a value: its text is part of the cache key, and the cost model reads its numbers, which come from
the machine and from the descriptions in `spgen/targets`. Peaks are in FLOP/s, bandwidths in bytes/s.
A number that is not known is 0: whoever uses it then has to do without a prediction.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from spgen import targets
from spgen.errors import DeviceError, ToolchainError

KINDS = ("cpu", "cuda", "hip")
_KB = 1024
# features are those of /proc/cpuinfo
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # together: x86-64-v4
# Whose processors multiply pairs of bf16 faster than fp32: AMD's Zen 5 twice as fast. Intel's take two cycles for each
# vdpbf16ps, which makes pairs half as fast as widening them.
_FAST_BF16 = {"AuthenticAMD", "HygonGenuine"}
_X86 = ("avx512_bf16", "avx512", "avx2", "sse2")  # each has what the next one has


@dataclass(frozen=True)
class Target:
    """One kind of processor.

    `kind` is `cpu`, `cuda` or `hip`; `arch` is what the backend's compiler is told (LLVM's mcpu, `sm_90`, `gfx942`);
    `isa` the vector extension of a CPU, `features` what LLVM is told of it beyond `arch`, and `triple` where it is, if
    not here: kernels for it are compiled, and run elsewhere. `cores` are cores or
    multiprocessors, `simd` the fp32 lanes of a vector register (a warp's threads on a GPU), `registers` the vector
    registers of a core (32-bit registers a multiprocessor), `smem_bytes` the shared memory one block may use,
    `smem_total` that of a multiprocessor, which holds at most `max_programs` and `max_warps`; `l2_bytes` is the cache
    the work shares. `model` are the cost model's coefficients that were fitted on this target, `dense` the FLOP/s of
    its dense attention by dtype and head size (`"bfloat16 128"`), `break_even` the share of causal blocks at
    which lists of them were measured to take as long (1: they were faster with all of them listed).
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
    smem_total: int = 0
    max_warps: int = 0
    max_programs: int = 0
    l1_bytes: int = 0
    l2_bytes: int = 0
    bandwidth: float = 0.0
    peaks: tuple[tuple[str, float], ...] = ()
    # what predicts, and nothing that a kernel depends on
    model: tuple[tuple[str, float], ...] = field(default=(), compare=False, repr=False)
    dense: tuple[tuple[str, float], ...] = field(default=(), compare=False, repr=False)
    break_even: tuple[tuple[str, float], ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def of(device: object) -> Target:
        """The target of a `torch.device`, of its name (`"cpu"`, `"cuda:0"`), of an architecture (`"sm_90"`,
        `"aarch64"`), of a GPU (`"h200"`), or of a file that describes one (`"mine.json"`, as those in spgen/targets).
        `"cpu:avx2"` is this processor without what lies beyond AVX2.

        Raises DeviceError for a device no backend serves, and for a malformed description.
        """
        text = str(device)
        kind, _, index = text.partition(":")
        if text in targets.table("gpu"):
            return _known_arch(text)
        if text in targets.table("cpu")["archs"]:
            return _cpu_elsewhere(text)
        if kind == "cpu":
            return _cpu(index if index and not index.isdecimal() else None)
        if kind == "cuda" and (index.isdecimal() or not index):
            return _gpu(int(index) if index else None)
        if text.endswith(".json"):
            return _described_by(targets.load(Path(text).absolute()))
        if targets.slug(text) in targets.names():
            return _described_by(targets.shipped(targets.slug(text)))
        raise _unknown(text)

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


@lru_cache(maxsize=8)
def _cpu(narrower: str | None = None) -> Target:
    info = _cpuinfo()
    flags = info.get("flags") or info.get("Features") or ""
    isa = _isa_of(platform.machine().lower(), flags, info.get("vendor_id", ""))
    if narrower is not None:
        allowed = _X86[_X86.index(isa) :] if isa in _X86 else (isa,)
        if narrower not in allowed:
            raise DeviceError("device", given=f"cpu:{narrower}", allowed=", ".join(f"cpu:{one}" for one in allowed))
        isa = narrower
    known = targets.table("cpu")
    extension = known["isas"][isa]
    simd, cores = extension["simd"], _usable_cores()
    # two FMA units on every core this compiler meets with AVX2 or wider; a multiply-add is two operations
    flops = 2 * 2 * simd * cores * _clock(info)
    return Target(
        kind="cpu",
        name=info.get("model name") or platform.processor() or platform.machine() or "cpu",
        arch=extension["arch"],
        isa=isa,
        features=extension["features"],
        cores=cores,
        simd=simd,
        registers=extension["registers"],
        l1_bytes=_cache_bytes(1, 32 * _KB),
        l2_bytes=_cache_bytes(2, 512 * _KB),
        bandwidth=min(cores * known["core_bandwidth"], known["socket_bandwidth"]),
        peaks=_cpu_peaks(isa, flops) if flops else (),
        model=_pairs(extension.get("model")),
    )


def _cpu_elsewhere(name: str) -> Target:
    """A processor of which only the instructions are known."""
    known = targets.table("cpu")["archs"][name]
    return _described_by({"kind": "cpu", "name": name, **known})


def _described_cpu(given: Mapping[str, Any]) -> Target:
    extension = targets.table("cpu")["isas"][given["isa"]]
    return Target(
        kind="cpu",
        name=given["name"],
        arch=extension["arch"],
        isa=given["isa"],
        features=extension["features"],
        triple=given.get("triple", ""),
        cores=given.get("cores", 1),
        simd=extension["simd"],
        registers=extension["registers"],
        l1_bytes=given.get("l1_bytes", 32 * _KB),
        l2_bytes=given.get("l2_bytes", 0),
        bandwidth=given.get("bandwidth", 0.0),
        peaks=_pairs(given.get("peaks")),
        model=_pairs(given.get("model", extension.get("model"))),
    )


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
    listed = targets.named(properties.name) or {}
    limits = targets.table("gpu").get(arch, {})
    warp = getattr(properties, "warp_size", 32)
    smem = getattr(properties, "shared_memory_per_block_optin", 0) or limits.get("smem_bytes", 48 * _KB)
    return Target(
        kind="hip" if hip else "cuda",
        name=properties.name,
        arch=arch,
        cores=properties.multi_processor_count,
        simd=warp,
        registers=getattr(properties, "regs_per_multiprocessor", 65536),
        smem_bytes=int(smem),
        smem_total=int(getattr(properties, "shared_memory_per_multiprocessor", 0) or limits.get("smem_total", smem)),
        max_warps=properties.max_threads_per_multi_processor // warp,
        max_programs=limits.get("max_programs", 16),
        l2_bytes=int(getattr(properties, "L2_cache_size", 0)),
        bandwidth=listed.get("bandwidth", 0.0),
        peaks=_pairs(listed.get("peaks")),
        model=_pairs(listed.get("model")),
        dense=_pairs(listed.get("dense")),
        break_even=_pairs(listed.get("break_even")),
    )


def _known_arch(arch: str) -> Target:
    """A description without the device: the usual GPU of the architecture, else its limits alone."""
    usual = targets.table("gpu")[arch].get("typical")
    return _described_by(targets.shipped(usual) if usual else {"name": arch, "arch": arch})


def _described_by(given: Mapping[str, Any]) -> Target:
    if given.get("kind") == "cpu":
        return _described_cpu(given)
    arch = given["arch"]
    limits = {**targets.table("gpu").get(arch, {}), **given.get("limits", {})}
    return Target(
        kind="hip" if arch.startswith("gfx") else "cuda",
        name=given["name"],
        arch=arch,
        cores=given.get("multiprocessors", 1),
        simd=limits["warp_size"],
        registers=limits["registers"],
        smem_bytes=limits["smem_bytes"],
        smem_total=limits["smem_total"],
        max_warps=limits["max_warps"],
        max_programs=limits["max_programs"],
        l2_bytes=given.get("l2_bytes", 0),
        bandwidth=given.get("bandwidth", 0.0),
        peaks=_pairs(given.get("peaks")),
        model=_pairs(given.get("model")),
        dense=_pairs(given.get("dense")),
        break_even=_pairs(given.get("break_even")),
    )


def _pairs(numbers: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    return tuple((numbers or {}).items())


def known() -> tuple[str, ...]:
    """What `Target.of` takes, beside the file of a description."""
    return ("cpu", "cuda", "cuda:N", *targets.table("gpu"), *targets.table("cpu")["archs"], *targets.names())


def modelled(target: Target) -> tuple[Target, ...]:
    """Other processors of this kind on which the cost model was fitted, the nearest architecture first."""
    if target.kind == "cpu":
        isas = targets.table("cpu")["isas"]
        found = [_described_by({"kind": "cpu", "name": isa, "isa": isa}) for isa in isas]
        return tuple(sorted((one for one in found if one.model), key=lambda one: abs(one.simd - target.simd)))
    gpus = (_described_by(targets.shipped(name)) for name in targets.names())
    alike = [one for one in gpus if one.model and one.kind == target.kind]
    return tuple(sorted(alike, key=lambda one: abs(_generation(one.arch) - _generation(target.arch))))


def _generation(arch: str) -> int:
    """The number in `sm_90`, `gfx942`."""
    return int("".join(filter(str.isdigit, arch)) or 0)


def _unknown(text: str) -> DeviceError:
    from difflib import get_close_matches

    near = get_close_matches(targets.slug(text), known(), 1) or get_close_matches(text, known(), 1)
    remedy = f"did you mean {near[0]}? " if near else ""
    remedy += "a GPU that is not listed is described in a file, as those in spgen/targets"
    return DeviceError("device", given=text, allowed=", ".join(known()), remedy=remedy)
