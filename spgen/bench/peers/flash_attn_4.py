"""FlashAttention-4 (CuTe DSL), block-sparse: lists of whole tiles, and of tiles that a mask function cuts.

The API is that of flash-attn-4 4.0.0b (2026): `flash_attn.cute.flash_attn_func(q, k, v, …, mask_mod=,
block_sparse_tensors=)` with `flash_attn.cute.block_sparsity.BlockSparseTensorsTorch`, documented by their signatures
and by tests/cute/test_mask_mod.py in https://github.com/Dao-AILab/flash-attention.

- q [batch, rows, heads, D], k and v [batch, keys, key heads, D], float16 or bfloat16; returns (out, lse), out like q
- counts int32 [batch or 1, heads or 1, row blocks], lists int32 [batch or 1, heads or 1, row blocks, at most key
  blocks]; only the first `count` of a list are read; `block_size` is (rows, keys) of a block, multiples of 128
- mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors), a `cute.jit` function, cuts the listed partial blocks
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spgen.bench.blocks import BlockList
from spgen.bench.cases import Problem
from spgen.bench.peers import Contender, Unserved

_TILE = 128


def contender(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """The same blocks; whole and diagonal blocks are listed apart, which is the plan."""
    from flash_attn.cute import flash_attn_func

    blocks = problem.blocks
    if blocks is None or blocks.size % _TILE:
        raise Unserved(f"it takes lists of blocks, multiples of {_TILE}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Unserved(f"{q.dtype} is neither float16 nor bfloat16")
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    causal = _causal_mask()

    def run(tensors: Any) -> Tensor:
        found = flash_attn_func(*rows, mask_mod=causal, block_sparse_tensors=tensors)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return Contender(run, lambda: _listed(blocks))


def _listed(blocks: BlockList) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    cut_count, cut, whole_count, whole = blocks.counted()
    return BlockSparseTensorsTorch(
        mask_block_cnt=cut_count, mask_block_idx=cut[..., :1].contiguous(), full_block_cnt=whole_count,
        full_block_idx=whole, block_size=(blocks.size, blocks.size),
    )  # fmt: skip


def _causal_mask() -> Any:
    """j <= i, as the CuTe DSL compiles it: it reads this source."""
    import cutlass.cute as cute

    @cute.jit  # type: ignore[untyped-decorator]
    def causal(batch: Any, head: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        return kv_idx <= q_idx

    return causal
