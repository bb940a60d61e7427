"""A case against the oracle, within what rounding can do; what must hold exactly is compared exactly.

Tolerances follow from the arithmetic, not from experience. With u the unit roundoff of float32 and S = scale * |q| |k|,
the rounding errors of a score stay below sqrt(D) u S (Higham & Mary 2019, probabilistic bounds), and shift each weight
by that much, relatively; a weight is then rounded to the type of v before it meets v, the result to q's type. So the
output may be off by A * (2 E + u_type) + u_type |out|, with A = sum of weight * |v|, and the log-sum-exp by E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import spgen as sp
from spgen import reference
from spgen.attend import Alibi
from spgen.compile import _query_head_matters
from spgen.errors import PlanError
from spgen.settings import override
from tests.fuzz.cases import Case, Tensors, tensors_of
from tests.lowering import Lengths, lowered_pairs, wanted_pairs

BACKENDS = ("none", "cpu", "gpu", "interpreter")
_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126}  # what may become 0
# Tensor cores cut sums off instead of rounding them, and three products of tf32 leave out 2**-22 of a product.
_SCORES = {"cpu": 2.0**-24, "gpu": 2.0**-22}
_EXP2 = 2.0**-21  # relative error of exp2 and tanh as the backends approximate them


class Disagreement(AssertionError):
    """A kernel and the oracle differ, or a promise of the operation is broken."""


def check(case: Case, backend: str = "cpu") -> None:
    """Raises Disagreement, or whatever the compiler raises, unless the case is as the oracle says on `backend`.

    "interpreter" is Triton's, with TRITON_INTERPRET=1 in the environment; it multiplies the bits of bfloat16 as
    integers, so these cases run in float16 there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{backend!r} is none of {BACKENDS}")
    if backend == "none":
        _check_pairs(case)
    elif backend == "interpreter":
        case = replace(case, dtype="float16") if case.dtype == "bfloat16" else case
        with override(backend="triton"):
            _check_call(case, tensors_of(case), "cpu")
    else:
        _check_call(case, tensors_of(case), "cuda" if backend == "gpu" else "cpu")


def _require(condition: bool | Tensor, what: str) -> None:
    if not bool(condition):
        raise Disagreement(what)


# -- without a backend ---------------------------------------------------------------------------------------------


def _check_pairs(case: Case) -> None:
    """The lowered text visits the oracle's pairs, each once."""
    call = lengths_of(case)
    found, wanted = lowered_pairs(case.pattern, call), wanted_pairs(case.pattern, call)
    differing = (found != wanted).nonzero()
    if len(differing):
        b, h, r, j = differing[0].tolist()
        verb = "visits" if found[b, h, r, j] else "leaves out"
        raise Disagreement(f"{len(differing)} pairs: the kernel {verb} row {r}, key {j} of sequence {b}, head {h}")


def lengths_of(case: Case) -> Lengths:
    """A call of the case's sizes, with tiles of any size: small ones have more borders, large calls get large ones."""
    large = case.call.q_len * case.call.kv_len > 64 * 64
    tiles = [(64, 64), (64, 32), (32, 64)] if large else [(8, 8), (16, 8), (8, 16), (16, 16), (32, 16)]
    block_m, block_n = tiles[case.seed % len(tiles)]
    group = case.q_heads // case.kv_heads
    may_pack = 1 < group <= block_m and not _query_head_matters(repr(case.pattern), case.q_heads, case.kv_heads)
    options = tensors_of(replace(case, head_dim=1, value_dim=1)).options
    call = case.call
    return Lengths(
        call.q_len, call.kv_len, case.q_heads, case.kv_heads, case.batch, options.get("q_offset"),
        options.get("kv_lengths"), options.get("cu_seqlens_q"), options.get("cu_seqlens_k"), block_m, block_n,
        pack=may_pack and case.seed % 3 > 0,
    )  # fmt: skip


# -- on a backend --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """The oracle's output and log-sum-exp, how far off they may be, and which rows have no key; rows lead."""

    out: Tensor
    lse: Tensor
    out_error: Tensor
    lse_error: Tensor
    empty: Tensor


def _check_call(case: Case, given: Tensors, device: str) -> None:
    pattern, moved = case.pattern.to(device), _moved(given, device)
    attend = sp.attention(pattern, scale=case.scale, softcap=case.softcap)
    before = [x.clone() for x in _all_tensors(pattern, moved)]
    call = (moved.q, moved.k, moved.v)
    out, lse = attend(*call, return_lse=True, **moved.options)
    again = attend(*call, return_lse=True, **moved.options)
    _require(_same_bits(out, again[0]) and _same_bits(lse, again[1]), "two runs of one call differ")
    if case.plan:
        own = {name: moved.options[name] for name in _OF_PLANS if name in moved.options}
        try:
            planned = attend(*call, plan=attend.plan(moved.q, moved.k, **own), return_lse=True, **moved.options)
        except PlanError:  # plans are made for values as wide as keys; others may need other tiles
            _require(case.head_dim != case.value_dim, "a plan is refused by its own call")
            planned = out, lse
        _require(_same_bits(out, planned[0]) and _same_bits(lse, planned[1]), "a call with its plan differs")
    same = all(_same_bits(x, y) for x, y in zip(before, _all_tensors(pattern, moved), strict=True))
    _require(same, "a call changed its arguments")
    _require(out.dtype == moved.q.dtype and lse.dtype == torch.float32, f"dtypes {out.dtype}, {lse.dtype}")
    _compare(out.cpu(), lse.cpu(), _wanted(case, given, device))


_OF_PLANS = ("cu_seqlens_q", "cu_seqlens_k", "q_offset", "kv_lengths")


def _moved(given: Tensors, device: str) -> Tensors:
    """The tensors on `device`, their strides kept."""
    if device == "cpu":
        return given
    options = {
        name: sp.alibi(value.slopes.to(device)) if isinstance(value, Alibi)
        else value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.options.items()
    }  # fmt: skip
    return Tensors(*(_with_strides(x, device) for x in (given.q, given.k, given.v)), options)


def _with_strides(x: Tensor, device: str) -> Tensor:
    """`x` elsewhere, with the memory around it."""
    base = x if x._base is None else x._base
    flat = base.untyped_storage()
    whole = torch.empty(0, dtype=x.dtype).set_(flat, 0, (flat.nbytes() // x.element_size(),)).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def _all_tensors(pattern: sp.Pattern, given: Tensors) -> list[Tensor]:
    options = [value.slopes if isinstance(value, Alibi) else value for value in given.options.values()]
    return [given.q, given.k, given.v, *pattern.data, *(x for x in options if isinstance(x, Tensor))]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def _wanted(case: Case, given: Tensors, device: str) -> _Wanted:
    # what lies beyond a length is outside every mask: 0 spares the oracle its slow way around NaN
    q, k, v = (x.double() for x in (given.q, given.k, given.v))
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    options: dict[str, Any] = {**given.options, "scale": case.scale, "softcap": case.softcap}
    if case.bias == "key":
        options["bias"] = torch.where(options["bias"].isnan(), 0, options["bias"])
    out, lse = reference.attention(q, k, v, case.pattern, return_lse=True, **options)
    weight = reference.attention(q, k, v.abs(), case.pattern, **options)  # A
    roundoff, unit = _ROUNDOFF[given.q.dtype], 2.0**-24
    relative = _score_error(case, q, k, options, _SCORES[device if device == "cpu" else "gpu"])
    keys, largest = k.shape[-2 if k.dim() == 4 else 0], float(v.abs().max())
    sums = 4 * math.sqrt(keys) * unit
    out_error = weight * (2 * relative + 2 * sums + roundoff) + 1.01 * roundoff * out.abs()
    out_error += _SMALLEST[given.q.dtype] * (1 + keys * largest)
    lse_error = relative[..., 0] if lse.dim() == 3 else relative[..., 0].T
    empty = (weight == 0).all(-1)
    return _Wanted(out, lse, out_error, lse_error + sums + 4 * unit * lse.abs().nan_to_num(0, 0, 0), empty)


def _score_error(case: Case, q: Tensor, k: Tensor, options: dict[str, Any], scores: float) -> Tensor:
    """How far off scores may be, [B, Hq, Lq, 1] or [T, Hq, 1]."""
    batched = q.dim() == 4
    rows, keys = (x if batched else x.transpose(0, 1)[None] for x in (q.nan_to_num(0.0).abs(), k.abs()))
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else abs(case.scale)
    group = case.q_heads // case.kv_heads
    size = scale * (rows @ keys.repeat_interleave(group, 1).mT).amax(-1, keepdim=True)
    error = (math.sqrt(case.head_dim) + 4) * scores * size
    unit = 2.0**-24
    if case.softcap is not None:
        error += case.softcap * _EXP2
        size = size.clamp(max=case.softcap)
    bias = options.get("bias")
    if isinstance(bias, Tensor):
        size = size + float(bias.nan_to_num(0, 0, 0).abs().max())
    elif bias is not None:
        size = size + float(bias.slopes.max()) * _farthest(case)
    if "sink_logits" in options:
        size = size + float(options["sink_logits"].abs().max())
    error = error + 8 * unit * size + _EXP2
    return error if batched else error[0].transpose(0, 1)


def _farthest(case: Case) -> int:
    """The largest distance of a query from a key."""
    offsets = case.q_offset if isinstance(case.q_offset, tuple) else (case.q_offset or 0,)
    return max(case.rows) + max(case.keys) + max(map(abs, offsets))


def _compare(out: Tensor, lse: Tensor, wanted: _Wanted) -> None:
    _require(out.shape == wanted.out.shape and lse.shape == wanted.lse.shape, f"shapes {out.shape}, {lse.shape}")
    _require((out[wanted.empty] == 0).all(), "a row without keys is not 0")
    _require(
        torch.equal(lse.isneginf(), wanted.lse.isneginf()), "log-sum-exps are -inf in other rows than the oracle's"
    )
    _within_error("output", out.double(), wanted.out, wanted.out_error)
    some = ~wanted.lse.isneginf()
    _within_error("log-sum-exp", lse.double()[some], wanted.lse[some], wanted.lse_error[some])


def _within_error(what: str, found: Tensor, wanted: Tensor, error: Tensor) -> None:
    _require(torch.equal(found.isnan(), wanted.isnan()), f"{what}: NaN where the oracle has none, or none where it has")
    off = (found - wanted).abs()
    bad = (off > error) & ~wanted.isnan()
    if bad.any():
        at = (off - error).nan_to_num(-math.inf).argmax()
        place = [int(x) for x in torch.unravel_index(at, off.shape)]
        pair = f"{float(found.flatten()[at]):.6g}, not {float(wanted.flatten()[at]):.6g}"
        limit = f"off by {float(off.flatten()[at]):.2e}, {float(error.flatten()[at]):.2e} is rounding"
        raise Disagreement(f"{what}: {int(bad.sum())} of {bad.numel()} wrong, at {place} {pair} ({limit})")
