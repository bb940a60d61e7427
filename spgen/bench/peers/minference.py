"""MInference's vertical-slash attention: columns, and the 64-row tiles that diagonals touch.

The API is that of MInference 0.1.6 (2025): `minference.vertical_slash_sparse_attention(query, key, value, v_idx,
s_idx)`, documented in https://github.com/microsoft/MInference: README, minference/ops/pit_sparse_flash_attention_v2.py.

- query, key and value [batch, heads, rows, D], as many key heads as query heads, float16 or bfloat16
- v_idx [batch, heads, columns] and s_idx [batch, heads, offsets] int32, in any order; returns an output like query

The index is made in every call, so planning cannot be timed apart. Diagonals become whole tiles of 64 x 64: more pairs
than the pattern has are computed, and the output is that of those pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spgen.bench.cases import Problem
from spgen.bench.peers import MORE, Contender, Unserved


def contender(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """The same columns and offsets; keys are repeated for the query heads of a group."""
    from minference import vertical_slash_sparse_attention

    work = problem.work
    if problem.columns is None or problem.offsets is None:
        raise Unserved("it takes columns and diagonals")
    if work.batch != 1:
        raise Unserved("it takes one sequence")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Unserved(f"{q.dtype} is neither float16 nor bfloat16")
    keys, values = (x.repeat_interleave(work.group, 1).contiguous() for x in (k, v))
    columns, offsets = problem.columns[None], problem.offsets[None]

    def run(plan: Any) -> Tensor:
        out: Tensor = vertical_slash_sparse_attention(q, keys, values, columns, offsets)
        return out

    return Contender(run, plans_inside=True, pairs=MORE)
