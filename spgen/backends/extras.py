"""What a call may bring besides its tensors, checked and brought into one form: the last argument of every kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Extras(NamedTuple):
    """Arguments that most calls leave out; each is there exactly if the kernel's attribute says so.

    `cu_seqlens_q` and `cu_seqlens_k`: int32 or int64 [N + 1], contiguous. `softcap`: above 0. `sink_logits`: float32
    [Hq], contiguous. `bias`: float32, last stride 1, strides 0 where shared: "key" [B or 1, Hk, group, Lk] (1 and Tk in
    a packed batch), "alibi" [B or 1, Hq] slopes.
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None


NO_EXTRAS = Extras()
