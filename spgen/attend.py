"""The attention operation: a pattern, then calls on tensors.

attend = sp.attention(sp.causal() & (sp.sink(64) | sp.window(1024)))
out = attend(q, k, v)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from spgen.data import check_data
from spgen.errors import DtypeError, PatternError, PlanError, UnsupportedError
from spgen.ops import attention as operator
from spgen.ops import is_plain
from spgen.patterns import Pattern

if TYPE_CHECKING:
    from typing import Literal

    from spgen.explain import Explanation


@dataclass(frozen=True)
class Plan:
    """The index tensors of a pattern for given lengths, on the device; reusable over steps and layers.

    `tables` are int32 [batch or 1, heads, rows, columns]; their meaning is that of the level-2 program, which
    `spgen explain --ir` prints. `key` is what the plan was made for: the pattern's text, the shapes of q and k, their
    dtype and device, a number given as q_offset, and whether q_offset and kv_lengths were tensors.
    """

    tables: list[Tensor]
    key: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Device memory that the tables take, in bytes."""
        return sum(table.nbytes for table in self.tables)


_KEY_FIELDS = (
    "pattern", "shape of q", "shape of k", "dtype", "device", "q_offset", "no q_offset tensor", "no kv_lengths"
)  # fmt: skip


def _refuse_plan(plan: Plan, wanted: tuple[Any, ...]) -> None:
    fields = zip(_KEY_FIELDS, plan.key, wanted, strict=True)
    name, made, asked = next(field for field in fields if field[1] != field[2])
    raise PlanError(
        f"plan: {name}", given=str(made), allowed=str(asked),
        remedy="make a plan with this call's arguments: attend.plan(q, k, …)",
    )  # fmt: skip


class Attention:
    """Attention over a pattern. Made by :func:`attention`; nothing is compiled before the first call."""

    def __init__(self, pattern: Pattern, scale: float | None, softcap: float | None, dense: str) -> None:
        self.pattern = pattern
        self.scale = scale
        self.softcap = softcap
        self.dense = dense
        self._text = repr(pattern)
        self._data = list(pattern.data)

    def __repr__(self) -> str:
        return f"attention({self._text})"

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, plan: Plan | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, q_offset: int | Tensor | None = None, kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None, bias: Tensor | None = None, return_lse: Literal[False] = False,
        check: bool = False,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, plan: Plan | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, q_offset: int | Tensor | None = None, kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None, bias: Tensor | None = None, return_lse: Literal[True],
        check: bool = False,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Plan | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None,
        bias: Tensor | None = None,
        return_lse: bool = False,
        check: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """softmax(scale * q k^T over the pattern's pairs) v.

        Shapes: q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv]; Hk divides Hq. Any strides; float32,
        bfloat16 or float16, added up in float32; the result [B, Hq, Lq, Dv] has q's dtype and layout. Rows without keys
        give 0. `q_offset` (an int, or an integer tensor [B] on the device) is the position of row 0, by default the
        keys of the sequence less Lq. `kv_lengths` (integers [B] on the device) says how many keys each sequence has.
        `plan` reuses index tensors made by :meth:`plan`. With `return_lse` also the log-sum-exp of each row's scores,
        float32 [B, Hq, Lq], natural logarithm, -inf for rows without keys. `check` reads the pattern's tensors and
        reports values out of range with their place (it waits for the device).

        Raises ShapeError, DtypeError, DeviceError, DataError, PlanError or UnsupportedError, naming the argument.
        """
        start, offsets = (q_offset, None) if isinstance(q_offset, int) else (None, q_offset)
        if plan is not None:
            wanted = (self._text, q.shape, k.shape, q.dtype, q.device, start, offsets is None, kv_lengths is None)
            if plan.key != wanted:
                _refuse_plan(plan, wanted)
        if check:
            check_data(
                self.pattern.node, self.pattern.data, q_len=q.shape[2], kv_len=k.shape[2], q_heads=q.shape[1],
                kv_heads=k.shape[1], batch=q.shape[0],
            )  # fmt: skip
        call: Any = operator if is_plain(q, k, v) else torch.ops.spgen.attention
        results: tuple[Tensor, Tensor] = call(
            q, k, v, self._data, [] if plan is None else plan.tables, self._text, cu_seqlens_q, cu_seqlens_k,
            offsets, start, kv_lengths, sink_logits, bias, self.scale, self.softcap, return_lse,
        )  # fmt: skip
        return results if return_lse else results[0]

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        q_offset: int | Tensor | None = None,
        kv_lengths: Tensor | None = None,
    ) -> Plan:
        """The index tensors for these lengths, made on the device without reading anything back.

        Shapes as in a call. The plan serves every call with the same shapes, dtype, offsets and lengths.
        """
        start, offsets = (q_offset, None) if isinstance(q_offset, int) else (None, q_offset)
        tables = torch.ops.spgen.plan(q, k, self._data, self._text, offsets, start, kv_lengths)
        key = (self._text, q.shape, k.shape, q.dtype, q.device, start, offsets is None, kv_lengths is None)
        return Plan(list(tables), key)

    def explain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | Tensor | None = None,
        kv_lengths: Tensor | None = None,
    ) -> Explanation:
        """Pattern, density, segments, bytes, FLOPs, predicted time and the chosen kernel for a call; printable."""
        from spgen.explain import explain

        return explain(self, q, k, v, q_offset=q_offset, kv_lengths=kv_lengths)


def attention(
    pattern: Pattern, scale: float | None = None, softcap: float | None = None, dense: str = "never"
) -> Attention:
    """The attention operation over `pattern`.

    `scale` multiplies the scores (default 1/sqrt(D)). Nothing is compiled yet. Raises DtypeError when `pattern` is no
    pattern, PatternError for a scale that is no finite number.
    """
    if not isinstance(pattern, Pattern):
        raise DtypeError("pattern", given=type(pattern).__name__, allowed="a pattern such as sp.causal()")
    if scale is not None and not math.isfinite(scale):
        raise PatternError("scale", given=scale, allowed="a finite number, or None for 1/sqrt(D)")
    if softcap is not None:
        raise UnsupportedError("softcap", given=softcap, allowed="None", remedy="no kernel caps its scores yet")
    if dense != "never":
        raise UnsupportedError("dense", given=dense, allowed='"never"', remedy="no dense dispatch is built yet")
    return Attention(pattern, scale, softcap, dense)
