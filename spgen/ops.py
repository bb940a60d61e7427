"""The PyTorch operators: `torch.ops.spgen.attention` and `torch.ops.spgen.plan`.

The pattern travels as text and its tensors as a list, so an exported graph is readable and complete. Importing this
module registers the operators; `sp.attention` does so by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spgen.arguments import FLOAT8, Arguments, Offset, as_batch, check, extras_of, kinds, sequences_of
from spgen.compile import Compiled, Request, compiled, lowered, planner_of
from spgen.errors import CompileError, GradientError, PlanError
from spgen.ir.node import Op
from spgen.ir.tiles import table_ops
from spgen.passes.schedule import Call
from spgen.settings import logger, settings
from spgen.tables import Builder
from spgen.target import Target
from spgen.tuned import Sizes, config_of, request_for

_SCHEMA = """attention(
    Tensor q, Tensor k, Tensor v, Tensor[] data, Tensor[] plan, str pattern, Tensor? cu_seqlens_q,
    Tensor? cu_seqlens_k, Tensor? q_offset, SymInt? q_start, Tensor? kv_lengths, Tensor? sink_logits, Tensor? bias,
    float? scale, float? softcap, bool return_lse, bool dense=False, Tensor[]? scales=None
) -> (Tensor, Tensor)"""
_PLAN_SCHEMA = """plan(
    Tensor q, Tensor k, Tensor[] data, str pattern, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_offset,
    SymInt? q_start, Tensor? kv_lengths
) -> Tensor[]"""

_MANY_CALLS = 4096  # different calls to remember; a cache of keys that grows makes a new one at each step


@dataclass(frozen=True)
class _Ready:
    """What calls of one kind share: the kernel, and how it is launched."""

    compiled: Compiled
    launch: Callable[..., None] | None  # for operands of one kind; None: there is nothing to compute
    read: tuple[int, ...] | None  # the tables of the plan that the kernel takes; None: the pattern has no plan
    make: Callable[..., list[Tensor]] | None  # makes the tables, if the kernel takes any
    dense: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None  # takes the kernel's place
    starts_empty: bool  # whether the kernel may leave rows of the result unwritten
    is_like_q: bool  # the result, in shape, strides and dtype
    lse_shape: tuple[int, ...]
    scale: float


_ready: dict[tuple[Any, ...], _Ready] = {}
_makers: dict[tuple[Any, ...], Callable[..., list[Tensor]]] = {}


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
    dense: bool = False,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the operator does on CPUs and GPUs; arguments are those of its schema.

    Float8 comes with the `scales` of q, k and v (see spgen/float8.py), and v with keys innermost.
    """
    offset, kv_lengths = _places(q_offset, q_start, kv_lengths)
    plain = (
        cu_seqlens_q is None and cu_seqlens_k is None and sink_logits is None and bias is None and softcap is None
        and not scales
    )  # fmt: skip
    key = (
        pattern, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
        k.device, v.device, return_lse, dense,
        None if offset is None else int if isinstance(offset, int) else offset.dtype,
        None if kv_lengths is None else kv_lengths.dtype,
        # the data of a plan are not read, but their shapes choose the tiles
        tuple([t.shape if plan else (t.shape, t.stride(), t.dtype, t.device) for t in data]) if data else None,
        tuple([(t.shape, t.stride()) for t in plan]) if plan else None,
        None if plain else kinds(cu_seqlens_q, cu_seqlens_k, sink_logits, bias, softcap, scales),
    )  # fmt: skip
    ready = _ready.get(key)
    if ready is None:
        arguments = Arguments(
            q, k, v, data, pattern, cu_seqlens_q, cu_seqlens_k, offset, kv_lengths, sink_logits, bias, softcap,
            scales or (),
        )  # fmt: skip
        ready = _prepare(arguments, return_lse, dense and not plan)
        if plan:
            _check_tiles(ready.compiled, sizes_of(arguments))
        if len(_ready) >= _MANY_CALLS:
            _ready.clear()
        _ready[key] = ready
    if scale is None:
        scale = ready.scale
    if ready.dense is not None:
        return _laid_out(ready.dense(q, k, v, scale), q), None
    out = torch.empty_like(q) if ready.is_like_q else _like(q, v.shape[-1])
    lse = q.new_empty(ready.lse_shape, dtype=torch.float32) if return_lse else None
    if ready.starts_empty:
        _fill_empty(out, lse, sink_logits)
    if ready.launch is None:
        return out, lse
    tables: Sequence[Tensor] = ()
    if ready.read is not None:
        built = plan
        if not built:
            assert ready.make is not None
            built = ready.make(data, q, k, offset, kv_lengths, cu_seqlens_q, cu_seqlens_k)
        tables = [built[at] for at in ready.read]
    if plain:
        ready.launch(q, k, v, out, lse, tables, offset, kv_lengths, scale)
    elif cu_seqlens_q is None:
        extras = extras_of(q, k, sink_logits, bias, softcap, scales=scales or ())
        ready.launch(q, k, v, out, lse, tables, offset, kv_lengths, scale, extras)
    else:
        extras = extras_of(q, k, sink_logits, bias, softcap, cu_seqlens_q, cu_seqlens_k)
        views = [as_batch(x) for x in (q, k, v, out)]
        ready.launch(*views, None if lse is None else lse[None], tables, offset, kv_lengths, scale, extras)
    return out, lse


def _places(
    q_offset: Tensor | None, q_start: int | None, kv_lengths: Tensor | None
) -> tuple[Offset, Tensor | None]:  # fmt: skip
    """One offset of the operator's two, and lengths, as kernels read them: one number behind the other."""
    offset: Offset = q_offset.contiguous() if q_offset is not None and q_start is None else q_start
    return offset, None if kv_lengths is None else kv_lengths.contiguous()


def _operator(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The dispatcher wants a tensor in the place of a log-sum-exp that nobody asked for."""
    out, lse = attention(q, *rest)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _like(q: Tensor, value_dim: int) -> Tensor:
    """An uninitialised result whose axes lie in memory as q's do, the innermost contiguous."""
    dtype = torch.bfloat16 if q.dtype == FLOAT8 else q.dtype
    if q.shape[-1] == value_dim:
        out = torch.empty_like(q, dtype=dtype)
        if out.stride(-1) == 1:
            return out
    shape = (*q.shape[:-1], value_dim)
    if q.stride(-3) < q.stride(-2):
        return q.new_empty((*shape[:-3], shape[-2], shape[-3], value_dim), dtype=dtype).transpose(-3, -2)
    return q.new_empty(shape, dtype=dtype)


def _laid_out(result: Tensor, q: Tensor) -> Tensor:
    """A result with the strides that compiled graphs were promised."""
    out = _like(q, result.shape[-1])
    return result if result.stride() == out.stride() else out.copy_(result)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    """[B, Hq, Lq], or [Hq, T] for a packed batch."""
    return tuple(q.shape[:3]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def _fill_empty(out: Tensor, lse: Tensor | None, sink_logits: Tensor | None) -> None:
    """Rows without keys."""
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
        if sink_logits is not None:
            lse.copy_(sink_logits[:, None].expand(lse.shape))


def is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing stands between a call and its kernel: no tracing, transform, autocast or gradient.

    The dispatcher takes 20 us to find that out, more than a small kernel runs.
    """
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and not torch._C._is_any_autocast_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _prepare(arguments: Arguments, return_lse: bool, dense: bool) -> _Ready:
    """Checks a new kind of call and compiles its kernel."""
    check(arguments)
    q, k = arguments.q, arguments.k
    request = request_of(arguments, return_lse)
    instead = _dense_instead(arguments, request, return_lse) if dense else None
    done = compiled(request)
    idle = 0 in (*q.shape, k.shape[-2] if q.dim() == 4 else k.shape[0])
    starts_empty = idle or done.lowered.kernel["row"] is not None
    make = _maker(arguments, request, done.lowered.program) if done.needs_tables and not idle else None
    launch, read = None if idle else done.kernel.bind(), done.read if done.needs_tables else None
    is_like_q = q.dtype != FLOAT8 and q.shape[-1] == arguments.v.shape[-1] and torch.empty_like(q).stride(-1) == 1
    scale = 1 / math.sqrt(q.shape[-1])
    return _Ready(done, launch, read, make, instead, starts_empty, is_like_q, _lse_shape(q), scale)


def _dense_instead(arguments: Arguments, request: Request, return_lse: bool) -> Callable[..., Tensor] | None:
    """The dense attention that serves the call better, None if there is none."""
    from spgen.dispatch import dense_call, verdict

    found = verdict(arguments, request, return_lse)
    return dense_call(found, arguments.pattern) if found.dense else None


def _maker(arguments: Arguments, request: Request, program: Op) -> Callable[..., list[Tensor]]:
    """What makes the tables of such calls: a function of data, q, k, the offset, lengths and boundaries."""
    planned = _planned(arguments, request, program)

    def by_kernels(data: Sequence[Tensor], q: Tensor, k: Tensor, *call: Any) -> list[Tensor]:
        assert planned is not None
        return planned(data, *call)

    def by_operations(
        data: Sequence[Tensor], q: Tensor, k: Tensor, offset: Offset, kv_lengths: Tensor | None,
        cu_q: Tensor | None, cu_k: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        sequences = sequences_of(q, k, cu_q, cu_k, offset, kv_lengths)
        return Builder(data, sequences, request.q_heads, request.kv_heads).build(program)

    return by_operations if planned is None else by_kernels


def _planned(arguments: Arguments, request: Request, program: Op) -> Callable[..., list[Tensor]] | None:
    """The kernels that make the tables, None where tensor operations do."""
    planner = planner_of(program, request.target)
    if planner is None:
        return None
    try:
        return planner.ready(_builder(arguments, request))  # type: ignore[no-any-return]
    except CompileError:
        if not settings().no_compile:
            raise
        # `spgen compile` does not know how long the lists will be; tensor operations make the same tables
        logger().info("no planning kernel of %s is in the cache: its tables are made by torch", request.pattern)
        return None


def _builder(arguments: Arguments, request: Request) -> Builder:
    a = arguments
    sequences = sequences_of(a.q, a.k, a.cu_seqlens_q, a.cu_seqlens_k, a.q_offset, a.kv_lengths)
    return Builder(a.data, sequences, request.q_heads, request.kv_heads)


def _check_tiles(done: Compiled, sizes: Sizes) -> None:
    """A plan is made for values as wide as keys; other widths may choose other tiles, whose tables differ."""
    call = done.request.call
    like = replace(done.request, call=replace(call, value_dim=call.head_dim, lse=False))
    planned = lowered(replace(like, config=config_of(like, sizes))).program
    if table_ops(planned) != table_ops(done.lowered.program):
        raise PlanError(
            "plan", given=f"one for values of size {call.head_dim}, and v of size {call.value_dim}",
            allowed="tiles that agree", remedy="call without plan=",
        )  # fmt: skip


def request_of(arguments: Arguments, return_lse: bool = False, target: Target | None = None) -> Request:
    """What a kernel is specialised for; while tracing, int() fixes the heads and head sizes of the graph.

    `target` is the processor of the tensors unless another is given.
    """
    q, k, v, offset = arguments.q, arguments.k, arguments.v, arguments.q_offset
    heads_at = -3 if q.dim() == 4 else -2
    mode = "default" if offset is None else "tensor" if isinstance(offset, Tensor) else "scalar"
    bias = arguments.bias
    call = Call(
        arguments.dtype, int(q.shape[-1]), int(v.shape[-1]), mode, arguments.kv_lengths is not None, return_lse,
        arguments.cu_seqlens_q is not None, arguments.softcap is not None, arguments.sink_logits is not None,
        "none" if bias is None else "alibi" if bias.dim() == 2 else "key",
    )  # fmt: skip
    heads = int(q.shape[heads_at]), int(k.shape[heads_at])
    return request_for(arguments.pattern, call, *heads, target or Target.of(q.device), sizes_of(arguments))


def sizes_of(arguments: Arguments) -> Sizes:
    """The sizes that choose among records."""
    shapes = tuple(tensor.shape for tensor in arguments.data)
    return Sizes(arguments.batch, arguments.typical_rows, arguments.typical_keys, shapes)


def plan(
    q: Tensor,
    k: Tensor,
    data: Sequence[Tensor],
    pattern: str,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None,
    q_start: int | None,
    kv_lengths: Tensor | None,
) -> list[Tensor]:
    """The tables of a plan; arguments are those of the operator's schema."""
    offset, kv_lengths = _places(q_offset, q_start, kv_lengths)
    key = (
        pattern, q.shape, k.shape, q.dtype, k.dtype, q.device, k.device, settings().no_compile,
        None if offset is None else int if isinstance(offset, int) else offset.dtype,
        None if kv_lengths is None else kv_lengths.dtype,
        tuple([(t.shape, t.stride(), t.dtype, t.device) for t in data]),
        None if cu_seqlens_q is None and cu_seqlens_k is None
        else kinds(cu_seqlens_q, cu_seqlens_k, None, None, None),
    )  # fmt: skip
    make = _makers.get(key)
    if make is None:
        arguments = _of_plan(q, k, data, pattern, cu_seqlens_q, cu_seqlens_k, offset, kv_lengths)
        request = request_of(arguments)
        make = _maker(arguments, request, lowered(request).program)
        if len(_makers) >= _MANY_CALLS:
            _makers.clear()
        _makers[key] = make
    return make(data, q, k, offset, kv_lengths, cu_seqlens_q, cu_seqlens_k)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, data: Sequence[Tensor], plan: Sequence[Tensor], pattern: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    return_lse = rest[9]  # `dense` behind it has a default, which the dispatcher may leave out
    return _like(q, v.shape[-1]), q.new_empty(_lse_shape(q) if return_lse else (0,), dtype=torch.float32)


def _of_plan(
    q: Tensor, k: Tensor, data: Sequence[Tensor], pattern: str, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, offset: Offset, kv_lengths: Tensor | None,
) -> Arguments:  # fmt: skip
    """The checked arguments of a plan, as those of a call."""
    arguments = Arguments(q, k, k, data, pattern, cu_seqlens_q, cu_seqlens_k, offset, kv_lengths)
    check(arguments, plans=True)
    return arguments


def _fake_plan(
    q: Tensor, k: Tensor, data: Sequence[Tensor], pattern: str, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, q_offset: Tensor | None, q_start: int | None, kv_lengths: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    # Ordinary tensor operations, which know their shapes, make the same tables as kernels.
    offset: Offset = q_offset if q_start is None else q_start
    arguments = _of_plan(q, k, data, pattern, cu_seqlens_q, cu_seqlens_k, offset, kv_lengths)
    request = request_of(arguments)
    return _builder(arguments, request).build(lowered(request).program)


def _no_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise GradientError(
        "attention: gradient", given="a backward pass", allowed="forward only", remedy="call under torch.no_grad()"
    )


def _autocast_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """As scaled_dot_product_attention: under autocast it runs in the low-precision type."""
    kind = q.device.type
    dtype = q.dtype if q.dtype == FLOAT8 else torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return torch.ops.spgen.attention(q.to(dtype), k.to(dtype), v.to(dtype), *rest)


_library = torch.library.Library("spgen", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(_PLAN_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA"):
    _library.impl("attention", _operator, _key)
    _library.impl("plan", plan, _key)
    _library.impl("attention", _autocast_attention, f"Autocast{_key}")
torch.library.register_fake("spgen::attention", _fake_attention, lib=_library)
torch.library.register_fake("spgen::plan", _fake_plan, lib=_library)
torch.library.register_autograd("spgen::attention", _no_gradient, lib=_library)
