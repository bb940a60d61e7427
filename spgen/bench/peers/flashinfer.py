"""FlashInfer's attention over variable blocks, planned on the host.

The API is that of flashinfer-python 0.6.18 (2026): `flashinfer.VariableBlockSparseAttentionWrapper`, documented at
https://docs.flashinfer.ai/api/sparse.html.

- `wrapper = Wrapper(workspace)`, 128 MB of uint8 on the device
- `wrapper.plan(block_mask_map, block_row_sz, block_col_sz, query heads, key heads, D, causal=, q_data_type=)` with
  bool [key heads, row blocks, column blocks] and int32 [key heads, row blocks], [key heads, column blocks]
- `wrapper.run(q, k, v)` with q [query heads, rows, D], k and v [key heads, keys, D]; returns an output like q

Every block row is a request of its own, and `causal` aligns its last row with the last of its listed keys. So it cuts a
diagonal block that is listed last, which is what a causal block list wants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spgen.bench.blocks import BlockList
from spgen.bench.cases import Problem
from spgen.bench.peers import Contender, Unserved

_WORKSPACE = 128 << 20


def contender(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """The same blocks. Query heads of a group share a list there: ours do not, so each gets its own keys."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    work, blocks = problem.work, problem.blocks
    if blocks is None:
        raise Unserved("it takes lists of blocks")
    if work.batch != 1:
        raise Unserved("it takes one sequence")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Unserved(f"{q.dtype} is neither float16 nor bfloat16")
    keys, values = (x[0].repeat_interleave(work.group, 0).contiguous() for x in (k, v))
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(_WORKSPACE, dtype=torch.uint8, device=q.device))
    rows = q[0].contiguous()

    def run(planned: Any) -> Tensor:
        out: Tensor = planned.run(rows, keys, values)
        return out[None]

    return Contender(run, lambda: _planned(wrapper, blocks, q.dtype))


def _planned(wrapper: Any, blocks: BlockList, dtype: torch.dtype) -> Any:
    work, (heads, count, _) = blocks.work, blocks.keep.shape
    sizes = torch.full((heads, count), blocks.size, dtype=torch.int32, device=blocks.keep.device)
    sizes[:, -1] = work.length - (count - 1) * blocks.size
    wrapper.plan(blocks.keep, sizes, sizes, heads, heads, work.head_dim, causal=True, q_data_type=dtype)
    return wrapper
