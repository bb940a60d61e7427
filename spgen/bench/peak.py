"""The floor's other half: how many multiply-adds this CPU really does, measured in registers."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from spgen.bench.measure import wall
from spgen.settings import c_compiler
from spgen.target import Target

_SOURCE = Path(__file__).with_name("fma.c")
_SECONDS = 0.1


def fma_peak(repeats: int = 5) -> float | None:
    """FLOP/s of fp32 multiply-adds on as many threads as torch uses: the best of `repeats`; None without a compiler."""
    target, compiler = Target.of("cpu"), c_compiler()
    if compiler is None:
        return None
    chains = target.registers * 3 // 4
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory, "fma.so")
        sizes = [f"-DLANES={target.simd}", f"-DCHAINS={chains}"]
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        flags += ["-mprefer-vector-width=512"] if target.isa == "avx512" else []
        try:
            subprocess.run([compiler, *flags, *sizes, "-o", library, _SOURCE], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        run = ctypes.CDLL(str(library)).fma_rounds
        run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float
        rounds = 1_000_000
        rounds = max(rounds, round(rounds * _SECONDS / wall(lambda: run(rounds))))
        threads = torch.get_num_threads()
        best = min(wall(lambda: _together(run, rounds, threads)) for _ in range(repeats))
    return threads * rounds * chains * target.simd * 2 / best


def _together(run: object, rounds: int, count: int) -> None:
    """The loop on `count` threads at once; ctypes lets go of the interpreter lock."""
    threads = [threading.Thread(target=run, args=(rounds,)) for _ in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
