"""Dense attention by torch's scaled_dot_product_attention, over all causal pairs or with the pattern's mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spgen.bench.cases import Problem
from spgen.bench.peers import CAUSAL, Contender, Unserved


def chosen(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """All causal pairs, by the backend that torch chooses."""
    grouped = problem.work.group > 1
    return Contender(
        lambda plan: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), pairs=CAUSAL
    )


def masked(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """The pattern's pairs, through a mask of rows x keys that is given."""
    mask, grouped = problem.whole_mask(), problem.work.group > 1
    return Contender(lambda plan: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped))


def cudnn(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """All causal pairs, by cuDNN's kernel."""
    return _by("CUDNN_ATTENTION", problem, q, k, v)


def flash(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """All causal pairs, by the FlashAttention-2 kernel that comes with torch."""
    return _by("FLASH_ATTENTION", problem, q, k, v)


def _by(backend: str, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.device.type == "cpu":
        raise Unserved("its kernel is for GPUs")
    only, grouped = getattr(SDPBackend, backend), problem.work.group > 1

    def run(plan: Any) -> Tensor:
        with sdpa_kernel(only):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return Contender(run, pairs=CAUSAL)
