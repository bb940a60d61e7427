"""Causal block lists on the CPU: fp32, 64 x 64 blocks, against compiled FlexAttention and SDPA."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen.bench import peers
from spgen.bench.blocks import BlockList, Workload
from spgen.bench.machine import hardware, versions
from spgen.bench.measure import Call, interleaved
from spgen.bench.peak import fma_peak
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
    work, rounds = (QUICK, 3) if quick else (WORK, 11)
    with torch.inference_mode():
        peak = fma_peak()
        missing: dict[str, str] = {}
        rows = measure(work, SPARSITIES, rounds, missing)
        again = fma_peak()
        found = max((value for value in (peak, again) if value), default=None)
        reached = found or Target.of("cpu").peak("float32") or None
        for row in rows:
            row["share_of_peak"] = round(row["gflops"] * 1e9 / reached, 3) if reached else None
        return {
            "suite": SUITE,
            "quick": quick,
            "machine": hardware("cpu"),
            "versions": versions(),
            "work": f"B1 H{work.heads} D{work.head_dim} N{work.length} fp32, causal, blocks of {work.block}",
            "peak_gflops": {
                "measured": round(found / 1e9, 1) if found else None,
                "stated": round(Target.of("cpu").peak("float32") / 1e9, 1),
            },
            "rows": rows,
            "missing": missing,
            "launch": launches("cpu", torch.float32),
            "start": first_calls("cpu", torch.float32),
        }


def measure(
    work: Workload, sparsities: tuple[float, ...], rounds: int, missing: dict[str, str]
) -> list[dict[str, Any]]:
    """One row for each sparsity; the plan is made before, and timed apart."""
    q, k, v = work.tensors()
    flex_kernel = peers.compiled_flex()
    rows = []
    for sparsity in sparsities:
        listed = BlockList.random(work, sparsity)
        attend = sp.attention(listed.pattern())
        calls: dict[str, Call] = {"spgen": partial(attend, q, k, v, plan=attend.plan(q, k))}
        flex = peers.available(partial(peers.flex, listed, q, k, v, flex_kernel), "flex", missing)
        calls |= {} if flex is None else {"flex": flex}
        calls |= {"sdpa causal": peers.sdpa_causal(q, k, v), "sdpa mask": peers.sdpa_mask(listed, q, k, v)}
        taken = interleaved(calls, rounds=rounds)
        planned = interleaved({"plan": partial(attend.plan, q, k)}, rounds=rounds)["plan"]
        rows.append(
            {"sparsity": sparsity, **compare(listed, calls, taken, q, k, v), "plan_ms": round(planned * 1e3, 3)}
        )
    return rows


def compare(
    listed: BlockList, calls: dict[str, Call], taken: dict[str, float], q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Any]:
    """Times, our rate and the errors on one block list."""
    return {
        "ms": {name: round(seconds * 1e3, 3) for name, seconds in taken.items()},
        "gflops": round(listed.flops(_DIAGONAL) / taken["spgen"] / 1e9, 1),
        "faster_than": {
            name: round(seconds / taken["spgen"], 2) for name, seconds in taken.items() if name != "spgen"
        },
        "error": {
            name: float(f"{listed.largest_error(call(), q, k, v):.2g}")
            for name, call in calls.items() if name in ("spgen", "flex")
        },
    }  # fmt: skip
