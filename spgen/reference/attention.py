"""Attention over the pairs of a mask, densely and in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spgen.reference.mask import check_heads, mask

if TYPE_CHECKING:
    from spgen.attend import Alibi
    from spgen.patterns import Pattern


@dataclass(frozen=True)
class _Scores:
    """How a score becomes a weight, and in which type."""

    scale: float | None
    softcap: float | None
    sink_logits: Tensor | None
    dtype: torch.dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | Alibi | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Attention over the pairs of a pattern, densely and in `dtype`.

    q [B, Hq, Lq, D], k [B, Hk, Lk, D] and v [B, Hk, Lk, Dv]; `pattern` may be a bool mask that broadcasts to
    [B, Hq, Lq, Lk], which must then account for `kv_lengths` itself. `scale` defaults to 1/sqrt(D). With `cu_seqlens_q`
    and `cu_seqlens_k` the batch is packed, q [T, Hq, D] and so on, and a mask is that of the padded batch.
    Returns the output [B, Hq, Lq, Dv] in `dtype`, and with `return_lse` the natural logarithm [B, Hq, Lq] ([Hq, T] if
    packed) of the denominators, to which `sink_logits` [Hq] contribute. A row without pairs gives 0 and -inf (or its
    sink); keys outside the pattern never contribute, whatever they hold. `softcap`, then `bias`, act on scaled scores.
    """
    scores = _Scores(scale, softcap, sink_logits, dtype)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        out, lse = _packed(q, k, v, pattern, cu, q_offset, kv_lengths, bias, scores)
        return (out, lse) if return_lse else out
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    check_heads(q_heads, kv_heads)
    if isinstance(pattern, Tensor):
        wanted = pattern.expand(batch, q_heads, q_len, kv_len)
    else:
        wanted = mask(
            pattern, q_len, kv_len, q_heads=q_heads, kv_heads=kv_heads, batch=batch, q_offset=q_offset,
            kv_lengths=kv_lengths, device=q.device,
        )  # fmt: skip
    lengths = torch.full((batch,), kv_len, device=q.device) if kv_lengths is None else kv_lengths.clamp(0, kv_len)
    offsets = lengths - q_len if q_offset is None else torch.as_tensor(q_offset, device=q.device).expand(batch)
    out, lse = _attention(q, k, v, wanted, _added(bias, offsets, q_heads, kv_heads, q_len, kv_len), scores)
    return (out, lse) if return_lse else out


def _added(
    bias: Tensor | Alibi | None, offsets: Tensor, q_heads: int, kv_heads: int, q_len: int, kv_len: int
) -> Tensor | None:
    """What is added to the scores, [B or 1, Hq, Lq or 1, Lk]."""
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        bias = bias.double()[(None,) * (3 - bias.dim())]
        repeat = {1: q_heads, kv_heads: q_heads // kv_heads, q_heads: 1}[bias.shape[1]]
        return bias.repeat_interleave(repeat, 1)[:, :, None]
    i = torch.arange(q_len, device=offsets.device) + offsets[:, None]
    distance = (i[:, None, :, None] - torch.arange(kv_len, device=offsets.device)).abs()
    slopes = bias.slopes.double()
    return -slopes[(None,) * (2 - slopes.dim())][:, :, None, None] * distance


def _attention(
    q: Tensor, k: Tensor, v: Tensor, wanted: Tensor, added: Tensor | None, how: _Scores
) -> tuple[Tensor, Tensor]:
    q_heads, kv_heads = q.shape[1], k.shape[1]
    keys, values = (x.to(how.dtype).repeat_interleave(q_heads // kv_heads, dim=1) for x in (k, v))
    scores = q.to(how.dtype) @ keys.transpose(-1, -2) * (1 / math.sqrt(q.shape[3]) if how.scale is None else how.scale)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if added is not None:
        scores = scores + added.to(how.dtype)
    scores = scores.masked_fill(~wanted, -math.inf)
    denominators = scores
    if how.sink_logits is not None:
        sinks = how.sink_logits.to(how.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        denominators = torch.cat([scores, sinks], -1)
    nothing = scores.new_full(scores.shape[:-1], -math.inf)
    lse = denominators.logsumexp(-1) if denominators.shape[-1] else nothing
    weights = torch.where(wanted & (scores != -math.inf), (scores - lse[..., None]).exp(), 0)
    return _weighted(weights, values, wanted), lse


def _weighted(weights: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """`weights @ values` in which a weight outside the mask takes no part, not even as 0 * NaN."""
    if bool(values.isfinite().all()):
        return weights @ values
    rows = [
        torch.where(wanted[:, :, r, :, None], weights[:, :, r, :, None] * values, 0).sum(-2)
        for r in range(weights.shape[2])
    ]
    return torch.stack(rows, 2) if rows else weights @ values


def _packed(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | Tensor, cu: tuple[list[int], list[int]],
    q_offset: int | Tensor | None, kv_lengths: Tensor | None, bias: Tensor | Alibi | None, how: _Scores,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence after the other, over the mask of the padded batch."""
    rows, keys = ([b - a for a, b in itertools.pairwise(bounds)] for bounds in cu)
    batch, q_heads, kv_heads = len(rows), q.shape[1], k.shape[1]
    if kv_lengths is not None:
        keys = [min(max(int(length), 0), n) for length, n in zip(kv_lengths, keys, strict=True)]
    lengths, counts = torch.tensor(keys), torch.tensor(rows)
    offsets = lengths - counts if q_offset is None else torch.as_tensor(q_offset).cpu().expand(batch)
    if isinstance(pattern, Tensor):
        wanted = pattern
    else:
        longest = max(b - a for a, b in itertools.pairwise(cu[1]))
        wanted = mask(
            pattern, max(rows), longest, q_heads=q_heads, kv_heads=kv_heads, batch=batch, q_offset=offsets,
            q_lengths=counts, kv_lengths=lengths, device=q.device,
        )  # fmt: skip
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=how.dtype, device=q.device)
    lse = torch.full((q_heads, q.shape[0]), -math.inf, dtype=how.dtype, device=q.device)
    if how.sink_logits is not None:
        lse[:] = how.sink_logits.to(how.dtype)[:, None]
    for b in range(batch):
        own, theirs = slice(cu[0][b], cu[0][b + 1]), slice(cu[1][b], cu[1][b] + keys[b])
        offset = offsets[b : b + 1].to(q.device)
        added = _added(_of_sequence(bias, b, theirs), offset, q_heads, kv_heads, rows[b], keys[b])
        here, there, values = (x.transpose(0, 1)[None] for x in (q[own], k[theirs], v[theirs]))
        found, sums = _attention(here, there, values, wanted[b : b + 1, :, : rows[b], : keys[b]], added, how)
        out[own], lse[:, own] = found[0].transpose(0, 1), sums[0]
    return out, lse


def _of_sequence(bias: Tensor | Alibi | None, b: int, keys: slice) -> Tensor | Alibi | None:
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        return bias[..., keys]
    slopes = bias.slopes
    return type(bias)(slopes[b % len(slopes)] if slopes.dim() == 2 else slopes)
