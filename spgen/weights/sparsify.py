"""From a model to a model over sparse weights.

sp.sparsify(model, {"*.mlp.*": sp.block(64, density=0.1)})
sp.sparsify(model, {"*": sp.n_of_m(2, 4, scores=sp.wanda())}, calibration=batches)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from spgen.errors import DataError, DtypeError, PatternError
from spgen.ir.node import walk
from spgen.ir.pattern import is_selected
from spgen.patterns import Pattern
from spgen.weights.linear import Weight, linear
from spgen.weights.training import Rule, Trained

_NAMES = 8  # that an error lists


def sparsify(
    model: nn.Module, patterns: Mapping[str, Pattern], *, calibration: Iterable[Any] | None = None,
    values: str | None = None, train: Rule | None = None, inplace: bool = True,
) -> nn.Module:  # fmt: skip
    """The model with linear layers over the weights that patterns hold; biases stay.

    `patterns` maps globs of dotted module names to patterns, as :func:`spgen.linear` takes them; of several globs that
    match a layer the first counts. Layers are `nn.Linear` and the `Conv1D` of transformers. Selections with
    `scores=sp.wanda()` need `calibration`: batches, each called as `model(**batch)`, `model(*batch)` or `model(batch)`,
    from which the norms of each layer's inputs are taken in the dense model (Sun et al., "A Simple and Effective
    Pruning Approach for Large Language Models", 2023). `values` quantises: "int8", "int4" or "float8_e4m3fn".

    With `train`, a rule, layers keep their dense weights and can be trained (:class:`spgen.Trained`) until
    :func:`spgen.freeze`. `inplace=False` leaves the given model as it is.

    Raises PatternError for a glob that matches no layer, DataError for missing calibration, and what
    :func:`spgen.linear` raises.
    """
    _check(model, patterns, values, train)
    model = model if inplace else deepcopy(model)
    chosen = _chosen(model, patterns)
    calibrated = {name: module for name, (module, pattern) in chosen.items() if _ranks_inputs(pattern)}
    norms = _input_norms(model, calibrated, calibration) if calibrated else {}
    for name, (module, pattern) in chosen.items():
        weight, bias = _dense(module)
        if train is not None:
            new: nn.Module = Trained(weight, pattern, bias, rule=train)
        else:
            new = linear(weight, pattern, bias, values=values, inputs=norms.get(name))
        new.train(module.training)
        model = replaced(model, module, new)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """The model with each :class:`spgen.Trained` as the :class:`spgen.Linear` of what it holds, in place."""
    for module in list(model.modules()):
        if isinstance(module, Trained):
            model = replaced(model, module, module.freeze())
    return model


def replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with `new` wherever `old` is, in place; `new` itself if the model is `old`."""
    if model is old:
        return new
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # its fused form would read the dense weight
    return model


def _check(model: object, patterns: object, values: str | None, train: object) -> None:
    if not isinstance(model, nn.Module):
        raise DtypeError("model", given=type(model).__name__, allowed="a torch.nn.Module")
    if not isinstance(patterns, Mapping):
        raise DtypeError("patterns", given=type(patterns).__name__, allowed='a dict, as {"*.mlp.*": sp.n_of_m(2, 4)}')
    for glob, pattern in patterns.items():
        if not isinstance(pattern, Pattern):
            raise DtypeError(
                f"patterns[{glob!r}]", given=type(pattern).__name__, allowed="a pattern such as sp.n_of_m(2, 4)"
            )
    if train is not None and not isinstance(train, Rule):
        raise DtypeError("train", given=type(train).__name__, allowed="a rule, such as sp.Rule()")
    if train is not None and values is not None:
        raise DtypeError("values", given=values, allowed="None with train=: quantised weights do not train")


def _chosen(model: nn.Module, patterns: Mapping[str, Pattern]) -> dict[str, tuple[nn.Module, Pattern]]:
    """Layers by name, each with the pattern of the first glob that matches."""
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in layers):
            close = get_close_matches(glob, layers, _NAMES, 0.4) or list(layers)[:_NAMES]
            allowed = f"a glob of dotted names, such as {', '.join(close)}" if close else "a model with linear layers"
            raise PatternError(f"patterns[{glob!r}]", given="no linear layer of such a name", allowed=allowed)
    found = {}
    for name, module in layers.items():
        pattern = next((pattern for glob, pattern in patterns.items() if fnmatchcase(name, glob)), None)
        if pattern is not None:
            found[name] = module, pattern
    return found


def is_linear(module: nn.Module) -> bool:
    """Layers that compute x W^T + bias and nothing else, which a subclass may not."""
    return type(module) is nn.Linear or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _dense(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] and the bias of a linear layer; Conv1D keeps the weight turned."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return (weight.detach().T.contiguous() if _is_conv1d(module) else weight.detach()), bias


def _ranks_inputs(pattern: Pattern) -> bool:
    return any(is_selected(op) and op["scores"] == "wanda()" for op in walk(pattern.node))


def _input_norms(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable[Any] | None
) -> dict[str, Tensor]:
    """The norm of each input feature of each layer over all batches, float32 [K]."""
    if calibration is None:
        raise DataError(
            "calibration", given="nothing", allowed="batches that the model takes, because wanda() ranks by inputs"
        )
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), _evaluating(model), _adding(layers, sums):
        for batch in calibration:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    for name in layers:
        if name not in sums:
            raise DataError("calibration", given=f"no input for {name}", allowed="batches that reach every layer")
    return {name: total.sqrt() for name, total in sums.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout meanwhile."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _adding(layers: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Meanwhile the squares of all layers' inputs are added up, feature by feature."""

    def listen(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LayerSparsity:
    """A weight's storage, the share of values that are stored, and bytes, beside those of the dense weight.

    Quantised weights are compared with dense ones of 16 bits.
    """

    name: str
    shape: tuple[int, int]
    storage: str
    density: float
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Sparsity:
    """What :func:`sparsity` found, in the model's order; printable."""

    layers: tuple[LayerSparsity, ...]

    @property
    def bytes(self) -> int:
        """Of all sparse weights."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of the same weights, dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "storage", "stored", "MB", "of dense")]
        rows += [
            (one.name, one.storage, f"{one.density:.1%}", f"{one.bytes / 1e6:.2f}", _share(one.bytes, one.dense_bytes))
            for one in self.layers
        ]
        rows.append(("all", "", "", f"{self.bytes / 1e6:.2f}", _share(self.bytes, self.dense_bytes)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = zip(row, widths, strict=True)
    return "  ".join(text.ljust(width) if at < 2 else text.rjust(width) for at, (text, width) in enumerate(cells))


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def sparsity(model: nn.Module) -> Sparsity:
    """Storage, density and bytes of each sparse weight of a model."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Weight):
            n, k = module.shape
            stored = module.stored
            item = 2 if stored.scales is not None else stored.values.element_size()
            share = float(stored.mask().sum()) / max(1, n * k)
            layer = name.removesuffix(".weight") if name != "weight" else "weight"
            found.append(LayerSparsity(layer, (n, k), module.layout, share, stored.nbytes, n * k * item))
    return Sparsity(tuple(found))
