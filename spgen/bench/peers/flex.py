"""Compiled FlexAttention: its plan is the making of the BlockMask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spgen.bench.cases import Problem
from spgen.bench.peers import Contender, Unserved

_compiled: dict[Any, Callable[..., Tensor]] = {}  # of the mask function that was compiled last


def contender(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """FlexAttention on the same pairs."""
    if problem.flex is None:
        raise Unserved("no list of its blocks can say the pattern")
    example = problem.flex()
    attend, size = _kernel(example.mask_mod), min(*example.BLOCK_SIZE, 128)
    # by default its tiles do not fit shorter blocks
    options = {} if size == 128 or q.device.type == "cpu" else {"BLOCK_M": size, "BLOCK_N": size}
    grouped = problem.work.group > 1

    def run(block_mask: Any) -> Tensor:
        return attend(q, k, v, block_mask=block_mask, enable_gqa=grouped, kernel_options=options)

    return Contender(run, problem.flex)


def _kernel(mask_mod: Any) -> Callable[..., Tensor]:
    """torch.compile(flex_attention), made for these sizes.

    Each mask function is compiled anew, and torch gives up after some: it forgets the others when a new one comes.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if mask_mod not in _compiled:
        _compiled.clear()
        torch.compiler.reset()
        _compiled[mask_mod] = torch.compile(flex_attention, dynamic=False)
    return _compiled[mask_mod]
