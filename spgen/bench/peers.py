"""The peers: what else computes the same attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spgen.autotune.measure import Call
from spgen.bench.blocks import BlockList


def compiled_flex() -> Callable[..., Tensor]:
    """torch.compile(flex_attention), made for these sizes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(listed: BlockList, q: Tensor, k: Tensor, v: Tensor, compiled: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """FlexAttention on the same blocks."""
    block_mask = listed.flex_mask()
    grouped = q.shape[1] != k.shape[1]
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense causal attention, by whatever torch chooses."""
    grouped = q.shape[1] != k.shape[1]
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def sdpa_mask(listed: BlockList, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention with the pattern's N x N mask."""
    mask = listed.mask(torch.arange(q.shape[2], device=q.device))
    grouped = q.shape[1] != k.shape[1]
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def cudnn_causal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """cuDNN's dense causal attention, through SDPA."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = q.shape[1] != k.shape[1]

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return call


def available(make: Callable[[], Call], name: str, missing: dict[str, str]) -> Call | None:
    """What `make` returns, or None, with the reason noted in `missing`, where this machine cannot run it."""
    try:
        made = make()
        made()
    except Exception as fault:  # a peer may fail in any way; that is its result
        missing[name] = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"[:200]
        return None
    return made
