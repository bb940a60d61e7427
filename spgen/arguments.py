"""The arguments of an attention call: checked, and brought into the form that kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spgen.backends.extras import Extras
from spgen.data import check_shapes
from spgen.errors import DeviceError, DtypeError, PatternError, ShapeError, UnsupportedError
from spgen.ir.pattern import read_short
from spgen.sequences import Sequences
from spgen.settings import settings, triton_interpreted

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FLOAT8 = torch.float8_e4m3fn  # with scales, on GPUs that multiply it
_MAX_HEAD_DIM = 256
_INTEGERS = (torch.int32, torch.int64)
Offset: TypeAlias = "Tensor | int | None"


@dataclass(frozen=True)
class Arguments:
    """What a call brings; as in the operator's schema, with one `q_offset`."""

    q: Tensor
    k: Tensor
    v: Tensor
    data: Sequence[Tensor]
    pattern: str
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    q_offset: Offset = None
    kv_lengths: Tensor | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    scales: Sequence[Tensor] = ()

    @property
    def dtype(self) -> str:
        """The name of q's type."""
        return DTYPES.get(self.q.dtype, str(self.q.dtype).removeprefix("torch."))

    @property
    def packed(self) -> bool:
        """Whether sequences lie one behind the other."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def typical_rows(self) -> int:
        """Rows of a sequence; of a packed batch the mean."""
        return self.q.shape[2] if self.q.dim() == 4 else self.q.shape[0] // max(self.batch, 1)

    @property
    def typical_keys(self) -> int:
        """Keys of a sequence, as far as shapes tell; of a packed batch the mean."""
        return self.k.shape[2] if self.k.dim() == 4 else self.k.shape[0] // max(self.batch, 1)


def as_batch(tensor: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    view: Tensor = tensor.transpose(0, 1).unsqueeze(0)
    return view


def sequences_of(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, offset: Offset, kv_lengths: Tensor | None
) -> Sequences:
    """The sequences of a checked call."""
    if cu_q is None:
        return Sequences(q.shape[0], q.shape[2], k.shape[2], q.device, offset, kv_lengths)
    return Sequences(cu_q.shape[0] - 1, q.shape[0], k.shape[0], q.device, offset, kv_lengths, cu_q, cu_k)


def kinds(
    cu_q: Tensor | None, cu_k: Tensor | None, sink_logits: Tensor | None, bias: Tensor | None, softcap: float | None,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """What a kernel may depend on, and what was checked, of the arguments that most calls leave out."""
    tensors = (cu_q, cu_k, sink_logits, bias, *(scales or ()))
    return (
        softcap is None or softcap <= 0,
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
    )


def extras_of(
    q: Tensor, k: Tensor, sink_logits: Tensor | None, bias: Tensor | None, softcap: float | None,
    cu_q: Tensor | None = None, cu_k: Tensor | None = None, scales: Sequence[Tensor] = (),
) -> Extras:  # fmt: skip
    """The checked arguments in the form that kernels take."""
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
    if bias is not None:
        bias = bias.float()
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        if bias.dim() == 3:
            bias = _by_group(bias, q.shape[-2 if q.dim() == 3 else 1], k.shape[-2 if k.dim() == 3 else 1])
            batch = q.shape[0] if q.dim() == 4 else 1
        else:
            batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        bias = bias.expand(batch, *bias.shape[1:])
    if cu_q is not None and cu_k is not None:
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    return Extras(cu_q, cu_k, softcap, sink_logits, bias, [one.contiguous() for one in scales])


def _by_group(bias: Tensor, q_heads: int, kv_heads: int) -> Tensor:
    """[B or 1, heads, keys] as [B or 1, Hk, group, keys], shared heads with stride 0."""
    batch, heads, keys = bias.shape
    group = q_heads // kv_heads
    if heads == q_heads:
        return bias.reshape(batch, kv_heads, group, keys)
    return bias[:, :, None].expand(batch, kv_heads, group, keys)


def check(arguments: Arguments, *, plans: bool = False) -> None:
    """Raises ShapeError, DtypeError, DeviceError or PatternError, naming the argument.

    `plans`: the arguments are those of a plan, which needs neither v nor scales.
    """
    q, k, v = arguments.q, arguments.k, arguments.v
    check_tensors(q, k, v, packed=arguments.packed)
    _check_boundaries(arguments)
    q4, k4, v4 = (as_batch(x) if arguments.packed else x for x in (q, k, v))
    check_sizes(q4, k4, v4)
    _check_dtype(arguments, plans)
    for name, value in (("q_offset", arguments.q_offset), ("kv_lengths", arguments.kv_lengths)):
        if isinstance(value, Tensor):
            check_integers(name, value, q)
            if tuple(value.shape) != (arguments.batch,):
                allowed = f"[{arguments.batch}], one for each sequence"
                raise ShapeError(name, given=list(value.shape), allowed=allowed)
    _check_options(arguments, q4.shape[1], k4.shape[1], k4.shape[2])
    lengths = (None, None) if arguments.packed else (q4.shape[2], k4.shape[2])
    check_shapes(
        read_short(arguments.pattern), arguments.data, q_len=lengths[0], kv_len=lengths[1], q_heads=q4.shape[1],
        kv_heads=k4.shape[1], batch=arguments.batch, device=q.device,
    )  # fmt: skip


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    """Raises ShapeError, DeviceError or DtypeError where q, k and v have other ranks, devices or types than q."""
    rank, form = (3, "[tokens, heads, head size]") if packed else (4, "[batch, heads, length, head size]")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != rank:
            remedy = "pass cu_seqlens_q and cu_seqlens_k for a packed batch" if tensor.dim() == 3 else ""
            raise ShapeError(name, given=f"{tensor.dim()} axes", allowed=f"{rank} axes: {form}", remedy=remedy)
        if tensor.device != q.device:
            raise DeviceError(name, given=str(tensor.device), allowed=f"{q.device}, the device of q")
        if tensor.dtype != q.dtype:
            raise DtypeError(name, given=str(tensor.dtype), allowed=f"{q.dtype}, the dtype of q")


def _check_boundaries(arguments: Arguments) -> None:
    if not arguments.packed:
        return
    given = {"cu_seqlens_q": arguments.cu_seqlens_q, "cu_seqlens_k": arguments.cu_seqlens_k}
    for name, value in given.items():
        if value is None:
            other = next(other for other in given if other != name)
            raise ShapeError(name, given="None", allowed=f"a tensor, because {other} was given",
                             remedy="pass both: the boundaries of the rows and of the keys")  # fmt: skip
        check_integers(name, value, arguments.q)
        if value.dim() != 1 or value.shape[0] < 2:
            raise ShapeError(name, given=list(value.shape), allowed="[N + 1]: where each of N >= 1 sequences starts, "
                             "and the end of the last")  # fmt: skip
    sizes = [int(value.shape[0]) for value in given.values() if value is not None]
    if sizes[0] != sizes[1]:
        raise ShapeError("cu_seqlens_k", given=f"{sizes[1]} boundaries", allowed=f"{sizes[0]}, as in cu_seqlens_q")


def check_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ShapeError where q [B, Hq, Lq, D], k [B, Hk, Lk, D] and v [B, Hk, Lk, Dv] do not agree."""
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


def _check_dtype(arguments: Arguments, plans: bool) -> None:
    q = arguments.q
    if q.dtype == FLOAT8:
        _check_float8(arguments)
        return None if plans else _check_scales(arguments)
    if q.dtype not in DTYPES:
        allowed = ", ".join(DTYPES.values())
        raise DtypeError("q", given=str(q.dtype), allowed=allowed, remedy="convert q, k and v")
    if arguments.scales:
        raise DtypeError("scales", given=f"{q.dtype} with scales", allowed=f"scales of {FLOAT8}")
    if q.device.type == "cpu" and settings().backend == "triton" and not triton_interpreted():
        raise DeviceError("q", given="cpu with SPGEN_BACKEND=triton", allowed="a GPU, or TRITON_INTERPRET=1")


def _check_float8(arguments: Arguments) -> None:
    """What float8 cannot be used for."""
    q = arguments.q
    if q.device.type == "cpu":
        raise UnsupportedError("q", given=f"{q.dtype} on the CPU", allowed="float8 on Hopper GPUs",
                               remedy="pass float32, bfloat16 or float16")  # fmt: skip
    if arguments.packed:
        raise UnsupportedError("q", given=f"{q.dtype} in a packed batch", allowed="float8 in batches of equal lengths",
                               remedy="pad the batch and give kv_lengths, or pass bfloat16")  # fmt: skip


def _check_scales(arguments: Arguments) -> None:
    """Float8 comes with scales, and with the layout that matrix products take."""
    q, k, v = arguments.q, arguments.k, arguments.v
    remedy = "q8, k8, v8 = sp.quantize(q, k, v), then attend(q8, k8, v8)"
    if len(arguments.scales) != 3:
        raise DtypeError("q", given=f"{q.dtype} without scales", allowed="float8 with scales", remedy=remedy)
    shapes = {"q": q.shape[:3], "k": k.shape[:2], "v": k.shape[:2]}
    for (name, shape), scales in zip(shapes.items(), arguments.scales, strict=True):
        if scales.dtype != torch.float32:
            raise DtypeError(f"{name}: scales", given=str(scales.dtype), allowed="float32")
        if scales.device != q.device:
            raise DeviceError(f"{name}: scales", given=str(scales.device), allowed=f"{q.device}, the device of q")
        if scales.shape != shape:
            per = "row" if name == "q" else "head"
            raise ShapeError(f"{name}: scales", given=list(scales.shape), allowed=f"{list(shape)}, one for each {per}")
    if v.stride(-2) != 1:
        raise ShapeError("v", given=f"strides {v.stride()}", allowed="keys innermost", remedy=remedy)


def check_integers(name: str, value: Tensor, q: Tensor) -> None:
    """Raises DtypeError or DeviceError for what is no tensor of integers beside q."""
    if value.dtype not in _INTEGERS:
        raise DtypeError(name, given=str(value.dtype), allowed="int32 or int64")
    if value.device != q.device:
        raise DeviceError(name, given=str(value.device), allowed=f"{q.device}, the device of q")


def _check_options(arguments: Arguments, q_heads: int, kv_heads: int, keys: int) -> None:
    if arguments.softcap is not None and not 0 < arguments.softcap < float("inf"):
        raise PatternError("softcap", given=arguments.softcap, allowed="a finite number above 0, or None")
    for name, value in (("sink_logits", arguments.sink_logits), ("bias", arguments.bias)):
        if value is None:
            continue
        if value.dtype not in DTYPES:
            raise DtypeError(name, given=str(value.dtype), allowed=", ".join(DTYPES.values()))
        if value.device != arguments.q.device:
            raise DeviceError(name, given=str(value.device), allowed=f"{arguments.q.device}, the device of q")
    sinks, bias = arguments.sink_logits, arguments.bias
    if sinks is not None and tuple(sinks.shape) != (q_heads,):
        raise ShapeError("sink_logits", given=list(sinks.shape), allowed=f"[{q_heads}], one for each query head")
    if bias is None:
        return
    if bias.dim() == 2:
        if bias.shape[0] not in (1, arguments.batch) or bias.shape[1] != q_heads:
            allowed = f"[{q_heads}] or [{arguments.batch}, {q_heads}], one for each query head"
            raise ShapeError("bias: slopes", given=list(bias.shape), allowed=allowed)
        return
    batches = {1} if arguments.packed else {1, arguments.batch}
    fits = bias.dim() == 3 and bias.shape[0] in batches and bias.shape[1] in (1, kv_heads, q_heads)
    if not fits or bias.shape[2] != keys:
        heads = ", ".join(map(str, sorted({1, kv_heads, q_heads})))
        lead = "" if arguments.packed else f", or [1 or {arguments.batch}, heads, {keys}]"
        raise ShapeError(
            "bias", given=list(bias.shape), allowed=f"[{keys}], [heads, {keys}] with heads one of {heads}{lead}",
            remedy="a bias has a number for each key; for slopes by distance pass sp.alibi(slopes)",
        )  # fmt: skip
