"""What the Triton template that adds up the parts of a split call needs to know.

`parameters` is also the contract with the launcher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spgen.ir.node import Op
from spgen.templates.triton.attention import Parameter, padded

ENTRY = "combine"  # the kernel's name in the rendered module
_CHUNK = 16  # parts of a row that are read at once


@dataclass(frozen=True)
class Combination:
    """Everything that such a kernel is specialised for; the number of parts, rows and strides are not among it.

    `gaps`: a row map may leave rows without parts; those are not written.
    """

    dtype: str
    value_dim: int
    lse: bool
    sinks: bool
    gaps: bool

    @staticmethod
    def of(kernel: Op) -> Combination:
        """That of an attention kernel's parts."""
        return Combination(
            kernel["dtype"], kernel["value_dim"], kernel["lse"], kernel["sinks"], kernel["row"] is not None
        )

    def __str__(self) -> str:
        flags = [name for name in ("lse", "sinks", "gaps") if getattr(self, name)]
        return " ".join(("combine", self.dtype, str(self.value_dim), *flags))


def parameters(combination: Combination) -> tuple[Parameter, ...]:
    """The arguments of the rendered kernel, in order; types are those of attention's."""
    return tuple(Parameter(name, kind) for name, kind in _parameters(combination))


def _parameters(combination: Combination) -> Iterator[tuple[str, str]]:
    yield from (("parts", "workspace"), ("out", "data"))
    if combination.lse:
        yield "lse", "*fp32"
    if combination.sinks:
        yield "sink_logits", "*fp32"
    yield from (("splits", "i32"), ("n_parts", "i64"), ("q_len", "i32"), ("n_heads", "i32"))
    yield from ((name, "i64") for name in ("out_b", "out_h", "out_n"))


def symbols(combination: Combination) -> dict[str, Any]:
    """Every symbol of combine.py.jinja; its head comment says what they are."""
    return {
        "text": str(combination),
        "parameters": parameters(combination),
        "value_dim": combination.value_dim,
        "value_lanes": padded(combination.value_dim),
        "chunk": _CHUNK,
        "lse": combination.lse,
        "sinks": combination.sinks,
        "gaps": combination.gaps,
    }
