"""Threads of CPU kernels: those of PyTorch, whatever their number, whoever calls."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from spgen.backends import openmp
from spgen.errors import ToolchainError
from spgen.settings import override
from tests.cpu_kernels import ALL_CASES, BLOCK_M, run
from tests.kernel_cases import causal, dense

pytest.importorskip("tvm")


@pytest.mark.parametrize("name", ["causal", "packed_group"])
def test_same_bits_whatever_the_threads(name: str) -> None:
    case = ALL_CASES[name](BLOCK_M, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2, 4 * (os.cpu_count() or 1) + 1, 1):
            torch.set_num_threads(count)
            results.append(run(case)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_several_threads_may_call() -> None:
    """Each sets a number of threads of its own."""
    case = dense(BLOCK_M, 64)
    expected, _ = run(case)
    results: list[torch.Tensor] = []

    def caller(threads: int) -> None:
        for _ in range(3):
            torch.set_num_threads(threads)
            results.append(run(case)[0])

    callers = [threading.Thread(target=caller, args=(n,)) for n in (1, 2, 3, 1, 2, 3)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert len(results) == 18
    assert all(torch.equal(expected, result) for result in results)


_FORK = """
import os, signal, sys, torch
import spgen as sp
q = torch.randn(1, 4, 300, 64)
attend = sp.attention(sp.causal() & sp.window(100))
expected = attend(q, q, q)
(torch.randn(900, 900) @ torch.randn(900, 900)).sum()  # PyTorch's own threads are up
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = attend(q, q, q)
    torch.set_num_threads(1)  # PyTorch's own operators need that
    os._exit(0 if torch.equal(found, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(attend(q, q, q), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_may_call() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_openmp_kernels_run_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) echo no OpenMP here >&2; exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with override(cache_dir=tmp_path, log="off"):
        assert openmp._loaded().spgen_parallel_launch
    monkeypatch.setenv("CC", "no-such-compiler")
    with override(cache_dir=tmp_path / "empty"), pytest.raises(ToolchainError, match="C compiler"):
        openmp._loaded()


def test_the_floating_point_mode_is_left_as_it_was() -> None:
    run(causal(BLOCK_M, 64))
    assert float(torch.tensor(1e-40) * 1) != 0
