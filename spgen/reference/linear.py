"""Products with sparse weights, densely and in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """activation(x (mask * weight)^T + bias) in `dtype`: x [..., K], weight and mask [N, K], bias [N] -> [..., N].

    Weights outside the mask never contribute, whatever they hold.
    """
    kept = weight.to(dtype).masked_fill(~mask.to(weight.device), 0)
    y = x.to(dtype) @ kept.T
    return ACTIVATIONS[activation](y if bias is None else y + bias.to(dtype))


def mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, masks: tuple[Tensor, Tensor, Tensor], activation: str = "silu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """(activation(x gate^T) * (x up^T)) down^T over masked weights: x [..., D], gate and up [F, D], down [D, F]."""
    hidden = linear(x, gate, masks[0], None, activation, dtype) * linear(x, up, masks[1], dtype=dtype)
    return linear(hidden, down, masks[2], dtype=dtype)
