"""Layers that compute the neurons, or read the input channels, that a call's own values make active.

mlp = sp.NeuronMLP(w_gate, w_up, w_down, sp.Activity(0.1, positive=False))    # CATS
y = mlp(x)

scores [M, F] -> which neurons each list of rows computes -> hidden values of those -> their rows of the down weight
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spgen.errors import DtypeError, PatternError, ShapeError
from spgen.weights.linear import check_activation, check_matrix
from spgen.weights.neuron_ops import channels, dense_channels, dense_neurons, flags_of, neurons
from spgen.weights.ops import activated, rows_of


@dataclass(frozen=True)
class Activity:
    """Which neurons are active: scores above `threshold`, or with `positive=False` no smaller in magnitude.

    With `top_k` the k largest scores of each row (magnitudes, with `positive=False`). `rows` rows of x share a list,
    which holds what is active in any of them: 1, a token each; a chunk; None, the whole batch.
    """

    threshold: float = 0.0
    top_k: int | None = None
    positive: bool = True
    rows: int | None = 1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise PatternError("Activity: threshold", given=self.threshold, allowed="a number of at least 0")
        for name, value in (("top_k", self.top_k), ("rows", self.rows)):
            if value is not None and value < 1:
                raise PatternError(f"Activity: {name}", given=value, allowed="at least 1, or None")

    def ranked(self, scores: Tensor) -> tuple[Tensor, float, bool]:
        """Scores, a threshold and whether they must be above it; of `top_k`, marks."""
        if self.top_k is None:
            return scores, self.threshold, self.positive
        ranks = scores if self.positive else scores.abs()
        largest = ranks.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(scores).scatter_(-1, largest, 1.0), 0.5, True

    def list_size(self, scores: Tensor) -> int:
        """How many rows of a call share a list."""
        return max(1, len(scores) if self.rows is None else self.rows)


class NeuronMLP(nn.Module):
    """y = h down^T + bias over active neurons, h = activation(x gate^T) * (x up^T).

    `w_gate` and `w_up` [F, D], `w_down` [D, F], `hidden_bias` [F], `bias` [D]. Without `w_gate` (None) h is
    activation(x up^T + hidden_bias). What is active is decided from scores: those of `router`, a module that maps
    x [M, D] to [M, F / block], one score for `block` consecutive neurons; without a router activation(x gate^T), which
    is then computed for all neurons. `up_activation` is that of x up^T beside a gate ("relu": dReLU). `weighted`:
    hidden values are multiplied by the router's scores (mixtures of experts).

    Where gradients are wanted, and on the CPU where there are many lists, all neurons are computed and those that are
    not active left out of the sum: the result is the same. On GPUs lists are made, and used, on the device.

    Raises ShapeError naming the router if it gives another number of scores; DtypeError, ShapeError, PatternError or
    UnsupportedError for other arguments.
    """

    def __init__(
        self, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activity: Activity, *, activation: str = "silu",
        up_activation: str = "none", router: Callable[[Tensor], Tensor] | None = None, block: int = 1,
        weighted: bool = False, hidden_bias: Tensor | None = None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_mlp(w_gate, w_up, w_down, block)
        check_activation(activation)
        check_activation(up_activation)
        if not isinstance(activity, Activity):
            raise DtypeError("activity", given=type(activity).__name__, allowed="sp.Activity(…)")
        if w_gate is None and router is None:
            raise PatternError("router", given="neither a router nor w_gate", allowed="one of them, to score neurons")
        if router is None and (weighted or block > 1 or hidden_bias is not None):
            given = "weighted, block or hidden_bias without a router"
            raise PatternError("router", given=given, allowed="a router, whose scores they are about")
        if router is not None and up_activation != "none":
            raise PatternError("up_activation", given=up_activation, allowed="'none' with a router")
        self.activity, self.activation, self.up_activation = activity, activation, up_activation
        self.router, self.block, self.weighted = router, block, weighted
        self.gate = _parameter(w_gate)
        self.up = nn.Parameter(w_up.detach().clone())
        self.down = nn.Parameter(w_down.detach().T.contiguous())  # [F, D], neuron by neuron
        self.hidden_bias, self.bias = map(_parameter, (hidden_bias, bias))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], in x's dtype, which is the weights'."""
        if x.shape[-1] != self.up.shape[1]:
            raise ShapeError("x", given=f"shape {list(x.shape)}", allowed=f"[..., {self.up.shape[1]}]")
        rows = rows_of(x)
        scores = self._scores(rows)
        alone = self.router is None
        factor = scores if alone or self.weighted else None
        gate, activation = (None, self.up_activation) if alone else (self.gate, self.activation)
        marks, threshold, positive = self.activity.ranked(scores.detach())
        call = dense_neurons if _differentiates(x, self) else neurons
        y: Tensor = call(
            rows, marks, factor, gate, self.up, self.down, self.hidden_bias, self.bias, activation, threshold, positive,
            self.activity.list_size(scores),
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def active(self, x: Tensor) -> Tensor:
        """Which neurons are computed for x [..., D], bool [..., F]."""
        scores = self._scores(rows_of(x))
        flags = flags_of(*self.activity.ranked(scores), self.activity.list_size(scores))
        return flags.view(*x.shape[:-1], len(self.up))

    def _scores(self, x: Tensor) -> Tensor:
        """One for each neuron [M, F]."""
        if self.router is not None:
            return self._routed(x)
        assert self.gate is not None
        return activated(x @ self.gate.T, self.activation)

    def _routed(self, x: Tensor) -> Tensor:
        assert self.router is not None
        scores, width = self.router(x), len(self.up) // self.block
        if scores.shape != (len(x), width):
            raise ShapeError(
                "router", given=f"scores {list(scores.shape)}", allowed=f"[{len(x)}, {width}]",
                remedy=f"give it {width} outputs: {len(self.up)} neurons in blocks of {self.block}",
            )  # fmt: skip
        return scores.to(x.dtype).repeat_interleave(self.block, 1)


class ChannelLinear(nn.Module):
    """y = (x * m) W^T + bias, m the input channels that are active: only their columns of W are read.

    `weight` [N, K], `bias` [N]. Scores are x, times `scale` [K] if given. `low_rank` (U [N, r], V [r, K]) adds
    ((x * (1 - m)) V^T) U^T, for what is left out (R-Sparse). Gradients pass straight through m (Q-Sparse).

    Raises ShapeError, DtypeError or PatternError, naming the argument.
    """

    def __init__(
        self, weight: Tensor, activity: Activity, bias: Tensor | None = None, *, scale: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_matrix("weight", weight)
        if not isinstance(activity, Activity):
            raise DtypeError("activity", given=type(activity).__name__, allowed="sp.Activity(…)")
        n, k = weight.shape
        for name, given, allowed in (("bias", bias, (n,)), ("scale", scale, (k,))):
            if given is not None and given.shape != allowed:
                raise ShapeError(name, given=f"shape {list(given.shape)}", allowed=f"{list(allowed)}")
        if low_rank is not None:
            one, other = low_rank
            if one.dim() != 2 or other.shape != (one.shape[1], k) or len(one) != n:
                given_shapes = f"shapes {list(one.shape)} and {list(other.shape)}"
                raise ShapeError("low_rank", given=given_shapes, allowed=f"[{n}, r] and [r, {k}]")
        self.activity = activity
        self.weight = nn.Parameter(weight.detach().T.contiguous())  # [K, N], channel by channel
        self.bias = _parameter(bias)
        self.register_buffer("scale", scale)
        self.outer, self.inner = map(_parameter, low_rank or (None, None))

    scale: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's dtype, which is the weight's."""
        if x.shape[-1] != len(self.weight):
            raise ShapeError("x", given=f"shape {list(x.shape)}", allowed=f"[..., {len(self.weight)}]")
        rows = rows_of(x)
        scores = rows.detach() if self.scale is None else rows.detach() * self.scale.to(x.dtype)
        marks, threshold, positive = self.activity.ranked(scores)
        call = dense_channels if _differentiates(x, self) else channels
        shared = self.activity.list_size(scores)
        y: Tensor = call(rows, marks, self.weight, self.bias, threshold, positive, shared)
        if self.inner is not None and self.outer is not None:
            rest = rows.masked_fill(flags_of(marks, threshold, positive, shared), 0)
            y = y + (rest @ self.inner.T) @ self.outer.T
        return y.view(*x.shape[:-1], y.shape[-1])


def _differentiates(x: Tensor, module: nn.Module) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in module.parameters()))


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone())


def _check_mlp(w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, block: int) -> None:
    for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
        if weight is not None:
            check_matrix(name, weight)
    if w_down.shape != w_up.shape[::-1]:
        allowed = f"{list(w_up.shape[::-1])}, as w_up turned"
        raise ShapeError("w_down", given=f"shape {list(w_down.shape)}", allowed=allowed)
    if w_gate is not None and w_gate.shape != w_up.shape:
        raise ShapeError("w_gate", given=f"shape {list(w_gate.shape)}", allowed=f"{list(w_up.shape)}, as w_up")
    if block < 1 or len(w_up) % block:
        raise ShapeError("block", given=block, allowed=f"a divisor of the {len(w_up)} neurons")
