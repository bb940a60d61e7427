"""The PyTorch operators: `torch.ops.spgen.attention` and `torch.ops.spgen.plan`.

The pattern travels as text and its tensors as a list, so an exported graph is readable and complete. Importing this
module registers the operators; `sp.attention` does so by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spgen.compile import Compiled, Request, compiled, is_packed, lowered
from spgen.data import check_shapes
from spgen.errors import DeviceError, DtypeError, GradientError, PlanError, ShapeError, UnsupportedError
from spgen.ir.kernel import parts
from spgen.ir.pattern import read_short
from spgen.ir.tiles import table_ops
from spgen.passes.schedule import Call
from spgen.settings import settings, triton_interpreted
from spgen.tables import Builder
from spgen.target import Target

_SCHEMA = """attention(
    Tensor q, Tensor k, Tensor v, Tensor[] data, Tensor[] plan, str pattern, Tensor? cu_seqlens_q,
    Tensor? cu_seqlens_k, Tensor? q_offset, SymInt? q_start, Tensor? kv_lengths, Tensor? sink_logits, Tensor? bias,
    float? scale, float? softcap, bool return_lse
) -> (Tensor, Tensor)"""
_PLAN_SCHEMA = """plan(
    Tensor q, Tensor k, Tensor[] data, str pattern, Tensor? q_offset, SymInt? q_start, Tensor? kv_lengths
) -> Tensor[]"""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MAX_HEAD_DIM = 256
_MANY_CALLS = 4096  # different calls to remember; a cache of keys that grows makes a new one at each step
Offset: TypeAlias = "Tensor | int | None"


@dataclass(frozen=True)
class _Ready:
    """A call's kernel, and what of the plan it reads."""

    compiled: Compiled
    launch: Callable[..., None] | None  # None: there is nothing to compute
    needs_tables: bool
    read: tuple[int, ...]
    starts_empty: bool  # whether the kernel may leave rows of the result unwritten
    scale: float


_ready: dict[tuple[Any, ...], _Ready] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    data: Sequence[Tensor],
    plan: Sequence[Tensor],
    pattern: str,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    q_start: int | None,
    kv_lengths: Tensor | None,
    sink_logits: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the operator does on CPUs and GPUs; arguments are those of its schema."""
    if not (cu_seqlens_q is None and cu_seqlens_k is None and sink_logits is None and bias is None and softcap is None):
        _refuse(
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sink_logits=sink_logits, bias=bias, softcap=softcap
        )
    offset: Offset = q_offset if q_start is None else q_start
    key = (
        pattern, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, return_lse,
        offset.__class__, kv_lengths is None, None if plan else tuple([(t.shape, t.device) for t in data]),
    )  # fmt: skip
    ready = _ready.get(key)
    if ready is None:
        ready = _prepare(q, k, v, data, pattern, offset, kv_lengths, return_lse)
        if plan:
            _check_tiles(ready.compiled)
        if len(_ready) >= _MANY_CALLS:
            _ready.clear()
        _ready[key] = ready
    out = _like(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    if ready.starts_empty:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    if ready.launch is None:
        return out, lse
    tables: Sequence[Tensor] = ()
    if ready.needs_tables:
        built = plan or _tables(ready.compiled.lowered.program, q, k, data, offset, kv_lengths)
        tables = [built[at] for at in ready.read]
    ready.launch(q, k, v, out, lse, tables, offset, kv_lengths, ready.scale if scale is None else scale)
    return out, lse


def _operator(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The dispatcher wants a tensor in the place of a log-sum-exp that nobody asked for."""
    out, lse = attention(q, *rest)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _like(q: Tensor, value_dim: int) -> Tensor:
    """An uninitialised result whose axes lie in memory as q's do, the innermost contiguous."""
    if q.shape[3] == value_dim:
        out = torch.empty_like(q)
        if out.stride(3) == 1:
            return out
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, rows, heads, value_dim)).transpose(1, 2)
    return q.new_empty((batch, heads, rows, value_dim))


def is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing stands between a call and its kernel: no tracing, transform, autocast or gradient.

    The dispatcher takes 20 us to find that out, more than a small kernel runs.
    """
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and not torch.is_autocast_enabled(q.device.type)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise UnsupportedError(name, given="a value", allowed="None", remedy="no kernel takes this argument yet")


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], pattern: str, offset: Offset, kv_lengths: Tensor | None,
    return_lse: bool,
) -> _Ready:  # fmt: skip
    """Checks a new kind of call and compiles its kernel."""
    _check(q, k, v, data, pattern, offset, kv_lengths)
    request = _request(q, k, v.shape[3], pattern, offset, kv_lengths, return_lse)
    done = compiled(request)
    names = [op["name"] for op in table_ops(done.lowered.program)]
    read = tuple(names.index(op["name"]) for op in parts(done.lowered.kernel, "table"))
    idle = 0 in (*q.shape, k.shape[2])
    starts_empty = idle or done.lowered.kernel["row"] is not None
    return _Ready(done, None if idle else done.kernel, bool(names), read, starts_empty, 1 / math.sqrt(q.shape[3]))


def _check_tiles(done: Compiled) -> None:
    """A plan is made for values as wide as keys; other widths may choose other tiles, whose tables differ."""
    call = done.request.call
    planned = lowered(replace(done.request, call=replace(call, value_dim=call.head_dim, lse=False))).program
    if table_ops(planned) != table_ops(done.lowered.program):
        raise PlanError(
            "plan", given=f"one for values of size {call.head_dim}, and v of size {call.value_dim}",
            allowed="tiles that agree", remedy="call without plan=",
        )  # fmt: skip


def _request(
    q: Tensor, k: Tensor, value_dim: int, pattern: str, offset: Offset, kv_lengths: Tensor | None, return_lse: bool
) -> Request:
    """What a kernel is specialised for; while tracing, int() fixes the heads and head sizes of the graph."""
    mode = "default" if offset is None else "tensor" if isinstance(offset, Tensor) else "scalar"
    call = Call(_DTYPES[q.dtype], int(q.shape[3]), int(value_dim), mode, kv_lengths is not None, return_lse)
    heads = int(q.shape[1]), int(k.shape[1])
    request = Request(pattern, call, *heads, False, Target.of(q.device))
    packed = is_packed(pattern, *heads, q.shape[2], lowered(request).kernel["block_m"])
    return replace(request, packed=packed)


def _tables(
    program: Any, q: Tensor, k: Tensor, data: Sequence[Tensor], offset: Offset, kv_lengths: Tensor | None
) -> list[Tensor]:
    keys = k.shape[2]
    kv_len = keys if kv_lengths is None else kv_lengths.clamp(0, keys)
    builder = Builder(
        data, q.device, q.shape[0], q.shape[1], k.shape[1], q.shape[2], keys,
        q_offset=kv_len - q.shape[2] if offset is None else offset, kv_len=kv_len,
    )  # fmt: skip
    return builder.build(program)


def _plan(
    q: Tensor, k: Tensor, data: Sequence[Tensor], pattern: str, q_offset: Tensor | None, q_start: int | None,
    kv_lengths: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    offset: Offset = q_offset if q_start is None else q_start
    _check(q, k, k, data, pattern, offset, kv_lengths)
    request = _request(q, k, k.shape[3], pattern, offset, kv_lengths, False)
    return _tables(lowered(request).program, q, k, data, offset, kv_lengths)


def _check(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], pattern: str, offset: Offset, kv_lengths: Tensor | None
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ShapeError(name, given=f"{tensor.dim()} axes", allowed="4 axes: [batch, heads, length, head size]")
        if tensor.device != q.device:
            raise DeviceError(name, given=str(tensor.device), allowed=f"{q.device}, the device of q")
        if tensor.dtype != q.dtype:
            raise DtypeError(name, given=str(tensor.dtype), allowed=f"{q.dtype}, the dtype of q")
    _check_sizes(q, k, v)
    _check_dtype(q)
    for name, value in (("q_offset", offset), ("kv_lengths", kv_lengths)):
        if isinstance(value, Tensor):
            _check_per_sequence(name, value, q)
    check_shapes(
        read_short(pattern), data, q_len=q.shape[2], kv_len=k.shape[2], q_heads=q.shape[1], kv_heads=k.shape[1],
        batch=q.shape[0], device=q.device,
    )  # fmt: skip


def _check_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    batch, heads, _, head_dim = q.shape
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ShapeError("k, v", given=f"batches of {k.shape[0]} and {v.shape[0]}", allowed=f"{batch}, the batch of q")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError("v", given=f"{list(v.shape)}", allowed=f"k's heads and length, {list(k.shape[1:3])}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ShapeError("k", given=f"{k.shape[1]} heads", allowed=f"a number that divides the {heads} heads of q")
    if k.shape[3] != head_dim:
        raise ShapeError("k", given=f"head size {k.shape[3]}", allowed=f"{head_dim}, the head size of q")
    for name, size in (("q", head_dim), ("v", v.shape[3])):
        if not 1 <= size <= _MAX_HEAD_DIM:
            raise ShapeError(name, given=f"head size {size}", allowed=f"1 to {_MAX_HEAD_DIM}")


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in _DTYPES:
        allowed = ", ".join(_DTYPES.values())
        raise DtypeError("q", given=str(q.dtype), allowed=allowed, remedy="convert q, k and v")
    compiled_for_cpu = q.device.type == "cpu" and settings().backend != "triton"
    if q.device.type == "cpu" and not compiled_for_cpu and not triton_interpreted():
        raise DeviceError("q", given="cpu with SPGEN_BACKEND=triton", allowed="a GPU, or TRITON_INTERPRET=1")


def _check_per_sequence(name: str, value: Tensor, q: Tensor) -> None:
    if value.dtype not in (torch.int32, torch.int64):
        raise DtypeError(name, given=str(value.dtype), allowed="int32 or int64")
    if tuple(value.shape) != (q.shape[0],):
        raise ShapeError(name, given=list(value.shape), allowed=f"[{q.shape[0]}], one for each sequence")
    if value.device != q.device:
        raise DeviceError(name, given=str(value.device), allowed=f"{q.device}, the device of q")


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], plan: Sequence[Tensor], pattern: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3] if rest[-1] else (0,), dtype=torch.float32)


def _fake_plan(
    q: Tensor, k: Tensor, data: Sequence[Tensor], pattern: str, q_offset: Tensor | None, q_start: int | None,
    kv_lengths: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    # Tables are made of ordinary tensor operations, which know their shapes.
    return _plan(q, k, data, pattern, q_offset, q_start, kv_lengths)


def _no_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise GradientError(
        "attention: gradient", given="a backward pass", allowed="forward only", remedy="call under torch.no_grad()"
    )


def _autocast_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """As scaled_dot_product_attention: under autocast it runs in the low-precision type."""
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return torch.ops.spgen.attention(q.to(dtype), k.to(dtype), v.to(dtype), *rest)


_library = torch.library.Library("spgen", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(_PLAN_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA"):
    _library.impl("attention", _operator, _key)
    _library.impl("plan", _plan, _key)
    _library.impl("attention", _autocast_attention, f"Autocast{_key}")
torch.library.register_fake("spgen::attention", _fake_attention, lib=_library)
torch.library.register_fake("spgen::plan", _fake_plan, lib=_library)
torch.library.register_autograd("spgen::attention", _no_gradient, lib=_library)
