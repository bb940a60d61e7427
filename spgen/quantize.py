"""Makes float8 of q, k and v, for attention on Hopper GPUs.

q8, k8, v8 = sp.quantize(q, k, v)
out = attend(q8, k8, v8)          # bfloat16
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spgen.arguments import DTYPES, FLOAT8, check_integers, check_sizes, check_tensors
from spgen.backends.triton_quantize import quantizer
from spgen.errors import DeviceError, DtypeError, GradientError, ShapeError
from spgen.float8 import Float8
from spgen.settings import triton_interpreted
from spgen.target import Target
from spgen.templates.triton.quantize import KEYS, Quantization, padded_keys

_SCHEMA = "quantize(Tensor q, Tensor k, Tensor v, Tensor? kv_lengths) -> Tensor[]"


def quantize(
    q: Tensor, k: Tensor, v: Tensor, *, kv_lengths: Tensor | None = None
) -> tuple[Float8, Float8, Float8]:  # fmt: skip
    """q, k and v as float8 e4m3, for `attend(…)` on Hopper GPUs, where products of float8 run at twice bfloat16's rate.

    Shapes: q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv] with D and Dv multiples of 16; float32, bfloat16 or
    float16, any strides. Each row of q and each head of k and v is scaled so that its largest magnitude becomes 448,
    e4m3's largest; then values round to four significant bits (Micikevicius et al. 2022). Since e4m3 is a
    floating-point type, values down to 2^-15 of that largest keep their relative precision. With `kv_lengths` (integers
    [B] on the device) what lies beyond a length is not read, and becomes 0: say them here, too, where attention is told
    lengths and the memory beyond may hold NaN.

    Raises ShapeError, DtypeError, DeviceError or UnsupportedError, naming the argument.
    """
    tensors = torch.ops.spgen.quantize(q, k, v, kv_lengths)
    values, scales = tensors[:3], tensors[3:]
    return Float8(values[0], scales[0]), Float8(values[1], scales[1]), Float8(values[2], scales[2], k.shape[2])


def _quantize(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> list[Tensor]:
    _check(q, k, v, kv_lengths)
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    results = _results(q, k, v, kv_lengths)
    one = Quantization(DTYPES[q.dtype], q.shape[-1], v.shape[-1], kv_lengths is not None)
    if 0 in k.shape[:3]:
        results[4].fill_(1), results[5].fill_(1)
    quantizer(one, Target.of(q.device))((q, k, v), kv_lengths, results)
    return results


def _results(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> list[Tensor]:
    """Uninitialised values and scales."""
    turned = (*v.shape[:2], v.shape[3], padded_keys(v.shape[2]))
    values = [q.new_empty(shape, dtype=FLOAT8) for shape in (q.shape, k.shape, turned)]
    scales = [q.new_empty(shape, dtype=torch.float32) for shape in (q.shape[:3], k.shape[:2], k.shape[:2])]
    return [*values, *scales]


def _check(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> None:
    check_tensors(q, k, v, packed=False)
    check_sizes(q, k, v)
    if q.dtype not in DTYPES:
        raise DtypeError("q", given=str(q.dtype), allowed=", ".join(DTYPES.values()))
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] % KEYS:
            raise ShapeError(
                name, given=f"head size {tensor.shape[3]}", allowed=f"multiples of {KEYS} for float8",
                remedy="pad with zeros, or use bfloat16",
            )  # fmt: skip
    if q.device.type == "cpu" and not triton_interpreted():
        raise DeviceError(
            "q", given="cpu", allowed="a Hopper GPU: float8 attention runs there alone",
            remedy="pass q, k and v to attend as they are",
        )  # fmt: skip
    if kv_lengths is not None:
        check_integers("kv_lengths", kv_lengths, q)
        if tuple(kv_lengths.shape) != (q.shape[0],):
            raise ShapeError(
                "kv_lengths", given=list(kv_lengths.shape), allowed=f"[{q.shape[0]}], one for each sequence"
            )


def _no_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise GradientError(
        "quantize: gradient", given="a backward pass", allowed="forward only", remedy="call under torch.no_grad()"
    )


_library = torch.library.Library("spgen", "FRAGMENT")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA"):
    _library.impl("quantize", _quantize, _key)
torch.library.register_fake("spgen::quantize", _results, lib=_library)
torch.library.register_autograd("spgen::quantize", _no_gradient, lib=_library)
