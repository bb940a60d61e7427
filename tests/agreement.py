"""Comparing a call with the oracle: output and log-sum-exp, exact zeros and -inf for rows without keys."""

from __future__ import annotations

from typing import Any

import torch

import spgen as sp
from spgen import reference


def assert_agrees(
    pattern: sp.Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, tolerance: float, **options: Any
) -> None:
    """Raises unless `sp.attention(pattern)(q, k, v)` is the oracle's result within `tolerance`.

    `options` are those of the call, and `softcap`.
    """
    softcap = options.pop("softcap", None)
    out, lse = sp.attention(pattern, softcap=softcap)(q, k, v, return_lse=True, **options)
    wanted, wanted_lse = reference.attention(q, k, v, pattern, softcap=softcap, return_lse=True, **options)
    assert out.shape == wanted.shape
    assert out.dtype == q.dtype
    assert lse.shape == wanted_lse.shape
    empty = wanted_lse.isneginf()
    rows = empty if q.dim() == 4 else empty.transpose(0, 1)
    assert (out[rows] == 0).all()
    assert torch.equal(lse.isneginf().cpu(), empty.cpu())
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double()[~empty], wanted_lse[~empty], atol=tolerance, rtol=tolerance)
