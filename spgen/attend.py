"""The attention operation: a pattern, then calls on tensors.

attend = sp.attention(sp.causal() & (sp.sink(64) | sp.window(1024)))
out = attend(q, k, v)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch import Tensor

from spgen.arguments import Arguments
from spgen.data import check_boundaries, check_data
from spgen.errors import DtypeError, PatternError, ShapeError, UnsupportedError
from spgen.float8 import Float8
from spgen.ops import attention as operator
from spgen.ops import is_plain
from spgen.ops import plan as make_plan
from spgen.patterns import Pattern
from spgen.plan import Plan, PlanKey, refuse

if TYPE_CHECKING:
    from typing import Literal

    from spgen.explain import Explanation


Operand: TypeAlias = "Tensor | Float8"


@dataclass(frozen=True)
class Alibi:
    """A bias that falls with distance: -slope * |i - j| (Press et al. 2022). Made by :func:`alibi`."""

    slopes: Tensor


def alibi(slopes: Tensor) -> Alibi:
    """The bias -slope * |i - j| for `attend(…, bias=…)`; `slopes` [Hq] or [B, Hq], one for each query head."""
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        given = str(slopes.dtype) if isinstance(slopes, Tensor) else type(slopes).__name__
        raise DtypeError("alibi: slopes", given=given, allowed="a floating-point tensor")
    if slopes.dim() not in (1, 2):
        raise ShapeError("alibi: slopes", given=f"shape {list(slopes.shape)}", allowed="[Hq] or [B, Hq]")
    return Alibi(slopes)


def _bias(bias: Tensor | Alibi) -> Tensor:
    """As the operator takes it: slopes [1 or B, Hq], or a number per key [1 or B, heads, keys]."""
    if isinstance(bias, Alibi):
        return bias.slopes[(None,) * (2 - bias.slopes.dim())]
    if not isinstance(bias, Tensor):
        raise DtypeError("bias", given=type(bias).__name__, allowed="a tensor, or sp.alibi(slopes)")
    return bias[(None,) * max(0, 3 - bias.dim())]


def _float8(q: Operand, k: Operand, v: Operand) -> tuple[Tensor, Tensor, Tensor, list[Tensor] | None]:
    """Values of float8 with the shapes of what they stand for, and scales; tensors as they are, and None."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        return q, k, v, None
    if isinstance(q, Float8) and isinstance(k, Float8) and isinstance(v, Float8):
        return q.tensor, k.tensor, v.tensor, [q.scales, k.scales, v.scales]
    name, other = ("k", k) if isinstance(k, Float8) != isinstance(q, Float8) else ("v", v)
    raise DtypeError(
        name, given=type(other).__name__, allowed=f"{type(q).__name__}, as q",
        remedy="pass q, k and v as sp.quantize(q, k, v) returned them, or all as tensors",
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
        self._shapes = tuple([tensor.shape for tensor in self._data])

    def __repr__(self) -> str:
        return f"attention({self._text})"

    @overload
    def __call__(
        self, q: Operand, k: Operand, v: Operand, *, plan: Plan | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, q_offset: int | Tensor | None = None, kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None, bias: Tensor | Alibi | None = None, return_lse: Literal[False] = False,
        check: bool = False,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, q: Operand, k: Operand, v: Operand, *, plan: Plan | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, q_offset: int | Tensor | None = None, kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None, bias: Tensor | Alibi | None = None, return_lse: Literal[True],
        check: bool = False,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def __call__(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        *,
        plan: Plan | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None,
        bias: Tensor | Alibi | None = None,
        return_lse: bool = False,
        check: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """softmax(scale * q k^T over the pattern's pairs) v.

        Shapes: q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv]; Hk divides Hq. Any strides; float32,
        bfloat16 or float16, added up in float32; the result [B, Hq, Lq, Dv] has q's dtype and layout. Rows without keys
        give 0. `q_offset` (an int, or an integer tensor [B] on the device) is the position of row 0, by default the
        keys of the sequence less Lq. `kv_lengths` (integers [B] on the device) says how many keys each sequence has.

        On Hopper GPUs all three may be what `sp.quantize(q, k, v)` returned, float8 with scales: the result is bfloat16
        then. Not in packed batches, and not over keys that lie apart.

        A packed batch: q [T, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv] with `cu_seqlens_q` and `cu_seqlens_k`, integers
        [N + 1] on the device: where each of N sequences starts, and the end of the last. Positions, data and
        `q_offset`, `kv_lengths` (now [N]) are those of the padded batch of N sequences; data by row or key are as
        long as the longest, and an order of rows ends where its sequence ends. Rows of no sequence give 0.

        `sink_logits` [Hq] adds exp(sink) to each denominator (Xiao et al. 2023; gpt-oss). `bias` is added to the
        scores: a number per key, [Lk], [H, Lk] or [B, H, Lk] with H one of 1, Hk, Hq (in a packed batch Tk keys), or
        `sp.alibi(slopes)`; -inf removes a key.

        `plan` reuses index tensors made by :meth:`plan`. With `return_lse` also the logarithm of each row's
        denominator, float32 [B, Hq, Lq] ([Hq, T] in a packed batch), natural, -inf for rows without keys (the sink's
        logit if there is one). `check` reads the pattern's tensors and the boundaries and reports values out of range
        with their place (it waits for the device).

        Raises ShapeError, DtypeError, DeviceError, DataError, PlanError or UnsupportedError, naming the argument.
        """
        q, k, v, scales = _float8(q, k, v)
        start, offsets = (q_offset, None) if isinstance(q_offset, int) else (None, q_offset)
        if plan is not None:
            wanted = self._key(q, k, cu_seqlens_q, start, offsets, kv_lengths)
            if plan.key != wanted:
                refuse(plan, wanted)
        if check:
            self._check_data(q, k, cu_seqlens_q, cu_seqlens_k)
        call: Any = operator if is_plain(q, k, v) else torch.ops.spgen.attention
        results: tuple[Tensor, Tensor] = call(
            q, k, v, self._data, [] if plan is None else plan.tables, self._text, cu_seqlens_q, cu_seqlens_k,
            offsets, start, kv_lengths, sink_logits, None if bias is None else _bias(bias), self.scale, self.softcap,
            return_lse, self.dense == "auto", scales,
        )  # fmt: skip
        return results if return_lse else results[0]

    def _key(
        self, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, start: int | None, offsets: Tensor | None,
        kv_lengths: Tensor | None,
    ) -> PlanKey:  # fmt: skip
        """What a plan is made for."""
        sequences = None if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        return PlanKey(
            self._text, self._shapes, q.shape, k.shape, sequences, q.dtype, q.device, start, offsets is None,
            kv_lengths is None,
        )  # fmt: skip

    def _check_data(self, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            sizes = {"q_len": q.shape[2], "kv_len": k.shape[2], "batch": q.shape[0]}
        else:
            sizes = {
                "q_len": check_boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
                "kv_len": check_boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
                "batch": len(cu_seqlens_q) - 1,
            }
        check_data(self.pattern.node, self.pattern.data, q_heads=q.shape[1], kv_heads=k.shape[1], **sizes)

    def plan(
        self,
        q: Operand,
        k: Operand,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_lengths: Tensor | None = None,
        check: bool = False,
    ) -> Plan:
        """The index tensors for these lengths, made on the device without reading anything back.

        Arguments as in a call. The plan serves every call with the same shapes, dtype, offsets and lengths.
        """
        q, k, _, _ = _float8(q, k, k)
        if check:
            self._check_data(q, k, cu_seqlens_q, cu_seqlens_k)
        start, offsets = (q_offset, None) if isinstance(q_offset, int) else (None, q_offset)
        make: Any = make_plan if is_plain(q, k, k) else torch.ops.spgen.plan
        tables = make(q, k, self._data, self._text, cu_seqlens_q, cu_seqlens_k, offsets, start, kv_lengths)
        return Plan(list(tables), self._key(q, k, cu_seqlens_q, start, offsets, kv_lengths))

    def explain(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_offset: int | Tensor | None = None,
        kv_lengths: Tensor | None = None,
        sink_logits: Tensor | None = None,
        bias: Tensor | Alibi | None = None,
    ) -> Explanation:
        """Pattern, density, segments, bytes, FLOPs, predicted time and the chosen kernel for a call; printable."""
        from spgen.explain import explain

        q, k, v, scales = _float8(q, k, v)
        added = None if bias is None else _bias(bias)
        arguments = Arguments(
            q, k, v, self._data, self._text, cu_seqlens_q, cu_seqlens_k, q_offset, kv_lengths, sink_logits, added,
            self.softcap, scales or (),
        )  # fmt: skip
        return explain(self, arguments)


def attention(
    pattern: Pattern, scale: float | None = None, softcap: float | None = None, dense: str = "never"
) -> Attention:
    """The attention operation over `pattern`.

    `scale` multiplies the scores (default 1/sqrt(D)); `softcap` bounds them smoothly, softcap * tanh(score / softcap)
    (Gemma 2). Nothing is compiled yet.

    `dense="auto"`: where skipping does not pay, torch's dense attention runs instead, and what data select (lists and
    masks of blocks, columns, diagonals, top-k) is ignored: the call then attends to all pairs, or all causal ones.
    Closed forms, documents and permutations are always kept. Shapes decide, by the predicted break-even; the log
    (SPGEN_LOG=info) and :meth:`Attention.explain` say so. By default, "never", the pattern is the definition.

    Raises DtypeError when `pattern` is no pattern, PatternError for a scale that is
    no finite number or a softcap that is not above 0.
    """
    if not isinstance(pattern, Pattern):
        raise DtypeError("pattern", given=type(pattern).__name__, allowed="a pattern such as sp.causal()")
    if scale is not None and not math.isfinite(scale):
        raise PatternError("scale", given=scale, allowed="a finite number, or None for 1/sqrt(D)")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise PatternError("softcap", given=softcap, allowed="a finite number above 0, or None")
    if dense not in ("never", "auto"):
        raise UnsupportedError("dense", given=repr(dense), allowed='"never" or "auto"')
    return Attention(pattern, scale, softcap, dense)
