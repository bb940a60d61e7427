"""Dense attention in the place of a sparse call that would not be faster: `sp.attention(pattern, dense="auto")`.

Only what data select may be ignored (see passes/hull.py), and only where the rest is all pairs or all causal pairs, the
two that torch's own kernel computes. Shapes alone decide, so nothing is read from the device, and calls of the same
shapes always take the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spgen.arguments import Arguments
from spgen.autotune.model import break_even
from spgen.compile import Request, default_config, level_1
from spgen.ir.config import Config
from spgen.ir.expr import evaluate
from spgen.ir.node import Op
from spgen.ir.pattern import read_short, slots
from spgen.passes.cost import keys_of_row
from spgen.passes.hull import hull, within_causal
from spgen.passes.structure import width
from spgen.settings import logger
from spgen.table_reader import OPERATIONS
from spgen.target import Target

CHOICES = ("never", "auto")


@dataclass(frozen=True)
class Verdict:
    """Whether a call runs dense, as causal attention or over all pairs, and why.

    `density` is the share of the dense pairs that the data can select at most, `break_even` the share from which dense
    attention is predicted to be faster (1: from none on); None where another reason decides.
    """

    dense: bool
    reason: str
    causal: bool = False
    density: float | None = None
    break_even: float | None = None

    def __str__(self) -> str:
        return f"{'dense' if self.dense else 'sparse'}: {self.reason}"


def verdict(arguments: Arguments, request: Request, return_lse: bool) -> Verdict:
    """What `dense="auto"` means for a call."""
    given = _beyond_dense(arguments, return_lse)
    if given:
        return Verdict(False, f"dense attention knows no {given}")
    node = read_short(request.pattern)
    rows, keys = arguments.q.shape[2], arguments.k.shape[2]
    terms = level_1(node)
    shape = _dense_form(hull(terms), rows, keys)
    if shape is None:
        return Verdict(False, "without its data the pattern is neither all pairs nor all causal ones")
    listed = {slot.index: tuple(data.shape) for slot, data in zip(slots(node), arguments.data, strict=True)}
    found = width(terms, keys, listed)
    if not found:
        return Verdict(False, "only the data know how dense the pattern is")
    causal = shape == "causal"
    density = found * (2 * keys - found) / keys**2 if causal else found / keys
    call = request.call
    limit = _limit(request.target, call.dtype, call.head_dim, call.value_dim, request.config or default_config(request))
    share = f"{density:.0%} of the pairs of {'causal' if causal else 'dense'} attention, "
    if limit >= 1:
        return Verdict(False, share + "which is predicted to be slower at any share", causal, density, limit)
    return Verdict(density >= limit, share + f"break-even at {limit:.0%}", causal, density, limit)


def _beyond_dense(arguments: Arguments, return_lse: bool) -> str:
    """What a call asks for that dense attention does not do the same way; an empty text if there is nothing."""
    a = arguments
    asked = {
        "packed batch": a.packed, "q_offset": a.q_offset is not None, "kv_lengths": a.kv_lengths is not None,
        "sink_logits": a.sink_logits is not None, "bias": a.bias is not None, "softcap": a.softcap is not None,
        "float8": bool(a.scales), "return_lse": return_lse, "empty call": 0 in (*a.q.shape, *a.k.shape),
    }  # fmt: skip
    return next((name for name, there in asked.items() if there), "")


def _dense_form(terms: Op, rows: int, keys: int) -> str | None:
    """ "causal" or "all", if that is what the closed forms say of these lengths."""
    counts = [keys_of_row(term) for term in terms.operands]
    i = torch.arange(keys - rows, keys)
    found = torch.zeros_like(i)
    for count in counts:
        if count is None:
            return None
        try:
            found += evaluate(count, {"i": i, "kv_len": keys}, OPERATIONS)
        except KeyError:  # it differs by head or reads a table
            return None
    if bool((found == keys).all()):
        return "all"
    # torch's causal attention counts rows from the first key
    if rows == keys and within_causal(terms) and bool((found == i + 1).all()):
        return "causal"
    return None


@lru_cache(maxsize=1024)
def _limit(target: Target, dtype: str, head_dim: int, value_dim: int, config: Config) -> float:
    return break_even(target, dtype, head_dim, config, value_dim=value_dim)


def dense_call(found: Verdict, pattern: str) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """The dense attention that a verdict chose; said once in the log."""
    logger().info("%s runs as dense attention: %s", pattern, found.reason)
    causal = found.causal

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        result: Any = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return result  # type: ignore[no-any-return]

    return call
