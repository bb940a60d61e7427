"""The PyTorch operators of active neurons: `torch.ops.spgen.neurons` and `channels`, and their dense definitions.

On the CPU active rows of weights are gathered for each list; on GPUs kernels of `spgen.backends.triton_neurons` make
lists and use them, without waiting for the device.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from spgen.weights.ops import activated

_FEW = 32  # lists up to which gathering on the CPU beats computing all neurons
_BAGS = 8  # parts of a sum, each a worker's

_SCHEMAS = (
    """neurons(
        Tensor x, Tensor scores, Tensor? factor, Tensor? gate, Tensor up, Tensor down, Tensor? hidden_bias,
        Tensor? bias, str activation, float threshold, bool positive, int rows
    ) -> Tensor""",
    """channels(
        Tensor x, Tensor scores, Tensor weight, Tensor? bias, float threshold, bool positive, int rows
    ) -> Tensor""",
)


def flags_of(scores: Tensor, threshold: float, positive: bool, rows: int) -> Tensor:
    """What each row of a call computes, bool [M, F]: whatever is active in any row of its list. NaN is not active."""
    flags = scores > threshold if positive else scores.abs() >= threshold
    m, f = flags.shape
    if rows == 1 or not m:
        return flags
    grouped = torch.nn.functional.pad(flags, (0, 0, 0, -m % rows)).view(-1, rows, f).any(1)
    return grouped.repeat_interleave(rows, 0)[:m]


def dense_neurons(
    x: Tensor, scores: Tensor, factor: Tensor | None, gate: Tensor | None, up: Tensor, down: Tensor,
    hidden_bias: Tensor | None, bias: Tensor | None, activation: str, threshold: float, positive: bool, rows: int,
) -> Tensor:  # fmt: skip
    """The definition: (m * factor * h) down + bias, h = activation(x gate^T + hidden_bias) * (x up^T), m the active.

    x [M, K], scores and factor [M, F], gate and up [F, K], down [F, D]; without a gate h is activation(x up^T +
    hidden_bias).
    """
    h = _hidden(x, gate, up, hidden_bias, activation)
    h = h if factor is None else factor * h
    return _plus(h.masked_fill(~flags_of(scores, threshold, positive, rows), 0) @ down, bias)


def dense_channels(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, positive: bool, rows: int
) -> Tensor:
    """The definition: (m * x) weight + bias, x and scores [M, K], weight [K, N]; to m gradients pay no heed."""
    kept = x.masked_fill(~flags_of(scores, threshold, positive, rows), 0)
    return _plus((x + (kept - x).detach() if x.requires_grad else kept) @ weight, bias)


def _hidden(x: Tensor, gate: Tensor | None, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    first = x @ (up if gate is None else gate).T
    h = activated(first if bias is None else first + bias, activation)
    return h if gate is None else h * (x @ up.T)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _neurons_cpu(
    x: Tensor, scores: Tensor, factor: Tensor | None, gate: Tensor | None, up: Tensor, down: Tensor,
    hidden_bias: Tensor | None, bias: Tensor | None, activation: str, threshold: float, positive: bool, rows: int,
) -> Tensor:  # fmt: skip
    if len(x) > _FEW * rows:
        return dense_neurons(
            x, scores, factor, gate, up, down, hidden_bias, bias, activation, threshold, positive, rows
        )
    flags = flags_of(scores, threshold, positive, rows)
    y = x.new_empty(len(x), down.shape[1])
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        index = flags[start].nonzero().flatten()
        own, of_gate = (None if one is None else one.index_select(0, index) for one in (hidden_bias, gate))
        h = _hidden(x[part], of_gate, up.index_select(0, index), own, activation)
        y[part] = _sums(h if factor is None else h * factor[part, index], index, down)
    return _plus(y, bias)


def _sums(h: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """h [rows, active] times these rows of the weight: one row without a copy of them, by several workers."""
    if len(h) > 1:
        return h @ weight.index_select(0, index)
    bags = _BAGS if h.dtype == torch.float32 else 1  # sums of parts would be rounded
    starts = torch.arange(bags) * len(index) // bags
    return embedding_bag(index, weight, starts, mode="sum", per_sample_weights=h[0]).sum(0, keepdim=True)


def _channels_cpu(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, positive: bool, rows: int
) -> Tensor:
    if len(x) > _FEW * rows:
        return dense_channels(x, scores, weight, bias, threshold, positive, rows)
    flags = flags_of(scores, threshold, positive, rows)
    y = x.new_empty(len(x), weight.shape[1])
    for start in range(0, len(x), rows):
        part, index = slice(start, start + rows), flags[start].nonzero().flatten()
        y[part] = _sums(x[part, index], index, weight)
    return _plus(y, bias)


def _neurons_cuda(
    x: Tensor, scores: Tensor, factor: Tensor | None, gate: Tensor | None, up: Tensor, down: Tensor,
    hidden_bias: Tensor | None, bias: Tensor | None, activation: str, threshold: float, positive: bool, rows: int,
) -> Tensor:  # fmt: skip
    kernels = _kernels()
    index, count = kernels.compact(scores.contiguous(), threshold, rows, positive)
    if factor is not None and gate is None and activation == "none":
        h = kernels.up(x, up, index, count, factor.contiguous(), None, "none", rows)
    else:
        h = kernels.up(x, up, index, count, None, hidden_bias, activation, rows, gate)
        if factor is not None:  # behind a list's end its columns are anything
            of_row = index.clamp(0, max(0, factor.shape[1] - 1)).long().repeat_interleave(rows, 0)[: len(x)]
            h = h * factor.gather(1, of_row)
    y: Tensor = kernels.down(h, down, index, count, bias, rows_per_list=rows)
    return y


def _channels_cuda(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, positive: bool, rows: int
) -> Tensor:
    kernels = _kernels()
    index, count = kernels.compact(scores.contiguous(), threshold, rows, positive)
    y: Tensor = kernels.down(x, weight, index, count, bias, compacted=False, rows_per_list=rows)
    return y


def _kernels() -> Any:
    return import_module("spgen.backends.triton_neurons")


def _fake_neurons(x: Tensor, scores: Tensor, factor: Any, gate: Any, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[1])


def _fake_channels(x: Tensor, scores: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


_library = torch.library.Library("spgen", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _cpu, _cuda, _fake in (
    ("neurons", _neurons_cpu, _neurons_cuda, _fake_neurons),
    ("channels", _channels_cpu, _channels_cuda, _fake_channels),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"spgen::{_name}", _fake, lib=_library)
neurons: Any = torch.ops.spgen.neurons
channels: Any = torch.ops.spgen.channels
