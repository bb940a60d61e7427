"""Attention on the CPU: lists of blocks in fp32 and bf16 beside FlexAttention and SDPA; tokens and diagonals."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen.autotune.measure import Call, interleaved
from spgen.bench import peers, tokens
from spgen.bench.blocks import BlockList, Workload
from spgen.bench.machine import hardware, versions
from spgen.bench.peak import FmaLoop, fma_loop, pair_loop
from spgen.bench.start import first_calls, launches
from spgen.target import Target

SUITE = "cpu-attention"
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)
WORK = Workload(heads=8, kv_heads=8, length=4096, head_dim=64, block=64, dtype=torch.float32, device="cpu")
QUICK = Workload(heads=2, kv_heads=2, length=1024, head_dim=64, block=64, dtype=torch.float32, device="cpu")
# what the floor counts: a kernel of 64-row tiles computes the whole diagonal block
_DIAGONAL = 1.0


def run(quick: bool = False) -> dict[str, Any]:
    """The whole suite, as a JSON value."""
    work, rounds = (QUICK, 3) if quick else (WORK, 9)
    missing: dict[str, str] = {}
    with torch.inference_mode():
        return {
            "suite": SUITE,
            "quick": quick,
            "machine": hardware("cpu"),
            "load": round(os.getloadavg()[0], 1),
            "versions": versions(),
            "work": f"B1 H{work.heads} D{work.head_dim} N{work.length}, causal, blocks of {work.block}",
            "stated_peak_gflops": round(Target.of("cpu").peak("float32") / 1e9, 1),
            "rows": measure(work, SPARSITIES, rounds, missing),
            "bfloat16": measure(replace(work, dtype=torch.bfloat16), SPARSITIES, rounds, missing),
            "bfloat16_pairs": _multiplies_pairs(),
            "pair_peak_gflops": pair_peak(rounds),
            "tokens": tokens.measure(work, rounds),
            "missing": missing,
            "launch": launches("cpu", torch.float32),
            "start": first_calls("cpu", torch.float32),
        }


def _multiplies_pairs() -> bool:
    return Target.of("cpu").isa == "avx512_bf16"


def _floor(dtype: torch.dtype) -> FmaLoop | None:
    """What the registers do at best with what the kernel multiplies."""
    return pair_loop() if dtype == torch.bfloat16 and _multiplies_pairs() else fma_loop()


def pair_peak(rounds: int) -> float | None:
    """GFLOP/s of pairs of bf16 in registers, whether or not the kernel multiplies them."""
    loop = pair_loop()
    return None if loop is None else round(loop.flops / interleaved({"pairs": loop}, rounds=rounds)["pairs"] / 1e9, 1)


def measure(
    work: Workload, sparsities: tuple[float, ...], rounds: int, missing: dict[str, str]
) -> list[dict[str, Any]]:
    """One row for each sparsity; the plan is made before, and timed apart. The floor takes turns with the rest."""
    q, k, v = work.tensors()
    flex_kernel, floor = peers.compiled_flex(), _floor(work.dtype)
    rows = []
    for sparsity in sparsities:
        listed = BlockList.random(work, sparsity)
        attend = sp.attention(listed.pattern())
        calls: dict[str, Call] = {"spgen": partial(attend, q, k, v, plan=attend.plan(q, k))}
        flex = peers.available(partial(peers.flex, listed, q, k, v, flex_kernel), "flex", missing)
        calls |= {} if flex is None else {"flex": flex}
        calls |= {"sdpa causal": peers.sdpa_causal(q, k, v), "sdpa mask": peers.sdpa_mask(listed, q, k, v)}
        taken = interleaved(calls | ({} if floor is None else {"floor": floor}), rounds=rounds)
        peak = Target.of("cpu").peak("float32") if floor is None else floor.flops / taken.pop("floor")
        planned = interleaved({"plan": partial(attend.plan, q, k)}, rounds=rounds)["plan"]
        rows.append({
            "sparsity": sparsity, **compare(listed, calls, taken, q, k, v), "plan_ms": round(planned * 1e3, 3),
            **of_peak(listed.flops(_DIAGONAL) / taken["spgen"], peak),
        })  # fmt: skip
    return rows


def of_peak(rate: float, peak: float) -> dict[str, float | None]:
    """Our rate beside the peak, which is what the registers did in the same rounds; 0 where it is not known."""
    return {
        "gflops": round(rate / 1e9, 1), "peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(rate / peak, 3) if peak else None,
    }  # fmt: skip


def compare(
    listed: BlockList, calls: dict[str, Call], taken: dict[str, float], q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Any]:
    """Times and errors on one block list."""
    return {
        "ms": {name: round(seconds * 1e3, 3) for name, seconds in taken.items()},
        "faster_than": {
            name: round(seconds / taken["spgen"], 2) for name, seconds in taken.items() if name != "spgen"
        },
        "error": {
            name: float(f"{listed.largest_error(call(), q, k, v):.2g}")
            for name, call in calls.items() if name in ("spgen", "flex")
        },
    }  # fmt: skip
