"""What a configuration makes of a call, and what its kernel takes of a processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spgen.errors import RecordError
from spgen.ir.config import Config
from spgen.target import Target

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_RESERVED = 1024  # bytes of shared memory that CUDA keeps for each program
_PARTITIONS = 4  # of a multiprocessor: a warp's registers lie in one
_MOST = {"cuda": 255, "hip": 512}  # registers of a thread
_WARPGROUP = 128  # threads that multiply together on Hopper
_UNIT = 8  # registers of a thread are given out in such steps


@dataclass(frozen=True)
class Work:
    """What one configuration makes of a call, counted.

    `programs` are launched; tiles are those of all of them: `full` run without a mask, `masked` with one, `gathered`
    of either are read row by row. `longest` are the tiles of the program that has most. `flops` counts the needed
    pairs, `bytes` what must move once. `dtype`, `head_dim` and `value_dim` are those of the call. `columns` are those
    in the tiles of all programs: fewer than tiles could hold, where segments end within one (0: not counted).
    """

    dtype: str
    head_dim: int
    value_dim: int
    programs: int
    full: int
    masked: int
    gathered: int
    longest: int
    flops: float
    bytes: float
    columns: int = 0

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.full + self.masked

    def moved(self, config: Config) -> float:
        """Bytes that must come from memory: no more than the tiles hold."""
        keys, rows = self.tiles * config.block_n, self.programs * config.block_m
        return min(self.bytes, float((keys + rows) * (self.head_dim + self.value_dim) * BYTES[self.dtype]))

    @staticmethod
    def of(facts: Mapping[str, Any], config: Config) -> Work:
        """The work that a record's facts give for a configuration. Raises RecordError if they lack its tiles."""
        try:
            programs, full, masked, gathered, longest, *rest = facts["tiles"][f"{config.block_m}x{config.block_n}"]
            return Work(
                facts["dtype"], facts["head_dim"], facts["value_dim"], programs, full, masked, gathered, longest,
                facts["flops"], facts["bytes"], *rest,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as fault:
            raise RecordError(
                "facts", given=f"none for tiles of {config.block_m}x{config.block_n} ({type(fault).__name__}: {fault})",
                allowed="dtype, head_dim, value_dim, flops, bytes, and six counts for each size of tiles",
                remedy="tune the call again",
            ) from fault  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of shared memory, and bytes a thread spills."""

    registers: int = 0
    shared: int = 0
    spilled: int = 0


def padded(size: int) -> int:
    """Channels as the GPU templates hold them: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def threads_of(config: Config, target: Target) -> int:
    """Threads of a GPU program."""
    return config.option("warps", 4) * target.simd


def occupancy(config: Config, target: Target, resources: Resources) -> int:
    """How many programs share a multiprocessor; 0 where not even one fits."""
    warps = config.option("warps", 4)
    limits = [target.max_programs or 32, (target.max_warps or 64) // warps]
    if resources.shared:
        limits.append((target.smem_total or target.smem_bytes) // (resources.shared + _reserved(target)))
    if resources.registers and target.registers:
        rounded = -(-resources.registers // _UNIT) * _UNIT
        limits.append(_PARTITIONS * (target.registers // _PARTITIONS // (rounded * target.simd)) // warps)
    return min(limits)


def _reserved(target: Target) -> int:
    return _RESERVED if target.kind == "cuda" else 0


def stages_of(work: Work, config: Config) -> int:
    """Stages of the loops that there are: without whole tiles, those of the masked ones."""
    stages = config.option("stages", 2)
    return stages if work.full else config.option("masked_stages", stages)


def least_shared(config: Config, work: Work, target: Target) -> int:
    """Bytes of shared memory that Triton gives the kernel at least: q, and K and V of each stage.

    Wgmma reads all of them from there; before it, a stage in use lies in registers. Three products of tf32 hold the
    high and the low parts of q. AMD's q is in registers when the loop begins.
    """
    size = BYTES[work.dtype]
    lanes = padded(work.head_dim), padded(work.value_dim)
    q, k, v = config.block_m * lanes[0] * size, config.block_n * lanes[0] * size, config.block_n * lanes[1] * size
    if config.option("warpgroups"):  # and, where there is room, q of a second row tile, then the result
        held = q + config.option("stages", 2) * (k + v)
        room = (target.smem_total or target.smem_bytes) // (2 // config.option("warpgroups")) - 2 * _reserved(target)
        for more in (q + config.block_m * lanes[1] * size, q):
            if held + more <= room:
                return held + more
        return held
    stages = stages_of(work, config)
    if target.kind == "hip":
        return max(q if stages == 1 else 0, (stages - 1) * (k + v))
    if config.option("tf32x3"):
        return 2 * q + k + (stages - 1) * (k + v)
    if stages == 1:
        return q + (max(k, v) if size == 2 else k)
    held = stages if target.arch == "sm_90" and size == 2 else stages - 1
    return q + held * (k + v)


def fits(config: Config, work: Work, target: Target) -> str | None:
    """Why a configuration cannot run on a target, or None: what is known before anything is compiled."""
    if target.kind == "cpu":
        return _fits_cpu(config, target)
    shared = least_shared(config, work, target)
    if target.smem_bytes and shared > target.smem_bytes:
        return f"shared memory: {shared} of {target.smem_bytes} bytes"
    threads = threads_of(config, target)
    warps = config.option("warps", 4)
    if target.max_warps and warps > target.max_warps:
        return f"warps: {warps} of {target.max_warps}"
    groups = config.option("warpgroups")
    if groups:  # warps that do not multiply give registers to those that do
        threads = groups * _WARPGROUP
    cap = config.option("registers") or _MOST[target.kind]
    if target.registers and config.option("registers") * threads > target.registers:
        return f"registers: {cap * threads} of {target.registers}"
    held = config.block_m * padded(work.value_dim) // threads
    if held > cap:
        return f"accumulators: {held} registers of {cap} a thread"
    return None


def _fits_cpu(config: Config, target: Target) -> str | None:
    if config.block_m % target.simd:
        return f"rows: {config.block_m} are no multiple of {target.simd} lanes"
    vectors = config.block_m // target.simd
    for name in ("key_rows", "value_rows"):
        needed = config.option(name) * vectors + vectors + 1
        if target.registers and needed > target.registers:
            return f"{name}: {needed} of {target.registers} vector registers"
    return None
