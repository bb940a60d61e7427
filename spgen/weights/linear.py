"""Layers over sparse weights.

layer = sp.linear(weight, sp.block(64, density=0.1))
y = layer(x)

mlp = sp.mlp(w_gate, w_up, w_down, sp.block(64, density=0.1))
y = mlp(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spgen.arguments import DTYPES
from spgen.errors import DataError, DtypeError, ShapeError, UnsupportedError
from spgen.ir.kernel import ACTIVATIONS
from spgen.ops import is_plain
from spgen.patterns import Pattern
from spgen.weights import ops
from spgen.weights.consistency import check_consistent
from spgen.weights.order import Orders, orders_of
from spgen.weights.select import stored as select
from spgen.weights.storage import Layout, Stored, pack, quantized

if TYPE_CHECKING:
    from spgen.weights.explain import Explanation


# tensors as long as there are blocks, or values
_COUNTED = {"blocks": ("values", "scales", "index_1", "index_4", "index_5"), "bitmap": ("values",), "n_of_m": ()}


class Weight(nn.Module):
    """A weight's stored values, a parameter, and their index, buffers; `Linear` and `MLP` are made of it.

    Quantised values are buffers, too. A state of another number of blocks or values loads: it takes the place of these.
    One whose index does not describe its values is refused, naming the entry.
    """

    scales: Tensor | None

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.layout, self.shape = str(stored.layout), stored.shape
        if stored.scales is None:
            self.values = nn.Parameter(stored.values)
        else:
            self.register_buffer("values", stored.values)
        self.register_buffer("scales", stored.scales)
        self._names = tuple(f"index_{number}" for number in range(len(stored.index)))
        for name, tensor in zip(self._names, stored.index, strict=True):
            self.register_buffer(name, tensor)

    @property
    def index(self) -> list[Tensor]:
        """The index tensors, in the order of spgen/weights/storage.py."""
        return self.tensors()[1]

    def tensors(self) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Values, index, scales: from the dictionaries in which a module looks up names, half a microsecond each."""
        buffers = self._buffers
        values = self._parameters.get("values")
        index = [buffers[name] for name in self._names]
        return self.values if values is None else values, cast("list[Tensor]", index), buffers["scales"]

    @property
    def stored(self) -> Stored:
        """The weight as spgen/weights/storage.py has it."""
        return Stored(Layout.read(self.layout), self.shape, self.values.detach(), tuple(self.index), self.scales)

    def dense(self) -> Tensor:
        """The weight [N, K], zeros where nothing is stored."""
        return self.stored.dense()

    def store(self, stored: Stored) -> None:
        """Take other values at other places, of the same shape and layout; optimisers must be told of the parameter."""
        if stored.shape != self.shape or str(stored.layout) != self.layout:
            raise ShapeError("weight", given=f"{stored.layout} {stored.shape}", allowed=f"{self.layout} {self.shape}")
        self.values.data = stored.values
        for name, tensor in zip(self._names, stored.index, strict=True):
            setattr(self, name, tensor)

    def extra_repr(self) -> str:
        """Shape, storage and the share of values that are stored."""
        values = self.values.numel() * (2 if self.values.dtype == torch.uint8 else 1)
        return (
            f"{self.shape[1]} -> {self.shape[0]}, {self.layout}, {values / max(1, self.shape[0] * self.shape[1]):.1%}"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name in _COUNTED[Layout.read(self.layout).kind]:
            tensor, given = getattr(self, name), state_dict.get(prefix + name)
            if tensor is not None and given is not None and given.shape[1:] == tensor.shape[1:]:
                tensor.data = tensor.new_empty(given.shape)
        problems: list[str] = rest[-1]
        known = len(problems)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        has_data = type(self.index[0]) is Tensor and not self.index[0].is_meta
        if has_data and len(problems) == known:
            try:
                check_consistent(prefix, self.stored)
            except DataError as error:
                problems.append(str(error))


class Features(nn.Module):
    """Orders of a layer's inputs and outputs, buffers; moves nothing where there are none."""

    def __init__(self, orders: Orders) -> None:
        super().__init__()
        self.register_buffer("inputs", orders.k)
        # of the outputs among those by rank
        self.register_buffer("places", None if orders.q is None else torch.argsort(orders.q))

    def ranked(self, x: Tensor) -> Tensor:
        """Inputs by rank."""
        order = self._buffers["inputs"]
        return x if order is None else x.index_select(-1, order)

    def restored(self, y: Tensor) -> Tensor:
        """Outputs in their own order."""
        places = self._buffers["places"]
        return y if places is None else y.index_select(-1, places)


_AS_THEY_ARE = Orders()


class Linear(nn.Module):
    """y = activation(x W^T + bias) over the stored part of W. Made by :func:`linear`."""

    bias: Tensor | None

    def __init__(
        self, stored: Stored, bias: Tensor | None = None, activation: str = "none", orders: Orders = _AS_THEY_ARE
    ) -> None:
        super().__init__()
        self.weight, self.activation = Weight(stored), activation
        own = bias if bias is None or orders.q is None else bias[orders.q]
        self.bias = None if own is None else nn.Parameter(own.detach().clone())
        self.features = Features(orders)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's dtype, which is the weight's; any strides."""
        weight, features, bias = self.weight, self.features, self.bias
        (values, index, scales), x = weight.tensors(), features.ranked(x)
        call: Any = ops.linear if is_plain(x, values.data, x) and not _differentiate(values, bias) else _OPS.linear
        y: Tensor = call(x, values, index, scales, bias, weight.layout, *weight.shape, self.activation)
        return features.restored(y)

    def explain(self, x: Tensor) -> Explanation:
        """Storage, bytes, floor and the chosen kernel of a call; printable."""
        from spgen.weights.explain import explain

        return explain(x, [self.weight.stored], self.bias is not None, self.activation)


class MLP(nn.Module):
    """y = (activation(x gate^T) * (x up^T)) down^T over stored parts. Made by :func:`mlp`.

    Without a gate: activation(x up^T) down^T.
    """

    def __init__(
        self, gate: Stored | None, up: Stored, down: Stored, activation: str = "silu",
        biases: tuple[Tensor | None, Tensor | None] = (None, None), orders: Orders = _AS_THEY_ARE,
    ) -> None:  # fmt: skip
        super().__init__()
        self.features = Features(orders)
        self.gate = None if gate is None else Weight(gate)
        self.up, self.down, self.activation = Weight(up), Weight(down), activation
        self.hidden_bias, self.bias = (None if b is None else nn.Parameter(b.detach().clone()) for b in biases)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], in x's dtype, which is the weights'; any strides."""
        up, down, gate, x = self.up, self.down, self.gate, self.features.ranked(x)
        learned = (up.values, down.values, None if gate is None else gate.values, self.hidden_bias, self.bias)
        namespace: Any = ops if is_plain(x, up.values.data, x) and not _differentiate(*learned) else _OPS
        if gate is None or not _alike(gate, up):
            hidden = namespace.linear(
                x, up.values, up.index, up.scales, self.hidden_bias if gate is None else None, up.layout, *up.shape,
                self.activation if gate is None else "none",
            )  # fmt: skip
            if gate is not None:
                hidden = hidden * namespace.linear(
                    x, gate.values, gate.index, gate.scales, self.hidden_bias, gate.layout, *gate.shape, self.activation
                )
        else:
            hidden = namespace.gated(
                x, gate.values, gate.index, gate.scales, up.values, up.index, up.scales, self.hidden_bias, up.layout,
                *up.shape, self.activation,
            )  # fmt: skip
        y: Tensor = namespace.linear(
            hidden, down.values, down.index, down.scales, self.bias, down.layout, *down.shape, "none"
        )
        return self.features.restored(y)


_OPS: Any = torch.ops.spgen


def _differentiate(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _alike(one: Weight, other: Weight) -> bool:
    """Whether one kernel can multiply by both at a time."""
    return (
        one.layout == other.layout and one.shape == other.shape and (one.scales is None) == (other.scales is None)
        and one.values.dtype == other.values.dtype and not one.layout.startswith("bitmap")
    )  # fmt: skip


def check_weight(name: str, weight: Tensor, pattern: object) -> None:
    """Raises for what is no weight, or no pattern."""
    check_matrix(name, weight)
    if not isinstance(pattern, Pattern):
        raise DtypeError("pattern", given=type(pattern).__name__, allowed="a pattern such as sp.block(64, density=0.1)")


def check_matrix(name: str, weight: Tensor) -> None:
    """Raises DtypeError or ShapeError for what is no weight."""
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        given = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise DtypeError(name, given=given, allowed=f"a tensor of {', '.join(DTYPES.values())}")
    if weight.dim() != 2:
        raise ShapeError(name, given=f"shape {list(weight.shape)}", allowed="[output features, input features]")


def _stored(
    name: str, weight: Tensor, pattern: Pattern, values: str | None, inputs: Tensor | None = None, strict: bool = False
) -> Stored:  # fmt: skip
    check_weight(name, weight, pattern)
    found = select(weight.detach(), pattern, inputs, strict=name if strict else None)
    return found if values is None else quantized(found, values)


def check_activation(activation: str) -> None:
    """Raises UnsupportedError for an activation that no kernel has."""
    if activation not in ACTIVATIONS:
        raise UnsupportedError("activation", given=repr(activation), allowed=", ".join(ACTIVATIONS))


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Raises ShapeError for a bias of another size or type."""
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        given = f"{bias.dtype} {list(bias.shape)}"
        raise ShapeError("bias", given=given, allowed=f"{weight.dtype} [{weight.shape[0]}]")


def linear(
    weight: Tensor, pattern: Pattern, bias: Tensor | None = None, *, activation: str = "none",
    values: str | None = None, inputs: Tensor | None = None, check: bool = False,
) -> Linear:  # fmt: skip
    """The layer y = activation(x W^T + bias) over the pairs of `pattern`: rows are output features, columns inputs.

    `weight` [N, K] (float32, bfloat16 or float16), `bias` [N]. What the pattern leaves out is not stored: blocks lie in
    lists of blocks, n of m with a bit for each column, other patterns in blocks or a bitmap, whichever takes the
    fewest bytes. Counts select the largest weights: `sp.block(64, density=0.1)`, `sp.n_of_m(2, 4)`,
    `sp.top_k(512, rows=64)`; with `scores=sp.wanda()` times `inputs`, norms of the inputs [K] (Sun et al. 2023).

    `values` quantises what is stored: "int8", "int4" or "float8_e4m3fn", a scale for each row (of a block). Otherwise
    the layer can be trained: gradients reach the stored values, the bias and x. `check` refuses a weight with values
    outside the pattern, naming the first. Sizes that blocks do not divide are padded inside.

    `sp.permuted(p, q=…, k=…)` stores the weight with its rows and columns in these orders (`sp.concentrated` finds
    some); x and y are brought into and out of them.

    Raises ShapeError, DtypeError, DataError, PatternError or UnsupportedError, naming the argument.
    """
    check_activation(activation)
    check_weight("weight", weight, pattern)
    check_bias(bias, weight)
    pattern, orders = orders_of(pattern, weight.shape)
    inputs = inputs if inputs is None or orders.k is None else inputs[orders.k]
    found = _stored("weight", orders.applied(weight), pattern, values, inputs, check)
    return Linear(found, bias, activation, orders)


def mlp(
    w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, pattern: Pattern | tuple[Pattern, ...], *,
    activation: str = "silu", values: str | None = None, hidden_bias: Tensor | None = None, bias: Tensor | None = None,
) -> MLP:  # fmt: skip
    """The layer y = (activation(x gate^T) * (x up^T)) down^T over stored parts of its weights; gate and up are fused.

    `w_gate` and `w_up` [F, D], `w_down` [D, F]; without a gate (None) activation(x up^T) down^T. `pattern` is over
    [F, D] for gate and up, and its transpose holds for down (selections choose for each weight by itself); a tuple
    gives each its own. Of `n_of_m` give three: its transpose has groups along down's outputs and is kept as a bitmap,
    whose products are slower. `hidden_bias` [F] is added before the activation, `bias` [D] at the end. Where the
    pattern is `sp.permuted(p, q=…)` the hidden features are stored in that order, which costs a call nothing.

    Raises ShapeError, DtypeError, DataError, PatternError or UnsupportedError, naming the argument.
    """
    check_activation(activation)
    weights = {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    if w_up.dim() == 2 and (tuple(w_down.shape) != tuple(w_up.shape[::-1])):
        raise ShapeError(
            "w_down", given=f"shape {list(w_down.shape)}", allowed=f"{list(w_up.shape[::-1])}, as w_up turned"
        )
    if w_gate is not None and w_gate.shape != w_up.shape:
        raise ShapeError("w_gate", given=f"shape {list(w_gate.shape)}", allowed=f"{list(w_up.shape)}, as w_up")
    orders = Orders()
    if isinstance(pattern, Pattern):
        check_weight("w_up", w_up, pattern)
        pattern, orders = orders_of(pattern, w_up.shape)
        given = {name: orders.applied(weight) for name, weight in given.items() if name != "w_down"}
        w_down = given["w_down"] = orders.applied(w_down.T).T
        hidden_bias = hidden_bias if hidden_bias is None or orders.q is None else hidden_bias[orders.q]
        bias = bias if bias is None or orders.k is None else bias[orders.k]
    if isinstance(pattern, tuple):
        if len(pattern) != len(given):
            raise ShapeError(
                "pattern", given=f"{len(pattern)} patterns", allowed=f"one, or one for each of {', '.join(given)}"
            )
        own = dict(zip(given, pattern, strict=True))
        found = {name: _stored(name, weight, own[name], values) for name, weight in given.items()}
    else:
        found = {name: _stored(name, weight, pattern, values) for name, weight in given.items() if name != "w_down"}
        turned = _stored("w_down", w_down.T, pattern, None)
        down = pack(w_down.detach(), turned.mask().T, turned.layout.transposed)
        found["w_down"] = down if values is None else quantized(down, values)
    ends = Orders(q=orders.k, k=orders.k)  # inputs and outputs are the same features
    return MLP(found.get("w_gate"), found["w_up"], found["w_down"], activation, (hidden_bias, bias), ends)
