"""The schedule a GPU kernel starts from: tile sizes, warps and stages by head size, dtype and shared memory."""

from __future__ import annotations

from typing import Any

from spgen.target import Target
from spgen.templates.triton.attention import padded

_LARGE = 160 * 1024  # bytes of shared memory: sm_80, sm_90, sm_100

# (largest number of channel lanes, (block_m, block_n, warps, stages)) with much and with little shared memory
_HALF = {
    True: ((64, (128, 128, 8, 3)), (128, (128, 128, 8, 2)), (256, (64, 64, 4, 2))),
    False: ((64, (128, 64, 4, 2)), (128, (128, 32, 4, 2)), (256, (64, 32, 4, 1))),
}
# exact products of float32 run on the plain arithmetic units and keep their operands in registers
_FLOAT = ((128, (32, 32, 8, 1)), (256, (16, 16, 8, 1)))


def default_schedule(head_dim: int, value_dim: int, dtype: str, target: Target) -> dict[str, Any]:
    """`block_m`, `block_n` and `options` ("warps=8", …) of a schedule that fits every target of this kind."""
    lanes = max(padded(head_dim), padded(value_dim))
    table = _FLOAT if dtype == "float32" else _HALF[target.smem_bytes >= _LARGE]
    block_m, block_n, warps, stages = next(row for limit, row in table if lanes <= limit)
    return {"block_m": block_m, "block_n": block_n, "options": [f"warps={warps}", f"stages={stages}"]}
