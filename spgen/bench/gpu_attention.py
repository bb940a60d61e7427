"""Causal block lists on a GPU: bf16, 128 x 128 blocks, GQA, against compiled FlexAttention and cuDNN's dense kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen.autotune.measure import Call, Timer, interleaved, on_gpu
from spgen.bench import peers
from spgen.bench.blocks import BlockList, Workload
from spgen.bench.machine import hardware, versions
from spgen.bench.start import first_calls, launches
from spgen.errors import DeviceError

SUITE = "gpu-attention"
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95)
LENGTHS = (32 * 1024, 128 * 1024)
_NEEDED = 0.5  # half of a diagonal block is needed; that the rest is computed is our loss, not our work
_SAMPLES = 16


def workload(length: int, device: str = "cuda") -> Workload:
    """B1, 32 query heads on 8 key heads, D 128, bf16."""
    return Workload(
        heads=32, kv_heads=8, length=length, head_dim=128, block=128, dtype=torch.bfloat16, device=device
    )  # fmt: skip


def run(quick: bool = False) -> dict[str, Any]:
    """The whole suite, as a JSON value. Raises DeviceError without a GPU."""
    if not torch.cuda.is_available():
        raise DeviceError("bench gpu-attention", given="no GPU", allowed="a GPU that torch sees")
    rounds, timer = (1, on_gpu(30)) if quick else (3, on_gpu(150))
    missing: dict[str, str] = {}
    with torch.inference_mode():
        rows = [
            row
            for length in LENGTHS[: 1 if quick else None]
            for row in measure(workload(length), SPARSITIES, rounds, timer, missing)
        ]
        return {
            "suite": SUITE,
            "quick": quick,
            "machine": hardware("cuda"),
            "versions": versions(),
            "work": "B1 H32/8 D128 bf16, causal, blocks of 128; TFLOP/s of the pairs that are needed",
            "peak_tflops": {"matmul": round(matmul_peak(timer) / 1e12, 1)},
            "rows": rows,
            "missing": missing,
            "launch": launches("cuda", torch.bfloat16),
            "start": first_calls("cuda", torch.bfloat16),
        }


def matmul_peak(timer: Timer, size: int = 8192) -> float:
    """FLOP/s of a large bf16 matrix product: the rate that this GPU holds under load."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / interleaved({"mm": lambda: a @ b}, rounds=3, timer=timer)["mm"]


def measure(
    work: Workload, sparsities: tuple[float, ...], rounds: int, timer: Timer, missing: dict[str, str]
) -> list[dict[str, Any]]:
    """One row for each sparsity: with the plan made before, and with planning inside the timed region."""
    q, k, v = work.tensors()
    flex_kernel = peers.compiled_flex()
    dense = peers.available(partial(peers.cudnn_causal, q, k, v), "cudnn causal", missing)
    rows = []
    for sparsity in sparsities:
        listed = BlockList.random(work, sparsity)
        calls = ours(listed, q, k, v)
        flex = peers.available(partial(peers.flex, listed, q, k, v, flex_kernel), "flex", missing)
        calls |= {name: call for name, call in (("flex", flex), ("cudnn causal", dense)) if call is not None}
        taken = interleaved(calls, rounds=rounds, timer=timer)
        rows.append({"length": work.length, "sparsity": sparsity, **compare(listed, calls, taken, q, k, v)})
    return rows


def ours(listed: BlockList, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Our two contenders."""
    attend = sp.attention(listed.pattern())
    plan = attend.plan(q, k)
    return {"spgen": lambda: attend(q, k, v, plan=plan), "spgen with plan": lambda: attend(q, k, v)}


def compare(
    listed: BlockList, calls: dict[str, Call], taken: dict[str, float], q: Tensor,
    k: Tensor, v: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Times, rates of needed work and errors of one block list. A dense contender does all causal work."""
    work = listed.work
    everything = 2 * work.batch * work.heads * work.length * work.length * work.head_dim
    needed = listed.flops(_NEEDED)
    return {
        "ms": {name: round(seconds * 1e3, 4) for name, seconds in taken.items()},
        "tflops": {
            name: round((everything if name == "cudnn causal" else needed) / seconds / 1e12, 1)
            for name, seconds in taken.items()
        },
        "plan_ms": round((taken["spgen with plan"] - taken["spgen"]) * 1e3, 4),
        "faster_than": {
            name: round(seconds / taken["spgen"], 2)
            for name, seconds in taken.items() if not name.startswith("spgen")
        },
        "error": {
            name: float(f"{listed.largest_error(call(), q, k, v, _SAMPLES):.2g}")
            for name, call in calls.items() if name in ("spgen", "flex")
        },
    }  # fmt: skip
