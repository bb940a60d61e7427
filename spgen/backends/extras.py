"""What kernels are called with: the operands, and what most calls leave out, checked and brought into one form."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Extras(NamedTuple):
    """Arguments that most calls leave out; each is there exactly if the kernel's attribute says so.

    `cu_seqlens_q` and `cu_seqlens_k`: int32 or int64 [N + 1], contiguous. `softcap`: above 0. `sink_logits`: float32
    [Hq], contiguous. `bias`: float32, last stride 1, strides 0 where shared: "key" [B or 1, Hk, group, Lk] (1 and Tk in
    a packed batch), "alibi" [B or 1, Hq] slopes. `scales` of float8 q, k and v: float32 [B, Hq, Lq], [B, Hk] and
    [B, Hk], contiguous.
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    scales: Sequence[Tensor] = ()


NO_EXTRAS = Extras()


class Operands(NamedTuple):
    """The arguments of every kernel, in order.

    q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv]; `out` [B, Hq, Lq, Dv] and `lse` float32 [B, Hq, Lq] (None if
    the kernel has none) are written. In a packed batch B is 1 and the lengths are those of all sequences together.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    tables: Sequence[Tensor]
    q_offset: int | Tensor | None
    kv_lengths: Tensor | None
    scale: float
    extras: Extras = NO_EXTRAS
