"""Layers of which a call's own scores make some neurons active, to measure on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

import spgen as sp
from spgen.bench.peers import Contender
from spgen.bench.weights import Rows
from spgen.weights import neuron_ops

_THRESHOLD = 1.0
_ACTIVE = 2.0  # the score of active neurons


@dataclass(frozen=True)
class Neurons:
    """silu(x gate^T) * (x up^T), of `active` of the neurons, through `down` [F, D]; without `gate` x up^T alone.

    `work` has F outputs. All rows share a list, which `scores` [rows, F] say.
    """

    work: Rows
    active: Tensor
    scores: Tensor
    up: Tensor
    gate: Tensor | None = None
    down: Tensor | None = None

    @property
    def pattern(self) -> sp.Activity:
        """Which neurons are active."""
        return sp.Activity(_THRESHOLD, rows=None)

    @property
    def density(self) -> float:
        """The share of neurons that are active."""
        return len(self.active) / self.work.outputs

    @property
    def flops(self) -> int:
        """FLOP of active neurons, a multiply-add for each row and weight."""
        return 2 * self.work.rows * self._weights

    @property
    def bytes(self) -> int:
        """Active neurons' weights, scores, x, and what is written, once each."""
        rows = self.scores.numel() + self.work.rows * (self.work.inputs + (self._width or len(self.active)))
        return (self._weights + rows) * self.up.element_size()

    @property
    def _width(self) -> int:
        return 0 if self.down is None else self.down.shape[1]

    @property
    def _weights(self) -> int:
        gates = 1 if self.gate is None else 2
        return len(self.active) * (gates * self.work.inputs + self._width)

    def ours(self, x: Tensor) -> Contender:
        """Lists of active neurons made on the device, then their rows of the weights."""
        if self.down is None:
            from spgen.backends.triton_neurons import compact, up

            rows = self.work.rows
            lists = partial(compact, self.scores, _THRESHOLD, rows, True)
            return Contender(lambda plan: up(x, self.up, plan[0], plan[1], rows_per_list=rows), lists)
        neurons = (self.gate, self.up, self.down, None, None, "silu", _THRESHOLD, True, self.work.rows)
        return Contender(lambda plan: neuron_ops.neurons(x, self.scores, None, *neurons))

    def dense(self, x: Tensor) -> Callable[[], Tensor]:
        """The same with all neurons."""
        if self.gate is None or self.down is None:
            return lambda: x @ self.up.T
        gate, down = self.gate, self.down
        return lambda: (silu(x @ gate.T) * (x @ self.up.T)) @ down

    def largest_error(self, out: Tensor, x: Tensor) -> float:
        """The largest difference to the oracle's result."""
        wanted = x.double() @ self.up[self.active].double().T
        if self.gate is None or self.down is None:
            return float((out[:, : len(self.active)].double() - wanted).abs().max())
        wanted = silu(x.double() @ self.gate[self.active].double().T) * wanted
        return float((out.double() - wanted @ self.down[self.active].double()).abs().max())


def problem(work: Rows, share: float, whole: bool) -> Neurons:
    """Random weights, and a `share` of the neurons at random: of an up-projection, or of a `whole` gated layer."""
    generator = torch.Generator(work.device).manual_seed(1)
    drawn = torch.rand(work.outputs, device=work.device, generator=generator)
    active = drawn.topk(round(share * work.outputs)).indices.sort().values
    scores = torch.zeros(work.rows, work.outputs, dtype=work.dtype, device=work.device)
    scores[:, active] = _ACTIVE

    def random(values: int) -> Tensor:
        shape = (work.outputs, work.inputs)
        drawn = torch.randn(shape, dtype=work.dtype, device=work.device, generator=generator)
        return drawn.mul_(float(values) ** -0.5)

    up = random(work.inputs)
    if not whole:
        return Neurons(work, active, scores, up)
    return Neurons(work, active, scores, up, random(work.inputs), random(len(active)))
