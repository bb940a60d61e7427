"""The floor's other half: how many multiply-adds this CPU really does, measured in registers."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from spgen.autotune.measure import wall
from spgen.settings import c_compiler
from spgen.target import Target

_SOURCE = Path(__file__).with_name("fma.c")


@dataclass(frozen=True)
class FmaLoop:
    """A call that does nothing but `flops` operations, on as many threads as torch uses."""

    run: Callable[[int], float]
    rounds: int
    threads: int
    flops: int

    def __call__(self) -> None:
        """Run the loop on every thread at once; ctypes lets go of the interpreter lock."""
        others = [threading.Thread(target=self.run, args=(self.rounds,)) for _ in range(self.threads)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()


def fma_loop(seconds: float = 0.05) -> FmaLoop | None:
    """Vector multiply-adds of fp32 in independent chains, for about `seconds`; None without a C compiler."""
    return _loop("fma_rounds", 2, seconds)


def pair_loop(seconds: float = 0.05) -> FmaLoop | None:
    """The same of pairs of bf16 by AVX-512's vdpbf16ps; None where there is no such instruction."""
    return _loop("pair_rounds", 4, seconds)


def _loop(name: str, flops: int, seconds: float) -> FmaLoop | None:
    """The loop of fma.c that does `flops` operations a lane."""
    target, chains = Target.of("cpu"), max(1, Target.of("cpu").registers * 3 // 4)
    with tempfile.TemporaryDirectory() as directory:
        library = _compiled(Path(directory, "fma.so"), target, chains)
    run = getattr(library, name, None)
    if run is None:
        return None
    run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float
    few = 1_000_000
    rounds, threads = max(few, round(few * seconds / wall(lambda: run(few)))), torch.get_num_threads()
    return FmaLoop(run, rounds, threads, threads * rounds * chains * target.simd * flops)


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
