"""Products with active neurons in plain tensor operations, and calls for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spgen.backends.triton_neurons import compact, down, up
from tests.products import ACTIVATIONS, NORMS


@dataclass(frozen=True)
class Neurons:
    """A gated or plain MLP of m tokens, of whose f neurons lists for `rows` tokens each name the active ones."""

    m: int
    rows: int
    f: int
    k: int
    d: int
    dtype: str = "float32"
    positive: bool = False
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    threshold: float = 0.7
    on_device: bool = False
    seed: int = 0

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """x, scores whose rows lie apart, weights neuron by neuron, biases."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"x": (self.m, self.k), "scores": (self.m, self.f + 8), "w_up": (self.f, self.k),
                  "w_down": (self.f, self.d), "bias": (self.f,), "last": (self.d,)}  # fmt: skip
        dtype = getattr(torch, self.dtype)
        made = {name: torch.randn(shape, generator=generator).to(dtype).to(device) for name, shape in shapes.items()}
        made["scores"] = made["scores"][:, : self.f]
        return made


def active_of(call: Neurons, scores: Tensor) -> Tensor:
    """Which neurons each list names, bool [G, F]."""
    scores = scores.float()  # a threshold is not rounded to the scores' type
    active = scores > call.threshold if call.positive else scores.abs() >= call.threshold
    return torch.stack([chunk.any(0) for chunk in active.split(call.rows)])


def check(call: Neurons, device: str = "cpu") -> None:
    """Lists, hidden values and results of a call, each against tensor operations; twice the same bits."""
    t = call.tensors(device)
    threshold = torch.tensor([call.threshold], device=device) if call.on_device else call.threshold
    index, count = compact(t["scores"], threshold, call.rows, call.positive)
    active = active_of(call, t["scores"])
    for list_, row in enumerate(active):
        wanted = row.nonzero()[:, 0]
        assert int(count[list_]) == len(wanted)
        assert torch.equal(index[list_, : len(wanted)].long(), wanted)
    gate, bias = (t["scores"] if call.gated else None), (t["bias"] if call.bias and not call.gated else None)
    h = up(t["x"], t["w_up"], index, count, gate, bias, call.activation, rows_per_list=call.rows)
    full = hidden(call, t)
    each = active.repeat_interleave(call.rows, 0)[: call.m]
    for row in range(call.m):
        found = h[row, : int(each[row].sum())].double()
        assert (found - full[row][each[row]]).norm() <= NORMS[call.dtype] * full[row].norm()
    last = t["last"] if call.bias else None
    y = down(h, t["w_down"], index, count, last, rows_per_list=call.rows)
    same(call, y, (full * each) @ t["w_down"].double(), last)
    assert torch.equal(y, down(h, t["w_down"], index, count, last, rows_per_list=call.rows))
    # input channels: all values of h at their own columns
    whole = t["scores"].contiguous()
    y = down(whole, t["w_down"], index, count, last, compacted=False, rows_per_list=call.rows)
    same(call, y, (whole.double() * each) @ t["w_down"].double(), last)


def hidden(call: Neurons, t: dict[str, Tensor]) -> Tensor:
    """The hidden values of all neurons, in float64."""
    sums, activation = t["x"].double() @ t["w_up"].double().T, ACTIVATIONS[call.activation]
    if call.gated:
        return activation(t["scores"].double()) * sums
    return activation(sums + t["bias"].double() if call.bias else sums)


def same(call: Neurons, y: Tensor, wanted: Tensor, last: Tensor | None) -> None:
    """Whether a result is right: hidden values were rounded before."""
    wanted = wanted if last is None else wanted + last.double()
    assert not y.isnan().any()
    assert (y.double() - wanted).norm() <= 2 * NORMS[call.dtype] * wanted.norm()
