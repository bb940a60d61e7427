"""The PyTorch operators of sparse weights: `torch.ops.spgen.linear` and `gated`, and their gradients.

A weight travels as its tensors with its storage's text, so an exported graph is readable and complete. Importing this
module registers the operators; `sp.linear` does so by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spgen.arguments import DTYPES
from spgen.backends.derived import forget
from spgen.errors import DeviceError, DtypeError, GradientError, ShapeError, UnsupportedError
from spgen.ir.kernel import ACTIVATIONS
from spgen.target import Target
from spgen.weights.compile import Request, ResultKernel, Sizes, linear_kernel, sampled_kernel
from spgen.weights.storage import Layout, Stored, taken, values_dtype

_MANY_CALLS = 4096  # different calls to remember
Run: TypeAlias = "Callable[[Tensor, tuple[Stored, ...], Tensor | None], Tensor]"
_ready: dict[tuple[Any, ...], Run] = {}

Index: TypeAlias = "Sequence[Tensor]"

_SCHEMAS = (
    """linear(
        Tensor x, Tensor values, Tensor[] index, Tensor? scales, Tensor? bias, str layout, int n, int k, str activation
    ) -> Tensor""",
    """gated(
        Tensor x, Tensor gate, Tensor[] gate_index, Tensor? gate_scales, Tensor up, Tensor[] up_index,
        Tensor? up_scales, Tensor? bias, str layout, int n, int k, str activation
    ) -> Tensor""",
    "linear_of_inputs(Tensor g, Tensor values, Tensor[] index, Tensor? scales, str layout, int n, int k) -> Tensor",
    "linear_of_weights(Tensor g, Tensor x, Tensor values, Tensor[] index, str layout, int n, int k) -> Tensor",
)


def linear(
    x: Tensor, values: Tensor, index: Index, scales: Tensor | None, bias: Tensor | None, layout: str, n: int, k: int,
    activation: str,
) -> Tensor:  # fmt: skip
    """activation(x W^T + bias): x [..., K] to [..., N]."""
    weight = Stored(_layout(layout), (n, k), values, tuple(index), scales)
    return product(x, (weight,), bias, activation)


def gated(
    x: Tensor, gate: Tensor, gate_index: Index, gate_scales: Tensor | None, up: Tensor, up_index: Index,
    up_scales: Tensor | None, bias: Tensor | None, layout: str, n: int, k: int, activation: str,
) -> Tensor:  # fmt: skip
    """activation(x gate^T + bias) * (x up^T): x [..., K] to [..., N]."""
    one = Stored(_layout(layout), (n, k), gate, tuple(gate_index), gate_scales)
    other = Stored(_layout(layout), (n, k), up, tuple(up_index), up_scales)
    return product(x, (one, other), bias, activation)


def linear_of_inputs(
    g: Tensor, values: Tensor, index: Index, scales: Tensor | None, layout: str, n: int, k: int
) -> Tensor:
    """The gradient of x: g W, [..., N] to [..., K]."""
    weight = Stored(_layout(layout), (n, k), values, tuple(index), scales)
    if weight.layout.kind != "blocks":
        return g @ weight.dense().to(g.dtype)
    return product(g, (weight,), None, "none", transposed=True)


def linear_of_weights(g: Tensor, x: Tensor, values: Tensor, index: Index, layout: str, n: int, k: int) -> Tensor:
    """The gradient of stored values: those places of g^T x, summed over all rows. They are about to change."""
    forget(values)
    weight = Stored(_layout(layout), (n, k), values, tuple(index))
    rows, inputs = rows_of(g), rows_of(x)
    if weight.layout.kind != "blocks":
        return taken(weight, rows.T @ inputs).to(values.dtype)
    result = torch.empty_like(values)
    if not rows.shape[0]:
        return result.zero_()
    if result.numel():
        sizes = Sizes(_bucket(rows.shape[0]), n, k, values.numel())
        sampled_kernel(request_of(x, (weight,)), sizes)(rows, inputs, weight, result)
    return result


def product(
    x: Tensor, weights: tuple[Stored, ...], bias: Tensor | None, activation: str, *, transposed: bool = False
) -> Tensor:
    """activation(x W^T + bias) of one weight, gated of two; transposed: x W."""
    first = weights[0]
    key = (
        x.shape, x.stride(), x.dtype, x.device, first.layout, first.shape, activation, transposed,
        None if bias is None else (bias.shape, bias.dtype),
        *[(w.values.shape, w.values.dtype, w.values.device, w.scales is None) for w in weights],
    )  # fmt: skip
    run = _ready.get(key)
    if run is None:
        run = _prepared(x, weights, bias, activation, transposed)
        if len(_ready) >= _MANY_CALLS:
            _ready.clear()
        _ready[key] = run
    y = run(rows_of(x), weights, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _prepared(x: Tensor, weights: tuple[Stored, ...], bias: Tensor | None, activation: str, transposed: bool) -> Run:
    """Checks a new kind of call and compiles its kernel: a function of x [M, K], the weights and the bias."""
    shape = weights[0].shape
    _check(x, weights, bias, activation, shape[0 if transposed else 1])
    rows = x.numel() // max(x.shape[-1], 1)
    sizes = Sizes(_bucket(max(rows, 1)), *shape, sum(weight.values.numel() for weight in weights))
    request = request_of(x, weights, transposed, bias is not None, activation)
    kernel = linear_kernel(request, sizes)
    if isinstance(kernel, ResultKernel):
        return kernel.result
    width = shape[1 if transposed else 0]

    def written(x: Tensor, weights: tuple[Stored, ...], bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], width)
        if y.numel():
            kernel(x, weights, bias, y)
        return y

    return written


def _bucket(rows: int) -> int:
    """Rows that choose a configuration: powers of two, so that a kernel serves calls of about as many."""
    return 1 << (rows - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with contiguous columns."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@lru_cache(maxsize=1024)
def _layout(text: str) -> Layout:
    return Layout.read(text)


def request_of(
    x: Tensor, weights: tuple[Stored, ...], transposed: bool = False, bias: bool = False, activation: str = "none"
) -> Request:
    """What a call's kernel is specialised for."""
    one = weights[0]
    return Request(
        DTYPES[x.dtype], one.layout, values_dtype(one), one.scales is not None, Target.of(x.device), transposed,
        len(weights) > 1, bias, activation,
    )  # fmt: skip


def _check(x: Tensor, weights: tuple[Stored, ...], bias: Tensor | None, activation: str, width: int) -> None:
    if x.dim() < 1 or x.shape[-1] != width:
        raise ShapeError("x", given=f"shape {list(x.shape)}", allowed=f"[..., {width}], the weight's features")
    if x.dtype not in DTYPES:
        raise DtypeError("x", given=str(x.dtype), allowed=", ".join(DTYPES.values()))
    if activation not in ACTIVATIONS:
        raise UnsupportedError("activation", given=repr(activation), allowed=", ".join(ACTIVATIONS))
    if len({(weight.layout, weight.shape, values_dtype(weight)) for weight in weights}) > 1:
        raise UnsupportedError("gate and up", given="weights stored in different ways", allowed="one pattern for both")
    for weight in weights:
        if weight.values.device != x.device:
            raise DeviceError("x", given=str(x.device), allowed=f"{weight.values.device}, where the weight is")
        if weight.scales is None and weight.values.dtype != x.dtype:
            raise DtypeError(
                "x", given=str(x.dtype), allowed=f"{weight.values.dtype}, as the weight", remedy="use .to(dtype) on one"
            )
    if bias is not None and (bias.shape != weights[0].shape[:1] or bias.dtype != x.dtype):
        given = f"{bias.dtype} {list(bias.shape)}"
        raise ShapeError("bias", given=given, allowed=f"{x.dtype} [{weights[0].shape[0]}]")


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, scales, bias, ctx.layout, ctx.n, ctx.k, ctx.activation = inputs
    ctx.save_for_backward(x, values, scales, bias, *index)


def _back_linear(ctx: Any, g: Tensor) -> Any:
    x, values, scales, bias, *index = ctx.saved_tensors
    _refuse_quantized(scales, ctx.needs_input_grad[1])
    where = (ctx.layout, ctx.n, ctx.k)
    if ctx.activation != "none":
        g = _derivative(g, torch.ops.spgen.linear(x, values, index, scales, bias, *where, "none"), ctx.activation)
    return *_gradients(ctx, g, x, values, index, scales, bias, where), None, None, None, None


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, values: Tensor, index: list[Tensor], scales: Tensor | None, bias: Tensor | None,
    where: tuple[str, int, int],
) -> tuple[Any, ...]:  # fmt: skip
    """Of x, the values, the index, the scales and the bias."""
    of_x, of_values, _, _, of_bias, *_ = ctx.needs_input_grad
    return (
        torch.ops.spgen.linear_of_inputs(g, values, index, scales, *where) if of_x else None,
        torch.ops.spgen.linear_of_weights(g, x, values, index, *where) if of_values else None,
        [None] * len(index),
        None,
        g.reshape(-1, g.shape[-1]).sum(0) if bias is not None and of_bias else None,
    )


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, gate_index, gate_scales, up, up_index, up_scales, bias, *rest = inputs
    ctx.layout, ctx.n, ctx.k, ctx.activation = rest
    ctx.split = len(gate_index)
    ctx.save_for_backward(x, gate, gate_scales, up, up_scales, bias, *gate_index, *up_index)


def _back_gated(ctx: Any, g: Tensor) -> Any:
    x, gate, gate_scales, up, up_scales, bias, *index = ctx.saved_tensors
    _refuse_quantized(gate_scales, ctx.needs_input_grad[1] or ctx.needs_input_grad[4])
    of_gate, of_up = index[: ctx.split], index[ctx.split :]
    where = (ctx.layout, ctx.n, ctx.k)
    before = torch.ops.spgen.linear(x, gate, of_gate, gate_scales, bias, *where, "none")
    multiplied = torch.ops.spgen.linear(x, up, of_up, up_scales, None, *where, "none")
    g_gate, g_up = _derivative(g * multiplied, before, ctx.activation), g * activated(before, ctx.activation)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.spgen.linear_of_inputs(g_gate, gate, of_gate, gate_scales, *where)
        dx = dx + torch.ops.spgen.linear_of_inputs(g_up, up, of_up, up_scales, *where)
    d_gate = d_up = d_bias = None
    if ctx.needs_input_grad[1]:
        d_gate = torch.ops.spgen.linear_of_weights(g_gate, x, gate, of_gate, *where)
    if ctx.needs_input_grad[4]:
        d_up = torch.ops.spgen.linear_of_weights(g_up, x, up, of_up, *where)
    if bias is not None and ctx.needs_input_grad[7]:
        d_bias = g_gate.reshape(-1, g.shape[-1]).sum(0)
    none = [None] * ctx.split
    return dx, d_gate, none, None, d_up, none, None, d_bias, None, None, None, None


def _refuse_quantized(scales: Tensor | None, wanted: bool) -> None:
    if scales is not None and wanted:
        raise GradientError("weight: gradient", given="quantised values", allowed="floating-point values")


def activated(x: Tensor, activation: str) -> Tensor:
    """activation(x), by PyTorch."""
    if activation.startswith("gelu"):
        return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "none":
        return x
    return torch.relu(x) if activation == "relu" else torch.nn.functional.silu(x)


def _derivative(g: Tensor, x: Tensor, activation: str) -> Tensor:
    """g times the activation's derivative at x."""
    found = g
    if activation.startswith("gelu"):
        found = torch.ops.aten.gelu_backward(g, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation != "none":
        found = (
            torch.ops.aten.silu_backward(g, x) if activation == "silu" else torch.ops.aten.threshold_backward(g, x, 0)
        )
    return found


def _fake_product(x: Tensor, *rest: Any) -> Tensor:
    n = rest[-3]  # before k and the activation
    return x.new_empty(*x.shape[:-1], n)


def _fake_of_inputs(g: Tensor, *rest: Any) -> Tensor:
    return g.new_empty(*g.shape[:-1], rest[-1])


def _fake_of_weights(g: Tensor, x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(values)


def _autocast_linear(
    x: Tensor, values: Tensor, index: Index, scales: Tensor | None, bias: Tensor | None, *rest: Any
) -> Any:
    """As torch.nn.functional.linear: under autocast it runs in the low-precision type."""
    kind = x.device.type
    low = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        values, bias = _cast(values, scales, low), None if bias is None else bias.to(low)
        return torch.ops.spgen.linear(x.to(low), values, index, scales, bias, *rest)


def _autocast_gated(
    x: Tensor, gate: Tensor, gate_index: Index, gate_scales: Tensor | None, up: Tensor, up_index: Index,
    up_scales: Tensor | None, bias: Tensor | None, *rest: Any,
) -> Any:  # fmt: skip
    kind = x.device.type
    low = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        gate, up = _cast(gate, gate_scales, low), _cast(up, up_scales, low)
        bias = None if bias is None else bias.to(low)
        return torch.ops.spgen.gated(x.to(low), gate, gate_index, gate_scales, up, up_index, up_scales, bias, *rest)


def _cast(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return values if scales is not None else values.to(dtype)


_library = torch.library.Library("spgen", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_FAKES = {
    "linear": (linear, _fake_product), "gated": (gated, _fake_product),
    "linear_of_inputs": (linear_of_inputs, _fake_of_inputs),
    "linear_of_weights": (linear_of_weights, _fake_of_weights),
}  # fmt: skip
for _name, (_function, _fake) in _FAKES.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"spgen::{_name}", _fake, lib=_library)
for _key in ("CPU", "CUDA"):
    _library.impl("linear", _autocast_linear, f"Autocast{_key}")
    _library.impl("gated", _autocast_gated, f"Autocast{_key}")
torch.library.register_autograd("spgen::linear", _back_linear, setup_context=_setup_linear, lib=_library)
torch.library.register_autograd("spgen::gated", _back_gated, setup_context=_setup_gated, lib=_library)
