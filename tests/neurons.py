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
    twofold: bool = False
    bias: bool = False
    activation: str = "silu"
    threshold: float = 0.7
    on_device: bool = False
    seed: int = 0

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """x, scores whose rows lie apart, weights neuron by neuron, biases."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"x": (self.m, self.k), "scores": (self.m, self.f + 8), "w_up": (self.f, self.k),
                  "w_down": (self.f, self.d), "w_gate": (self.f, self.k), "bias": (self.f,),
                  "last": (self.d,)}  # fmt: skip
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
    gate = t["scores"] if call.gated and not call.twofold else None
    bias = t["bias"] if call.bias and gate is None else None
    of_gate = t["w_gate"] if call.twofold else None
    h = up(t["x"], t["w_up"], index, count, gate, bias, call.activation, rows_per_list=call.rows, w_gate=of_gate)
    full, size = hidden(call, t)
    each = active.repeat_interleave(call.rows, 0)[: call.m]
    for row in range(call.m):
        found = h[row, : int(each[row].sum())].double()
        assert (found - full[row][each[row]]).norm() <= NORMS[call.dtype] * (full[row].norm() + size[row].norm())
    last = t["last"] if call.bias else None
    y = down(h, t["w_down"], index, count, last, rows_per_list=call.rows)
    same(call, y, full * each, t["w_down"], last, size * each)
    assert torch.equal(y, down(h, t["w_down"], index, count, last, rows_per_list=call.rows))
    # input channels: all values of h at their own columns
    whole = t["scores"].contiguous()
    y = down(whole, t["w_down"], index, count, last, compacted=False, rows_per_list=call.rows)
    same(call, y, whole.double() * each, t["w_down"], last, 0 * each)


def hidden(call: Neurons, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden values of all neurons, in float64, and the size of the terms that they are sums of."""
    t = {name: one.double() for name, one in t.items()}
    activation, bias = ACTIVATIONS[call.activation], t["bias"] if call.bias else torch.zeros_like(t["bias"])
    sums, size = t["x"] @ t["w_up"].T, terms(t["x"], t["w_up"].T)
    if call.twofold:
        first = t["x"] @ t["w_gate"].T + bias
        return activation(first) * sums, activation(first).abs() * size + terms(t["x"], t["w_gate"].T) * sums.abs()
    if call.gated:
        return activation(t["scores"]) * sums, activation(t["scores"]).abs() * size
    return activation(sums + bias), size + bias.abs()


def terms(a: Tensor, b: Tensor) -> Tensor:
    """How large the terms of a @ b are, as they add up if their signs are random: sums of a few may all but cancel."""
    return a.abs() @ b.abs() * max(a.shape[1], 1) ** -0.5


def same(call: Neurons, y: Tensor, h: Tensor, w_down: Tensor, last: Tensor | None, size: Tensor) -> None:
    """Whether a result is right: hidden values, sums of terms of some size, were rounded before."""
    wanted = h @ w_down.double() + (0 if last is None else last.double())
    allowed = wanted.norm() + terms(h.abs() + size, w_down.double()).norm()
    assert not y.isnan().any()
    assert (y.double() - wanted).norm() <= 2 * NORMS[call.dtype] * allowed
