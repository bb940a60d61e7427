"""What follows from a call's shapes and strides: the numbers behind a kernel's pointers, and the variant they allow."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from spgen.backends.extras import Extras
from spgen.backends.triton_compile import VECTOR


def table_sizes(tables: Sequence[Tensor]) -> list[int]:
    """Strides of the outer axes, 0 where there is one element; rows and columns."""
    values: list[int] = []
    for table in tables:
        batch, heads, rows, columns = table.shape
        step_b, step_h, step_r, _ = table.stride()
        values += (
            step_b if batch > 1 else 0, step_h if heads > 1 else 0, step_r if rows > 1 else 0, rows, columns
        )  # fmt: skip
    return values


def bias_steps(extras: Extras) -> list[int]:
    """Strides of the bias, but its last axis; 0 where there is one element."""
    if extras.bias is None:
        return []
    sizes, steps = extras.bias.shape[:-1], extras.bias.stride()[:-1]
    return [step if size > 1 else 0 for size, step in zip(sizes, steps, strict=True)]


def lengths_of(q: Tensor, k: Tensor, extras: Extras) -> list[int]:
    """q_len, k_len, key heads, query heads of a key head, and sequences of a packed batch."""
    sequences = [] if extras.cu_seqlens_q is None else [extras.cu_seqlens_q.shape[0] - 1]
    return [q.shape[2], k.shape[2], k.shape[1], q.shape[1] // max(k.shape[1], 1), *sequences]


def strides_of(*tensors: Tensor) -> list[int]:
    """Of all axes; 0, or 1 for the last axis, where there is one element."""
    values: list[int] = []
    for tensor in tensors:
        batch, heads, rows, channels = tensor.shape
        step_b, step_h, step_n, step_d = tensor.stride()
        values += (
            step_b if batch > 1 else 0, step_h if heads > 1 else 0, step_n if rows > 1 else 0,
            step_d if channels > 1 else 1,
        )  # fmt: skip
    return values


def is_aligned(strides: list[int], item: int) -> bool:
    """Whether last strides are 1 and all others multiples of 16 bytes."""
    steps = list(strides)
    last = steps.pop(11), steps.pop(7), steps.pop(3)
    return last == (1, 1, 1) and gcd(*steps) * item % VECTOR == 0


def is_wide(strides: list[int]) -> bool:
    """Whether a stride of rows does not fit into int32."""
    return any(abs(step) >= 2**31 for step in strides[2::4])


def index_type(value: int | Tensor | None) -> str:
    """Triton's type of an integer argument, or of a tensor's entries."""
    return "i64" if isinstance(value, Tensor) and value.dtype == torch.int64 else "i32"
