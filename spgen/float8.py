"""Float8 tensors with their scales, as attention takes them on Hopper GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Float8:
    """One of q, k and v as float8 e4m3 values with float32 scales, as :func:`spgen.quantize` makes them.

    Each value stands for itself times its scale. Of q: values [B, Hq, Lq, D], a scale for each row, [B, Hq, Lq]. Of k:
    values [B, Hk, Lk, D], a scale for each head, [B, Hk]. Of v: scales [B, Hk], and values [B, Hk, Dv, keys] with keys
    innermost, padded by zeros to a multiple of 16 and in an order of their own among sixteen, as matrix products of
    float8 take them; `length` is Lk then, and None for q and k.
    """

    values: Tensor
    scales: Tensor
    length: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The values with the shape of the tensor that they stand for; a view."""
        if self.length is None:
            return self.values
        return self.values.transpose(-1, -2)[:, :, : self.length]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that this stands for, [B, H, L, D], contiguous."""
        if self.length is None:
            scales = self.scales[(..., *(None,) * (4 - self.scales.dim()))]
            return (self.values.float() * scales).to(dtype)
        from spgen.templates.triton.quantize import KEYS, key_at

        columns = torch.arange(self.values.shape[-1], device=self.values.device).reshape(-1, KEYS)
        keys = columns[:, [key_at(place) for place in range(KEYS)]].flatten()
        found = torch.empty(self.values.shape, dtype=torch.float32, device=self.values.device)
        found[..., keys] = self.values.float() * self.scales[:, :, None, None]
        return found[..., : self.length].transpose(-1, -2).to(dtype).contiguous()
