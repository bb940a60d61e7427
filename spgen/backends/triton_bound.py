"""What serves all calls of an attention kernel with operands of the same shapes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spgen.backends.extras import NO_EXTRAS, Extras, Operands
from spgen.backends.triton_compile import VECTOR
from spgen.backends.triton_launch import Call, float_bits

SMALLEST_SCALE = 1e-30  # stands for 0, which would turn a masked score of -inf into NaN


class Launch:
    """Launches through the driver, asynchronous, on the current stream of the tensors' device.

    `prepare` makes the launch for operands, told whether their addresses are multiples of 16 bytes.
    """

    def __init__(self, prepare: Callable[[Operands, bool], Call]) -> None:
        self._prepare = prepare
        self._calls: dict[tuple[bool, bool], Call] = {}  # by whether addresses are aligned, and the scale negative

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """Write `out` and `lse`; see Operands."""
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        kind = (q_at | k_at | v_at | out_at) % VECTOR == 0, scale < 0
        call = self._calls.get(kind)
        if call is None:
            operands = Operands(q, k, v, out, lse, tables, q_offset, kv_lengths, scale, extras)
            call = self._calls[kind] = self._prepare(operands, kind[0])
        changing = [q_at, k_at, v_at, out_at]  # the order is that of the kernels' parameters
        if lse is not None:
            changing.append(lse.data_ptr())
        if q_offset is not None:
            changing.append(q_offset.data_ptr() if isinstance(q_offset, Tensor) else int(q_offset) & 0xFFFFFFFF)
        if kv_lengths is not None:
            changing.append(kv_lengths.data_ptr())
        if extras.cu_seqlens_q is not None and extras.cu_seqlens_k is not None:
            changing += (extras.cu_seqlens_q.data_ptr(), extras.cu_seqlens_k.data_ptr())
        for table in tables:
            changing.append(table.data_ptr())
        changing.append(_scale_bits(scale))
        if extras is not NO_EXTRAS:
            if extras.softcap is not None:
                changing.append(float_bits(extras.softcap))
            if extras.sink_logits is not None:
                changing.append(extras.sink_logits.data_ptr())
            if extras.bias is not None:
                changing.append(extras.bias.data_ptr())
            changing += [scales.data_ptr() for scales in extras.scales]
        call(changing)


class SplitLaunch:
    """A call whose keys are dealt to several programs: `attend` writes parts into a workspace, `combine` adds them up.

    `numbers` are those of the workspace for each row and head, `gaps` whether some rows get no parts.
    """

    def __init__(
        self, attend: Callable[..., None], combine: Callable[[Tensor], Callable[..., None]], numbers: int, splits: int,
        gaps: bool,
    ) -> None:  # fmt: skip
        self._attend, self._combine = attend, combine
        self._numbers, self._splits, self._gaps = numbers, splits, gaps
        self._combined: Callable[..., None] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tables: Sequence[Tensor],
        q_offset: int | Tensor | None, kv_lengths: Tensor | None, scale: float, extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """Write `out` and `lse`; see Operands."""
        batch, heads, rows, _ = q.shape
        parts = torch.empty(batch * heads * rows * self._numbers, dtype=torch.float32, device=q.device)
        if self._gaps:  # by this are rows known that get no parts
            parts[-batch * heads * rows * self._splits :].fill_(torch.inf)
        own = extras if extras.sink_logits is None else extras._replace(sink_logits=None)
        self._attend(q, k, v, parts, None, tables, q_offset, kv_lengths, scale, own)
        if self._combined is None:
            self._combined = self._combine(out)
        self._combined(parts, out, lse, extras.sink_logits)


@lru_cache(maxsize=256)
def _scale_bits(scale: float) -> int:
    return float_bits(abs(scale) or SMALLEST_SCALE)
