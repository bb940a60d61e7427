"""What a call costs before the kernel runs: launching it, and compiling it in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import spgen as sp
from spgen.arguments import Arguments
from spgen.attend import Attention
from spgen.autotune.measure import per_call
from spgen.bench.blocks import BlockList
from spgen.bench.workloads import Workload
from spgen.compile import compiled
from spgen.errors import CompileError
from spgen.ops import request_of
from spgen.plan import Plan

# Runs in a process of its own. torch is imported, and its device and threads are up, before the clock starts.
_FIRST_CALL = """
import json, sys, time
from pathlib import Path
import torch
device, dtype, cache, pattern = sys.argv[1:]
q, k, v = (torch.randn(1, 2, 256, 64, device=device).to(getattr(torch, dtype)) for _ in range(3))
(q @ k.transpose(-1, -2)).sum().item()
start = time.perf_counter()
from spgen.settings import override
import spgen as sp
imported = time.perf_counter()
with override(cache_dir=Path(cache)):
    sp.attention(sp.pattern(pattern))(q, k, v).sum().item()
print(json.dumps({"call": time.perf_counter() - start, "import": imported - start}))
"""
_PATTERNS = ("causal()", "causal() & (sink(64) | window(1024))")


def first_calls(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds from `import spgen` to the result of the first call: with an empty cache, and with a warm one.

    Each is a fresh process that has torch already; of several patterns the slowest counts.
    """
    empty, warm = [], []
    for pattern in _PATTERNS:
        with tempfile.TemporaryDirectory() as cache:
            empty.append(_fresh(device, dtype, cache, pattern))
            warm.append(min(_fresh(device, dtype, cache, pattern) for _ in range(3)))
    return {"first_call_s": round(max(empty), 3), "warm_cache_s": round(max(warm), 3), "patterns": list(_PATTERNS)}


def _fresh(device: str, dtype: torch.dtype, cache: str, pattern: str) -> float:
    arguments = [device, str(dtype).removeprefix("torch."), cache, pattern]
    done = subprocess.run([sys.executable, "-c", _FIRST_CALL, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError("first call in a fresh process", given=done.stderr.strip().splitlines()[-1:] or "no output")
    return float(json.loads(done.stdout.splitlines()[-1])["call"])


def launches(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds of a compiled call at a tiny size, and of its bare kernel."""
    work = Workload(1, 1, 64, 64, dtype, device)
    q, k, v = work.tensors()
    attend = sp.attention(BlockList.random(work, 64, 0.0).pattern())
    plan = attend.plan(q, k)

    def call() -> torch.Tensor:
        return attend(q, k, v, plan=plan)

    if device == "cpu":
        taken = per_call({"attend": call, "bare": bare_launch(attend, plan, q, k, v)}, settle=None)
    else:
        taken = per_call({"attend": call}, settle=torch.cuda.synchronize)
        taken["bare"] = bare_kernel_seconds(call)
    attend_us, bare_us = taken["attend"] * 1e6, taken["bare"] * 1e6
    return {
        "attend_us": round(attend_us, 2), "bare_us": round(bare_us, 2), "overhead_us": round(attend_us - bare_us, 2)
    }  # fmt: skip


def bare_launch(attend: Attention, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    """The compiled CPU kernel's own launch, with the arguments of this call: no operator, no checks, no allocation."""
    kernel = compiled(request_of(Arguments(q, k, v, attend.pattern.data, repr(attend.pattern)))).kernel
    seen: list[tuple[Any, ...]] = []
    attend(q, k, v, plan=plan)
    function = kernel._function
    kernel._function = lambda *arguments: seen.append(arguments)
    attend(q, k, v, plan=plan)
    kernel._function = function
    return lambda: function(*seen[0])


def bare_kernel_seconds(call: Callable[[], Any], launches: int = 100) -> float:
    """What a call's kernel takes on the GPU: many of them in one CUDA graph, with nothing of the host between."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return per_call({"graph": replay}, repeats=10)["graph"] / launches
