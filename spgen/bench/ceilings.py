"""The floor: how many operations and bytes a second this machine really does, measured beside the contenders."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from spgen.autotune.measure import Call, wall
from spgen.backends import openmp
from spgen.bench.workloads import Workload
from spgen.settings import c_compiler
from spgen.target import Target

_SOURCE = Path(__file__).with_name("fma.c")
_PRODUCT = 8192  # rows, columns and depth of the matrix product
_COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes, far more than any cache holds


@dataclass(frozen=True)
class Ceiling:
    """A call that does nothing but `amount` operations, or moves nothing but `amount` bytes."""

    call: Call
    amount: float

    def __call__(self) -> None:
        """Once."""
        self.call()


def ceilings(work: Workload) -> dict[str, Ceiling]:
    """`compute` and `copy`: on a CPU multiply-adds in registers, on a GPU a large matrix product; a copy in memory.

    `compute` is missing on a CPU without a C compiler.
    """
    compute = arithmetic(work.dtype) if work.device == "cpu" else _product(work)
    return ({} if compute is None else {"compute": compute}) | {"copy": _copy(work.device)}


def _product(work: Workload) -> Ceiling:
    a, b = (torch.randn(_PRODUCT, _PRODUCT, device=work.device, dtype=work.dtype) for _ in range(2))
    return Ceiling(lambda: a @ b, 2.0 * _PRODUCT**3)


def _copy(device: str) -> Ceiling:
    source = torch.ones(_COPIED[torch.device(device).type], dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    return Ceiling(lambda: goal.copy_(source), 2.0 * source.nbytes)


def arithmetic(dtype: torch.dtype, seconds: float = 0.05) -> Ceiling | None:
    """What the registers do at best with what the CPU kernel multiplies: fp32, or pairs of bf16 where that is fast."""
    in_pairs = dtype == torch.bfloat16 and Target.of("cpu").isa == "avx512_bf16"
    return pair_loop(seconds) if in_pairs else fma_loop(seconds)


def fma_loop(seconds: float = 0.05) -> Ceiling | None:
    """Vector multiply-adds of fp32 in independent chains, for about `seconds`; None without a C compiler."""
    return _loop("fma_rounds", 2, seconds)


def pair_loop(seconds: float = 0.05) -> Ceiling | None:
    """The same of pairs of bf16 by AVX-512's vdpbf16ps; None where there is no such instruction."""
    return _loop("pair_rounds", 4, seconds)


class _Work(ctypes.Structure):
    """Of the workers in fma.c."""

    _fields_ = (("rounds", ctypes.c_int64), ("workers", ctypes.c_int32), ("sums", ctypes.c_float))


def _loop(name: str, flops: int, seconds: float) -> Ceiling | None:
    """The loop of fma.c that does `flops` operations a lane, on PyTorch's threads, which wait for work by spinning."""
    target, chains = Target.of("cpu"), max(1, Target.of("cpu").registers * 3 // 4)
    with tempfile.TemporaryDirectory() as directory:
        library = _compiled(Path(directory, "fma.so"), target, chains)
    worker = getattr(library, name, None)
    if worker is None:
        return None
    work = _Work(rounds=1_000_000)

    def on_all_threads() -> None:
        openmp.launch(worker, ctypes.byref(work))

    on_all_threads()
    work.rounds = max(work.rounds, round(work.rounds * seconds / wall(on_all_threads)))
    return Ceiling(on_all_threads, float(work.workers * work.rounds * chains * target.simd * flops))


def _compiled(path: Path, target: Target, chains: int) -> ctypes.CDLL | None:
    compiler = c_compiler()
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    flags += ["-mprefer-vector-width=512"] if target.simd == 16 else []
    sizes = [f"-DLANES={target.simd}", f"-DCHAINS={chains}"]
    try:
        if compiler is not None:
            subprocess.run([compiler, *flags, *sizes, "-o", path, _SOURCE], check=True, capture_output=True)
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        pass
    return None
