"""Columns, diagonals, windows, small blocks, token lists and permutations on a GPU, beside FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import spgen as sp
from spgen.autotune.measure import Call, Timer, interleaved, on_gpu
from spgen.bench import gpu_cases, peers
from spgen.bench.gpu_attention import matmul_peak, workload
from spgen.bench.gpu_cases import Case
from spgen.bench.machine import hardware, versions
from spgen.bench.start import first_calls, launches
from spgen.errors import DeviceError

SUITE = "gpu-patterns"
_SHORT, _LONG = 32 * 1024, 128 * 1024


def run(quick: bool = False) -> dict[str, Any]:
    """The whole suite, as a JSON value. Raises DeviceError without a GPU."""
    if not torch.cuda.is_available():
        raise DeviceError(f"bench {SUITE}", given="no GPU", allowed="a GPU that torch sees")
    rounds, timer = (1, on_gpu(30)) if quick else (3, on_gpu(100))
    missing: dict[str, str] = {}
    with torch.inference_mode():
        rows = [measure(case(), rounds, timer, missing) for case in cases(quick)]
        return {
            "suite": SUITE,
            "quick": quick,
            "machine": hardware("cuda"),
            "versions": versions(),
            "work": "B1 H32/8 D128 bf16, causal; TFLOP/s of the pairs that are needed",
            "peak_tflops": {"matmul": round(matmul_peak(timer) / 1e12, 1)},
            "rows": rows,
            "missing": missing,
            "launch": launches("cuda", torch.bfloat16),
            "start": first_calls("cuda", torch.bfloat16),
        }


def cases(quick: bool) -> Iterator[Callable[[], Case]]:
    """The suite's cases, each made when its turn comes: their data take gigabytes."""
    short, long = workload(_SHORT), workload(_LONG)
    yield partial(gpu_cases.vertical_slash, short)
    yield partial(gpu_cases.streaming, short)
    if quick:
        return
    yield partial(gpu_cases.columns, short)
    for block in (64, 32, 16):
        yield partial(gpu_cases.small_blocks, replace(short, block=block))
    yield partial(gpu_cases.tokens, short)
    yield partial(gpu_cases.tokens, short, count=64, rows=1)
    yield partial(gpu_cases.permuted_keys, short, sort=256)
    yield partial(gpu_cases.permuted_keys, short)
    yield partial(gpu_cases.vertical_slash, long)
    yield partial(gpu_cases.streaming, long)


def measure(case: Case, rounds: int, timer: Timer, missing: dict[str, str]) -> dict[str, Any]:
    """One row: with the plan made before, with planning inside the timed region, and FlexAttention beside them."""
    work = case.work
    q, k, v = work.tensors()
    attend = sp.attention(case.pattern)
    plan = attend.plan(q, k)
    calls: dict[str, Call] = {
        "spgen": lambda: attend(q, k, v, plan=plan),
        "spgen with plan": lambda: attend(q, k, v),
    }
    if case.flex is not None:
        flex = peers.available(partial(_flex, case, q, k, v), "flex", missing)
        calls |= {} if flex is None else {"flex": flex}
    taken = interleaved(calls, rounds=rounds, timer=timer)
    everything = work.heads * work.length * (work.length + 1) / 2
    return {
        "pattern": case.name,
        "length": work.length,
        "density": round(case.pairs / everything, 4),
        "ms": {name: round(seconds * 1e3, 4) for name, seconds in taken.items()},
        "tflops": {name: round(case.flops / seconds / 1e12, 1) for name, seconds in taken.items()},
        "plan_ms": round((taken["spgen with plan"] - taken["spgen"]) * 1e3, 4),
        "plan_mb": round(plan.nbytes / 1e6, 1),
        "faster_than": {"flex": round(taken["flex"] / taken["spgen"], 2)} if "flex" in taken else {},
        "error": {
            name: float(f"{case.largest_error(call(), q, k, v):.2g}")
            for name, call in calls.items() if name != "spgen with plan"
        },
    }  # fmt: skip


def _flex(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    assert case.flex is not None
    block_mask, compiled = case.flex(), peers.compiled_flex()
    grouped = q.shape[1] != k.shape[1]
    size = min(*block_mask.BLOCK_SIZE, 128)
    options = {} if size == 128 else {"BLOCK_M": size, "BLOCK_N": size}  # by default its tiles do not fit short blocks
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)
