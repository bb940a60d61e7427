"""Layers whose dense weights are trained while their products are sparse, and the schedule by which patterns change.

model = sp.sparsify(model, {"*.mlp.*": sp.block(64, density=0.1)}, train=sp.Rule())
schedule = sp.Schedule(model, start=1000, end=50_000, every=100, regrow=0.1)
for step, batch in enumerate(batches):
    loss(model, batch).backward()
    optimizer.step()
    schedule.step(step)
    optimizer.zero_grad()
model = sp.freeze(model)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spgen.errors import DataError, DtypeError, PatternError, UnsupportedError
from spgen.ir.node import Op, rewrite, walk
from spgen.patterns import Pattern, block
from spgen.weights import ops
from spgen.weights.linear import Linear, check_activation, check_bias, check_weight
from spgen.weights.select import largest, scores_of, selected, tiled_scores
from spgen.weights.storage import Layout, Stored, pack, taken


@dataclass(frozen=True)
class Rule:
    """What the gradient of a dense weight w under the mask m is: g * (m + flow * (1 - m)) + decay * (1 - m) * w.

    g is the product's gradient with the masked weight. `Rule()`: stored weights alone learn. `Rule(1, 2e-4)`: SR-STE
    (Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, equation 9).
    `fading`: the schedule lets flow fall linearly to 0 at its end (Bambhaniya et al., "Progressive Gradient Flow for
    Robust N:M Sparsity Training in Transformers", 2024). A flow or a decay costs a dense product in the backward pass.
    """

    flow: float = 0.0
    decay: float = 0.0
    fading: bool = False

    def __post_init__(self) -> None:
        for name, value, most in (("flow", self.flow, 1.0), ("decay", self.decay, math.inf)):
            if not 0 <= value <= most:
                raise PatternError(f"Rule: {name}", given=value, allowed=f"a number in [0, {most:g}]")


class Trained(nn.Module):
    """y = activation(x (m * w)^T + bias): a dense weight w is kept and trained, the product reads its stored part.

    `weight` [N, K] and `bias` [N] become parameters, copies of what is given. The mask m is what `pattern` selects;
    :meth:`select` chooses anew, which a :class:`Schedule` does. Gradients follow `rule`.
    """

    bias: Tensor | None
    mask: Tensor
    places: Tensor
    flow: Tensor

    def __init__(
        self, weight: Tensor, pattern: Pattern, bias: Tensor | None = None, *, rule: Rule | None = None,
        activation: str = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        check_weight("weight", weight, pattern)
        check_activation(activation)
        check_bias(bias, weight)
        self.pattern, self.rule, self.activation = pattern, rule or Rule(), activation
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.dense_gradient = False  # whether the weight's gradient is to be that of the dense weight
        self.register_buffer("flow", torch.tensor(float(self.rule.flow)))
        self.register_buffer("mask", torch.zeros(0, dtype=torch.bool))
        self.select()
        hook: Any = self.register_load_state_dict_post_hook
        hook(_reindex)

    def select(self, pattern: Pattern | None = None) -> None:
        """Take what `pattern` (default: the layer's) selects of the dense weight as it is now."""
        self._take(*selected(self.weight.detach(), self.pattern if pattern is None else pattern))

    def _take(self, mask: Tensor, layout: Layout) -> None:
        """Remember where values lie: for each stored one the place in the flat weight, -1 where it is padding."""
        found = pack(self.weight.detach(), mask, layout)
        self.mask, self.layout, self.shape = mask, str(layout), found.shape
        numbers = torch.arange(1, mask.numel() + 1, device=mask.device).view_as(mask)
        places = taken(found, numbers * mask) - 1
        self.register_buffer("places", places.int() if mask.numel() < 2**31 else places, persistent=False)
        self._count = len(found.index)
        for number, tensor in enumerate(found.index):
            self.register_buffer(f"index_{number}", tensor, persistent=False)

    @property
    def stored(self) -> Stored:
        """The masked weight as spgen/weights/storage.py has it."""
        return pack(self.weight.detach(), self.mask, Layout.read(self.layout))

    def freeze(self) -> Linear:
        """The plain layer over the masked weight."""
        return Linear(self.stored, self.bias, self.activation).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's dtype, which is the weight's."""
        index = [getattr(self, f"index_{number}") for number in range(self._count)]
        call: Any = torch.ops.spgen.linear
        rest = (self.layout, *self.shape)
        if not self._straight:
            values = _values(self.weight, self.places)
            found: Tensor = call(x, values, index, None, self.bias, *rest, self.activation)
            return found
        values = _values(self.weight.detach(), self.places)
        y = call(x, values, index, None, None, *rest, "none")
        flow = torch.ones_like(self.flow) if self.dense_gradient else self.flow
        y = _straight(y, x, self.weight, self.mask, flow, self.rule.decay)
        return ops.activated(y if self.bias is None else y + self.bias.to(y.dtype), self.activation)

    @property
    def _straight(self) -> bool:
        if not torch.is_grad_enabled() or not self.weight.requires_grad:
            return False
        return self.dense_gradient or self.rule.flow > 0 or self.rule.decay > 0

    def extra_repr(self) -> str:
        """Shape, storage and the pattern."""
        return f"{self.shape[1]} -> {self.shape[0]}, {self.layout}, {self.pattern}, {self.rule}"


def _reindex(module: Trained, incompatible: object) -> None:
    """A loaded mask says where values lie."""
    module._take(module.mask, Layout.read(module.layout))


class _Values(torch.autograd.Function):
    """Stored values of a dense weight; their gradient is 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = weight.shape
        flat = places.flatten()
        values = weight.reshape(-1).index_select(0, flat.clamp(min=0))
        return values.masked_fill(flat < 0, 0).view(places.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,), (g,) = ctx.saved_tensors, gradients
        n, k = ctx.shape
        flat = places.flatten().long()
        wide = g.new_zeros(n * k + 1)  # the last place takes what is padding
        wide = wide.scatter(0, torch.where(flat < 0, n * k, flat), g.flatten())
        return wide[:-1].view(n, k), None


class _Straight(torch.autograd.Function):
    """y as it is, with a gradient to the whole weight of which y has only a part."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, mask: Tensor, flow: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(x, weight, mask, flow)
        ctx.decay = decay
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, mask, flow), (g,) = ctx.saved_tensors, gradients
        of_weight = None
        if ctx.needs_input_grad[2]:
            rows = g.reshape(-1, g.shape[-1])
            dense = (rows.T @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(weight.dtype)
            of_weight = torch.where(mask, dense, dense * flow.to(dense.dtype) + ctx.decay * weight)
        return g, None, of_weight, None, None, None


_values: Any = _Values.apply  # which has no types
_straight: Any = _Straight.apply


class Schedule:
    """When the patterns of trained layers are chosen anew, and how dense they are meanwhile.

    Each `every` steps from `start` to `end` every :class:`Trained` layer of `model` selects by its weights as they are
    then. Densities fall from 1 to those of the patterns, as 1 - (1 - density) * (1 - (1 - t)^power), t from 0 to 1
    (Zhu & Gupta, "To prune, or not to prune", 2017, power 3). `regrow`, a share that falls to 0 as a cosine, of the
    stored blocks is given to those left out whose gradient has the largest norm; they start from 0 (Evci et al.,
    "Rigging the Lottery", 2020; blocks: Okanovic et al., "BLaST", 2025). `gradual=False` keeps the density, which
    `n_of_m` needs. `first` is the step that will be trained first.

    Weights that are left out become 0, unless the layer's rule lets them learn.
    """

    def __init__(
        self, model: nn.Module, *, start: int = 0, end: int, every: int = 1, power: float = 3.0, regrow: float = 0.0,
        gradual: bool = True, first: int = 0,
    ) -> None:  # fmt: skip
        self.layers = _trained(model)
        if not 0 <= start < end or every < 1:
            given = f"start={start}, end={end}, every={every}"
            raise PatternError("Schedule", given=given, allowed="0 <= start < end and every >= 1")
        if not 0 <= regrow < 1 or power <= 0:
            given = f"regrow={regrow}, power={power}"
            raise PatternError("Schedule", given=given, allowed="regrow in [0, 1) and power > 0")
        for name, layer in self.layers.items():
            _check_layer(name, layer, regrow, gradual)
        self.start, self.end, self.every, self.power = start, end, every, power
        self.regrow, self.gradual = regrow, gradual
        if gradual and first <= start:
            for layer in self.layers.values():
                layer.select(at_density(layer.pattern, 0.0))
        self._prepare(first)

    def progress(self, step: int) -> float:
        """How far `step` is from start to end, in [0, 1]."""
        return min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)

    def due(self, step: int) -> bool:
        """Whether patterns change after this step."""
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Call after the optimiser's step, before its gradients are cleared; `step` counts from 0."""
        if self.due(step):
            for name, layer in self.layers.items():
                self._choose(name, layer, step)
        self._prepare(step + 1)

    def _prepare(self, step: int) -> None:
        """What the layers need to know before this step's forward pass."""
        for layer in self.layers.values():
            layer.dense_gradient = self.regrow > 0 and self.due(step)
            if layer.rule.fading:
                layer.flow.fill_(layer.rule.flow * (1 - self.progress(step)))

    def _choose(self, name: str, layer: Trained, step: int) -> None:
        t = self.progress(step)
        pattern = at_density(layer.pattern, 1 - (1 - t) ** self.power) if self.gradual else layer.pattern
        learns = layer.rule.flow > 0 or layer.rule.decay > 0
        before = layer.mask
        if not learns:
            layer.weight.masked_fill_(~before, 0)  # momentum moves them, too
        if self.regrow:
            pattern = self._regrown(name, layer, pattern, self.regrow * (1 + math.cos(math.pi * t)) / 2)
        layer.select(pattern)
        if not learns:
            layer.weight.masked_fill_(~layer.mask, 0)

    def _regrown(self, name: str, layer: Trained, pattern: Pattern, share: float) -> Pattern:
        """The largest blocks, but for a share of them, and in their place those with the largest gradients."""
        if layer.weight.grad is None:
            raise DataError(
                f"{name}: gradient", given="none", allowed="one from this step's backward pass, because of regrow=",
                remedy="call step() before zero_grad()",
            )  # fmt: skip
        rows, cols = pattern.node["rows"], pattern.node["cols"]
        norms = tiled_scores(scores_of(layer.weight), rows, cols)
        stays = tiled_scores(torch.where(layer.mask, 1.0, -1.0), rows, cols) > 0
        count = max(1, math.floor(pattern.node["density"] * norms.numel() + 0.5))
        kept = largest(norms.masked_fill(~stays, -1.0).flatten(), count - math.floor(share * count))
        gradients = tiled_scores(scores_of(layer.weight.grad), rows, cols).flatten()
        grown = largest(gradients.masked_fill(kept, -1.0), count - int(kept.sum()))
        return block(rows, cols, mask=(kept | grown).view_as(norms))


def at_density(pattern: Pattern, done: float) -> Pattern:
    """The pattern with densities that have come the share `done` of their way from 1."""

    def rule(op: Op) -> Op:
        if not _is_dense(op):
            return op
        attrs = dict(op.attrs) | {"density": done * op["density"] + (1 - done)}
        return Op(op.name, op.operands, tuple(attrs.items()))

    return Pattern(rewrite(pattern.node, rule), pattern.data)


def _is_dense(op: Op) -> bool:
    return op.kind == "block" and op["density"] is not None


def _trained(model: nn.Module) -> dict[str, Trained]:
    if not isinstance(model, nn.Module):
        raise DtypeError("Schedule: model", given=type(model).__name__, allowed="a torch.nn.Module")
    found = {name or "model": module for name, module in model.named_modules() if isinstance(module, Trained)}
    if not found:
        raise DataError(
            "Schedule: model", given="no layer that is trained", allowed="a model with spgen.Trained layers",
            remedy="use sp.sparsify(model, patterns, train=sp.Rule())",
        )  # fmt: skip
    return found


def _check_layer(name: str, layer: Trained, regrow: float, gradual: bool) -> None:
    if regrow and not _is_dense(layer.pattern.node):
        raise UnsupportedError(
            f"{name}: regrow", given=str(layer.pattern), allowed="block(…, density=…), whose blocks can grow again"
        )
    if gradual and not any(map(_is_dense, walk(layer.pattern.node))):
        raise UnsupportedError(
            f"{name}: gradual", given=str(layer.pattern), allowed="patterns with a density", remedy="pass gradual=False"
        )
